"""The engine of an evaluation that samples running SGLang servers.

It does not sync weights: the servers keep the weights that they have.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.monitoring import live
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.rollout.sampling import SamplingReport
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import ServerInfo, version_label
from megatron_rasft.servers.keys import ServerKeys
from megatron_rasft.servers.record import ServerRecord, ServerRecords
from megatron_rasft.types import Request, Response, SamplingParams


class Servers(AbstractContextManager["Servers"]):
    """An ``Engine`` on servers that already have their weights.

    A failed server is left out until it answers again with the same weights. A server whose weights no trainer has labelled gets
    the label of version 0, so that a restart during the evaluation is noticed. Only a server that was started with
    --enable-deterministic-inference uses the seeds of the samples.

    Args:
        urls: addresses of servers with the same weights.
        model_config: config.json of the model whose tokenizer is used; servers of other models are refused.
        max_positions: longest context of that model, tokens.
        api_key: bearer key of the servers.
        deadline_s: longest time for one sample.
        wait_s: longest wait for the first server.
        probe_interval_s: shortest time between two probes of failed servers, because healthy servers wait during a probe.
        transport, async_transport: httpx transports that replace the network in tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model_config: dict[str, Any],
        max_positions: int,
        api_key: str | None = None,
        deadline_s: float = 1800.0,
        wait_s: float = 60.0,
        probe_interval_s: float = 60.0,
        transport: Any = None,
        async_transport: Any = None,
    ) -> None:
        config = RolloutConfig(
            rollout_engine="sglang",
            rollout_urls=list(urls),
            rollout_wait_s=wait_s,
            rollout_deadline_s=deadline_s,
        )
        self._records = ServerRecords(ServerKeys(api_key), partial(ServerClient, transport=transport))
        self._fleet = Fleet(config, self._records, model_config=model_config)
        self._engine = SglangEngine(self._fleet, async_transport)
        self._max_positions = max_positions
        self._probe_interval_s = probe_interval_s
        self._probed_at = time.monotonic()
        found = self._find()
        infos = [record.known_info for record in found]
        for record, info in zip(found, infos, strict=True):
            if info.weight_version is None:
                record.client.set_weight_version(0)
            self._max_positions = min(self._max_positions, info.context_length or max_positions)
        self.weights = _weights(infos[0])
        """Version and model folder of the weights that are sampled, as the servers report them."""
        if any(_weights(info) != self.weights for info in infos):
            listed = ", ".join(f"{info.url} {_weights(info)}" for info in infos)
            raise RolloutError(
                f"--server: the servers have different weights ({listed}). Name servers with the same step of the same model."
            )
        self.weight_version = infos[0].weight_version or 0
        for record in found:
            self._fleet.admit(record.url, self.weight_version)

    @property
    def max_positions(self) -> int:
        """Longest context in tokens: the model's, or less if a server was started with a shorter context."""
        return self._max_positions

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """Returns one response per seed. Samples that the servers failed to return have the finish reason ``abort``.

        Raises:
            RolloutError: no server with the weights of the evaluation is left.
        """
        self._readmit()
        report = SamplingReport.of(requests)
        with live.sampling(report):
            answers = self._engine.generate(requests, params, self.weight_version, report)
        lost = Response(token_ids=[], logprobs=[], finish_reason="abort")
        return [[lost if response is None else response for response in group] for group in answers.responses]

    def _find(self) -> list[ServerRecord]:
        try:
            return self._fleet.find()
        except RolloutError:
            raise self._no_server() from None

    def _readmit(self) -> None:
        """Probes failed servers, and admits those that still have the weights of the evaluation."""
        num_serving = len(self._fleet.serving(self.weight_version))
        is_early = time.monotonic() < self._probed_at + self._probe_interval_s
        if num_serving == len(self._fleet.records) or (num_serving and is_early):
            return
        for record in self._find():
            info = record.known_info
            if info.weight_label == version_label(self.weight_version) and _weights(info) == self.weights:
                self._fleet.admit(record.url, self.weight_version)
            else:
                self._fleet.quarantine(
                    record.url,
                    f"has the weights {info.weight_label!r} of {info.model_path}, not {self.weights} (was it restarted?)",
                )
        self._probed_at = time.monotonic()
        if not self._fleet.serving(self.weight_version):
            raise self._no_server()

    def _no_server(self) -> RolloutError:
        reasons = "; ".join(f"{record.url} {record.fault}" for record in self._fleet.records)
        return RolloutError(
            f"--server: no server can be sampled: {reasons}. Start one and repeat the command, which continues an interrupted "
            "evaluation."
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.close()
        self._records.close()


def _weights(info: ServerInfo) -> str:
    return f"step {info.weight_version or 0} of {info.model_path}"
