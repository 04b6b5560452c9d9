"""Running SGLang servers as the engine of an evaluation: nothing is synced, whatever they serve is sampled."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.types import Request, Response, SamplingParams, ServerInfo


class Servers(AbstractContextManager["Servers"]):
    """An ``Engine`` on servers that have their weights already.

    A server that no trainer has labelled is labelled as version 0, so that a restart in between is noticed; a
    server only keeps to a sample's seed if it was started with --enable-deterministic-inference.

    Args:
        urls: of servers with the same weights.
        model_config: config.json of the model whose tokenizer is used; other models are refused.
        max_positions: of that model.
        api_key: bearer key of the servers.
        transport, async_transport: httpx transports that stand in for the network in tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model_config: dict[str, Any],
        max_positions: int,
        api_key: str | None = None,
        transport: Any = None,
        async_transport: Any = None,
    ) -> None:
        config = RolloutConfig(rollout_engine="sglang", rollout_urls=list(urls), rollout_wait_s=0.0)
        fleet = Fleet(config, api_key=api_key, model_config=model_config, transport=transport)
        self._engine = SglangEngine(fleet, async_transport)
        self._max_positions = max_positions
        found = fleet.find()
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
            fleet.admit(control.url, self.weight_version)

    @property
    def max_positions(self) -> int:
        """Of the model, or fewer if a server was started with fewer."""
        return self._max_positions

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """One response per seed; those that the servers failed to give are ``abort``."""
        answers = self._engine.generate(requests, params, self.weight_version)
        lost = Response(token_ids=[], logprobs=[], finish_reason="abort")
        return [[lost if response is None else response for response in group] for group in answers.responses]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.close()


def _weights(info: ServerInfo) -> str:
    return f"step {info.weight_version or 0} of {info.model_path}"
