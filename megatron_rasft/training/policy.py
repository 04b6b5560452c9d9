"""The interface of the trained model that refreshes and held-out measurements use. ``Trainer`` implements it."""

from collections.abc import Sequence
from typing import Protocol

from megatron_rasft.monitoring.stopping import StopRequest
from megatron_rasft.types import Request, Response, SamplingParams, TrainingSample


class Policy(Protocol):
    """Scores and samples responses. Every method is a collective of the world, and may raise Stopped."""

    stop: StopRequest

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> Sequence[Sequence[float]]:
        """Returns the log-probabilities of each sample's response, nats, on rank 0; [] on the others.

        Args:
            samples: on rank 0; not read on the others.
            with_reference: use the weights of the frozen reference instead of the current ones.
        """

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """Returns each request's responses on rank 0; [] on the others. The requests are the same on every rank."""
