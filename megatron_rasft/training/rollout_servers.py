"""The rollout servers of a run, joined to its trainer: its weights go there, samples come from there.

Rank 0 speaks to the servers; a sync, and whatever says so, is a collective of the world between steps.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from megatron_rasft import metrics
from megatron_rasft.config import RolloutConfig
from megatron_rasft.errors import RolloutError, ServerError
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.rollout.sampling import Answers
from megatron_rasft.servers.keys import ServerKeys, read_key
from megatron_rasft.servers.record import ServerRecord, ServerRecords
from megatron_rasft.sync import SyncReport, WeightSync
from megatron_rasft.training.stopping import StopRequest
from megatron_rasft.types import Request, SamplingParams, TrainingSample

_WAIT_S = 5.0
"""Rank 0 tells the others this often that samples are still being made: no collective of theirs runs for longer."""


_PROBE_MARGIN = 8
"""Tokens that a probe must stay below a server's context: SGLang keeps six of it (max_req_input_len in srt/managers)."""


class SyncedModel(Protocol):
    """The trainer, as far as its servers need it; every method is a collective of the world."""

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> Sequence[Sequence[float]]:
        """On rank 0 per sample the log-probabilities of its response; [] on the others, whose samples are not read."""

    def weight_sync(self, records: ServerRecords) -> WeightSync:
        """What takes this model's weights to servers."""

    def push_weights(self, sync: WeightSync, weight_version: int, urls: Sequence[str]) -> SyncReport:
        """Bring the servers the weights as they are now."""


class RolloutServers:
    """All servers of a run, and their samples. Every rank makes one.

    Args:
        config: of the rollouts.
        model: the trainer.
        model_config: config.json of the model.
        records: the servers that this process knows; closed with the run.
        say: told of each sync, fault and return in one line; rank 0's counts.
        is_lead: whether this is rank 0.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model: SyncedModel,
        model_config: dict[str, Any],
        records: ServerRecords,
        say: Callable[[str], None],
        is_lead: bool,
    ) -> None:
        self._config = config
        self._model = model
        self._say = say
        self._records = records
        self._lead = (
            SglangEngine(Fleet(config, self._records, model_config=model_config, say=say))
            if is_lead
            else None
        )
        self._sync = model.weight_sync(self._records)
        say(self._sync.describe())

    @property
    def engine(self) -> SglangEngine:
        """Rank 0 only."""
        assert self._lead is not None, "only rank 0 speaks to the servers"
        return self._lead

    def sync(
        self, weight_version: int, probes: Sequence[TrainingSample], stop: StopRequest
    ) -> dict[str, float]:
        """Bring this model's weights to every server that answers and lacks them; those that prove to have them may be asked.

        A collective of the world; nothing may be sampling.

        Args:
            weight_version: optimizer steps done.
            probes: on rank 0; servers and trainer must agree on their log-probabilities.
            stop: asked while no server answers.

        Returns:
            Metric name -> value, on every rank; empty where no server had to be brought anything.

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
        report = self._model.push_weights(self._sync, weight_version, urls)
        return on_rank_zero(lambda: self._admit(report, probes, expected))

    def start(self, requests: Sequence[Request], params: SamplingParams, weight_version: int) -> None:
        """Set the servers with these weights to work; rank 0 only."""
        self.engine.start(requests, params, weight_version)

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Return when all samples are there or given up; a collective of the world.

        Args:
            check: called now and then; what it raises ends the wait.
        """
        while not on_rank_zero(lambda: self.engine.wait(_WAIT_S)):
            check()

    def result(self) -> Answers:
        """What came of ``start``; rank 0 only."""
        answers = self.engine.result()
        self._say(answers.report.describe())
        return answers

    def rest(self) -> None:
        """Have servers on the trainer's own GPUs give up their memory until the next sync; a collective of the world."""
        sleepers: list[str] = on_rank_zero(
            lambda: [
                m.url
                for m in self.engine.fleet.records
                if m.info is not None and m.info.has_memory_saver  # quarantined ones hold memory too
            ]
        )
        if not sleepers:
            return
        failed = self._sync.sleep(sleepers)
        if self._lead is not None:
            for url, reason in failed.items():
                self.engine.fleet.quarantine(url, reason)

    def close(self, *, is_clean: bool) -> None:
        """Stop sampling, wake who sleeps and leave the servers to themselves; a collective of the world if the run ended well."""
        if is_clean:
            self._sync.empty_cache()
        else:
            with suppress(RuntimeError):  # of a device that failed
                self._sync.empty_cache(waits=False)
        if self._lead is not None:
            self._lead.close()
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
        """Let the servers with the new weights generate, and keep the others from it."""
        fleet, step = self.engine.fleet, report.weight_version
        for note in report.notes:
            self._say(note)
        for url, reason in report.failed.items():
            fleet.quarantine(url, f"did not get the weights of step {step}: {reason}")
        synced = [r for r in fleet.records if r.url in report.synced]
        with ThreadPoolExecutor(max(1, len(synced))) as pool:
            gaps = list(pool.map(lambda r: logprob_gap(r, probes, expected), synced))
        limit = self._config.rollout_max_logprob_gap
        known = []
        for record, gap in zip(synced, gaps, strict=True):
            if isinstance(gap, str):
                fleet.quarantine(record.url, gap)
            elif limit is not None and not gap <= limit:
                fleet.quarantine(
                    record.url,
                    f"and the trainer differ by {gap:.3f} nats a token in their log-probabilities of {len(probes)} demonstrations "
                    f"after the weights of step {step}, more than --rollout-max-logprob-gap {limit:g}",
                )
            else:
                fleet.admit(record.url, step)
                known.append(gap)
        values = report.values()
        line = report.line()
        if known:
            values[metrics.LOGPROB_GAP] = max(known)
            line += f"; log-probabilities within {max(known):.4f} nats of the trainer's"
        self._say(line)
        if not fleet.serving(step) and self._config.rollout_without_servers == "error":
            faults = "; ".join(f"{m.url} {m.fault}" for m in fleet.records if m.fault)
            raise RolloutError(
                f"no rollout server has the weights of step {step}: {faults}. Restart the servers and start again to go on "
                "from the last checkpoint, or train on demonstrations meanwhile with --rollout-without-servers "
                "demonstrations."
            )
        return values


def read_keys(config: RolloutConfig) -> ServerKeys:
    """The servers' bearer key and that of their control calls, out of the environment.

    Raises:
        ValueError: a variable that a flag names holds no key.
    """
    return ServerKeys(
        read_key("--rollout-api-key-env", config.rollout_api_key_env),
        read_key("--rollout-admin-api-key-env", config.rollout_admin_api_key_env),
    )


def logprob_gap(
    server: ServerRecord, probes: Sequence[TrainingSample], expected: Sequence[Sequence[float]]
) -> float | str:
    """How far a server is from the trainer in what it thinks of these responses.

    Both are at temperature 1: a server's log-probabilities of a prompt, unlike those of what it samples, are
    not divided by a temperature. Of a response that its context does not hold the beginning is compared.

    Args:
        expected: per probe the trainer's log-probabilities of its response, nats.

    Returns:
        Mean absolute difference, nats a token; or why there is none.
    """
    total, count = 0.0, 0
    longest = _context(server) - _PROBE_MARGIN
    for probe, whole in zip(probes, expected, strict=True):
        room = max(0, longest - len(probe.prompt_ids))
        ours, response_ids = whole[:room], probe.response_ids[:room]
        if not ours:
            continue
        body = {
            "input_ids": [*probe.prompt_ids, *response_ids],
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        try:
            found = server.client.generate(body)["meta_info"]["input_token_logprobs"]
            theirs = [float(entry[0]) for entry in found[len(found) - len(ours) :]]
            ids = [int(entry[1]) for entry in found[len(found) - len(ours) :]]
        except ServerError as error:
            return error.reason
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            return f"answers a probe with something else than log-probabilities ({error!r})"
        if ids != list(response_ids):
            return "answers a probe with log-probabilities of other tokens"
        total += sum(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        count += len(ours)
    if probes and not count:
        return f"holds none of {len(probes)} demonstrations in a context of {_context(server)} tokens"
    return total / max(1, count)


def _context(server: ServerRecord) -> int:
    """Tokens that a request at a server may have, as far as it says so."""
    info = server.known_info
    of_model = info.context_length or (info.model_config or {}).get("max_position_embeddings")
    return min(limit for limit in (of_model, info.max_total_tokens, sys.maxsize) if limit)
