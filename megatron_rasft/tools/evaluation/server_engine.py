"""Running SGLang servers as the engine of an evaluation: nothing is synced, whatever they serve is sampled."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import ServerInfo, version_label
from megatron_rasft.types import Request, Response, SamplingParams

_BETWEEN_PROBES_S = 60.0
"""A server that hangs makes the others wait for its probe, so it is not asked before every batch."""


class Servers(AbstractContextManager["Servers"]):
    """An ``Engine`` on servers that have their weights already.

    A server that failed is left out, but only until it answers again with the same weights.

    A server that no trainer has labelled is labelled as version 0, so that a restart in between is noticed; a
    server only keeps to a sample's seed if it was started with --enable-deterministic-inference.

    Args:
        urls: of servers with the same weights.
        model_config: config.json of the model whose tokenizer is used; other models are refused.
        max_positions: of that model.
        api_key: bearer key of the servers.
        deadline_s: longest time for one sample.
        wait_s: time to wait for a server where none answers.
        transport, async_transport: httpx transports that stand in for the network in tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model_config: dict[str, Any],
        max_positions: int,
        api_key: str | None = None,
        deadline_s: float = 1800.0,
        wait_s: float = 60.0,
        transport: Any = None,
        async_transport: Any = None,
    ) -> None:
        config = RolloutConfig(
            rollout_engine="sglang",
            rollout_urls=list(urls),
            rollout_wait_s=wait_s,
            rollout_deadline_s=deadline_s,
        )
        self._fleet = Fleet(config, api_key=api_key, model_config=model_config, transport=transport)
        self._engine = SglangEngine(self._fleet, async_transport)
        self._max_positions = max_positions
        self._probed_at = time.monotonic()
        found = self._find()
        for control in found:
            if control.info.weight_version is None:
                control.set_weight_version(0)
            self._max_positions = min(self._max_positions, control.info.context_length or max_positions)
        weights = {control.url: _weights(control.info) for control in found}
        self.weights = weights[found[0].url]
        """What is sampled: version label and model folder, as the servers say."""
        if len(set(weights.values())) > 1:
            listed = ", ".join(f"{url} {what}" for url, what in weights.items())
            raise RolloutError(
                f"--server: the servers have different weights ({listed}). Name those of one step of one model."
            )
        self.weight_version = found[0].info.weight_version or 0
        for control in found:
            self._fleet.admit(control.url, self.weight_version)

    @property
    def max_positions(self) -> int:
        """Of the model, or fewer if a server was started with fewer."""
        return self._max_positions

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """One response per seed; those that the servers failed to give are ``abort``.

        Raises:
            RolloutError: no server with the weights of the evaluation is left.
        """
        self._readmit()
        answers = self._engine.generate(requests, params, self.weight_version)
        lost = Response(token_ids=[], logprobs=[], finish_reason="abort")
        return [[lost if response is None else response for response in group] for group in answers.responses]

    def _find(self) -> list[ServerClient]:
        try:
            return self._fleet.find()
        except RolloutError:
            raise self._nobody() from None

    def _readmit(self) -> None:
        """Ask the servers that were left out again; those that still have their weights go on."""
        num_serving = len(self._fleet.serving(self.weight_version))
        is_early = time.monotonic() < self._probed_at + _BETWEEN_PROBES_S
        if num_serving == len(self._fleet.members) or (num_serving and is_early):
            return
        for control in self._find():
            info = control.info
            if info.weight_label == version_label(self.weight_version) and _weights(info) == self.weights:
                self._fleet.admit(control.url, self.weight_version)
            else:
                self._fleet.quarantine(
                    control.url,
                    f"has the weights {info.weight_label!r} of {info.model_path}, not {self.weights} (was it restarted?)",
                )
        self._probed_at = time.monotonic()
        if not self._fleet.serving(self.weight_version):
            raise self._nobody()

    def _nobody(self) -> RolloutError:
        reasons = "; ".join(f"{member.url} {member.fault}" for member in self._fleet.members)
        return RolloutError(
            f"--server: there is none to ask: {reasons}. Start one; an interrupted evaluation goes on by the same command."
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.close()


def _weights(info: ServerInfo) -> str:
    return f"step {info.weight_version or 0} of {info.model_path}"
