"""Joins the rollout servers of a run to its trainer: sends them the weights, and collects their samples.

Rank 0 alone samples from the servers. During a weight sync, other ranks send weights to them too.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

from megatron_rasft import metrics
from megatron_rasft.config import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.monitoring import live
from megatron_rasft.monitoring.stopping import StopRequest
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.rollout.sampling import Answers
from megatron_rasft.servers.keys import ServerKeys, read_key
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync import SyncReport, WeightSync
from megatron_rasft.training.logprob_probe import logprob_gap
from megatron_rasft.training.policy import Policy
from megatron_rasft.types import Request, SamplingParams, TrainingSample
from megatron_rasft.wording import counted

_MIB = 2**20

_WAIT_S = 5.0
"""Time between two collectives of the ranks while servers sample, so that none waits longer and the run can be stopped."""


class SyncedModel(Policy, Protocol):
    """The interface of the trainer for its servers. ``Trainer`` implements it. Every method is a collective of the world."""

    def weight_sync(self, records: ServerRecords) -> WeightSync:
        """Returns the object that sends this model's weights to servers."""

    def parameters_gathered(self) -> AbstractContextManager[None]:
        """Returns a context in which every rank has all current parameters."""


class RolloutServers:
    """All rollout servers of a run. Every rank has this object; rank 0's also has the HTTP connections.

    Args:
        model: the trainer, whose weights the servers get.
        model_config: the model's config.json.
        records: the servers known to this process; closed with the run.
        say: prints a line about a sync, a fault or a returning server; used on rank 0.
        is_rank_zero: whether this is rank 0.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model: SyncedModel,
        model_config: dict[str, Any],
        records: ServerRecords,
        say: Callable[[str], None],
        is_rank_zero: bool,
    ) -> None:
        self._config = config
        self._model = model
        self._say = say
        self._records = records
        self._engine_on_rank_zero = (
            SglangEngine(Fleet(config, self._records, model_config=model_config, say=say))
            if is_rank_zero
            else None
        )
        self._sync = model.weight_sync(self._records)
        say(self._sync.describe())

    @property
    def engine(self) -> SglangEngine:
        """Samples from the servers. Rank 0 only."""
        assert self._engine_on_rank_zero is not None, "only rank 0 samples from the servers"
        return self._engine_on_rank_zero

    def sync(
        self, weight_version: int, probes: Sequence[TrainingSample], stop: StopRequest
    ) -> dict[str, float]:
        """Sends the weights to every reachable server that lacks them, and admits those that then agree with the trainer.

        A collective of the world. No server may be sampling.

        Args:
            weight_version: optimizer steps done.
            probes: demonstrations whose log-probabilities are compared; read on rank 0.
            stop: checked while no server is reachable.

        Returns:
            Metric name -> value, on every rank; {} if no server lacked the weights.

        Raises:
            RolloutError: no server has the weights, and --rollout-without-servers is error.
            Stopped: the run is to stop.
        """
        urls: list[str] = stop.on_rank_zero(
            lambda: self.engine.fleet.lacking(weight_version, self.engine.fleet.find(stop.check_here))
        )
        if not urls:
            return {}
        expected = self._model.score(probes, with_reference=False)
        with self._model.parameters_gathered(), self._showing_sync(len(urls)):
            report = self._sync.push(weight_version, urls)
        return on_rank_zero(lambda: self._admit(report, probes, expected))

    def start(self, requests: Sequence[Request], params: SamplingParams, weight_version: int) -> None:
        """Starts sampling in the background from the servers that have these weights. Rank 0 only."""
        self.engine.start(requests, params, weight_version)

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Returns when the servers have finished sampling; a collective of the world.

        Args:
            check: called on every rank every few seconds; an exception that it raises ends the wait.
        """
        with self._showing_samples():
            while not on_rank_zero(lambda: self.engine.wait(_WAIT_S)):
                check()

    def _showing_samples(self) -> AbstractContextManager[None]:
        if self._engine_on_rank_zero is None:
            return nullcontext()
        return live.sampling(self.engine.report)

    def _showing_sync(self, num_servers: int) -> AbstractContextManager[None]:
        transfer = self._sync.transfer
        before, total = transfer.num_sent_bytes, transfer.num_bytes // _MIB
        label = f"sending weights to {counted(num_servers, 'server')}"
        return live.work(label, "MiB", total, lambda: (transfer.num_sent_bytes - before) // _MIB)

    def result(self) -> Answers:
        """Returns the samples of the last ``start``. Rank 0 only."""
        answers = self.engine.result()
        self._say(answers.report.describe())
        return answers

    def sleep(self) -> None:
        """Makes servers on the trainer's own GPUs free their memory until the next sync. A collective of the world."""
        # Quarantined servers hold memory too.
        urls: list[str] = on_rank_zero(
            lambda: [
                r.url for r in self.engine.fleet.records if r.info is not None and r.info.has_memory_saver
            ]
        )
        if not urls:
            return
        failed = self._sync.sleep(urls)
        if self._engine_on_rank_zero is not None:
            for url, reason in failed.items():
                self.engine.fleet.quarantine(url, reason)

    def close(self, *, is_clean: bool) -> None:
        """Stops sampling, wakes sleeping servers and closes the connections.

        Args:
            is_clean: the run ended without an error. Only then is this a collective of the world: after an error, other ranks may
                never take part.
        """
        if is_clean:
            self._sync.empty_cache()
        else:
            with suppress(RuntimeError):  # a failed device can raise here too
                self._sync.empty_cache(waits=False)
        if self._engine_on_rank_zero is not None:
            self._engine_on_rank_zero.close()
            for url, reason in self._sync.wake().items():
                self._say(
                    f"rollout server {url} could not take its memory back ({reason}): restart it before the next run"
                )
        if is_clean:
            self._sync.close()
        self._records.close()

    def _admit(
        self, report: SyncReport, probes: Sequence[TrainingSample], expected: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        """Admits servers whose log-probabilities agree with the trainer's and quarantines the others. Rank 0 only."""
        fleet, step = self.engine.fleet, report.weight_version
        for note in report.notes:
            self._say(note)
        for url, reason in report.failed.items():
            fleet.quarantine(url, f"did not receive the weights of step {step}: {reason}")
        gaps = self._admitted(report, probes, expected)
        values, line = report.values(), report.line()
        if gaps:
            values[metrics.LOGPROB_GAP] = max(gaps)
            line += f"; log-probabilities within {max(gaps):.4f} nats of the trainer's"
        self._say(line)
        if not fleet.serving(step) and self._config.rollout_without_servers == "error":
            faults = "; ".join(f"{r.url} {r.fault}" for r in fleet.records if r.fault)
            raise RolloutError(
                f"no rollout server has the weights of step {step}: {faults}. Restart the servers, then start this run again to "
                "continue from the last checkpoint; or train without rollouts in the meantime with "
                "--rollout-without-servers demonstrations."
            )
        return values

    def _admitted(
        self, report: SyncReport, probes: Sequence[TrainingSample], expected: Sequence[Sequence[float]]
    ) -> list[float]:
        """Admits or quarantines each synced server. Returns the log-probability gaps of the admitted servers, nats per token."""
        fleet, limit = self.engine.fleet, self._config.rollout_max_logprob_gap
        synced = [record for record in fleet.records if record.url in report.synced]
        with ThreadPoolExecutor(max(1, len(synced))) as pool:
            gaps = list(pool.map(lambda record: logprob_gap(record, probes, expected), synced))
        admitted = []
        for record, gap in zip(synced, gaps, strict=True):
            if isinstance(gap, str):
                fleet.quarantine(record.url, gap)
            elif limit is not None and not gap <= limit:  # written so that a NaN gap fails too
                fleet.quarantine(
                    record.url,
                    f"has log-probabilities of {len(probes)} demonstrations that differ from the trainer's by {gap:.3f} nats per "
                    f"token after the weights of step {report.weight_version}, more than --rollout-max-logprob-gap {limit:g}",
                )
            else:
                fleet.admit(record.url, report.weight_version)
                admitted.append(gap)
        return admitted


def read_keys(config: RolloutConfig) -> ServerKeys:
    """Reads the servers' API key and their admin API key from the environment.

    Raises:
        ValueError: an environment variable that a flag names is not set, or holds no key.
    """
    return ServerKeys(
        read_key("--rollout-api-key-env", config.rollout_api_key_env),
        read_key("--rollout-admin-api-key-env", config.rollout_admin_api_key_env),
    )
