"""A refresh: which problems come next, what the policy makes of them, and the batches that follow.

``Planner.next_window`` is a collective of the whole world. Rank 0 decides (curriculum, verification, weights
are plain Python) and keeps the rollouts and the finished batches; every rank takes part in scoring and sampling.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from megatron_rasft.config import RasftConfig
from megatron_rasft.curriculum.curriculum import Curriculum
from megatron_rasft.data.tokenized_rows import ByProblem
from megatron_rasft.objective.weighting import count_solved, make_samples
from megatron_rasft.ranks import kept_by_rank_zero, on_rank_zero
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.training.reference import LogprobCache
from megatron_rasft.training.rollout_servers import RolloutServers
from megatron_rasft.training.samples import BatchQueue, SampleArrays
from megatron_rasft.training.stopping import StopRequest
from megatron_rasft.types import (
    Demonstration,
    Request,
    Response,
    Rollout,
    RolloutGroup,
    SamplingParams,
    TrainingSample,
)
from megatron_rasft.verify.pool import VerifierPool
from megatron_rasft.verify.text_quality import deduplicate, first_failed_filter, max_similarity

_NUM_PROBES = 4
"""Demonstrations on which servers and trainer are compared after a sync."""


class Policy(Protocol):
    """What a refresh needs of the model; every method is a collective of the whole world, and may raise Stopped."""

    stop: StopRequest

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> Sequence[Sequence[float]]:
        """On rank 0 per sample the log-probabilities of its response; [] on the others, whose samples are not read."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """On rank 0 per request its responses; [] on the others."""


@dataclass
class RefreshReport:
    """What happened at a refresh, for the log."""

    num_problems: int = 0
    num_sampled: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    num_filtered: int = 0
    num_solved: int = 0
    """Problems with at least one correct rollout."""
    mean_response_tokens: float = 0.0
    mean_difficulty: float = float("nan")
    demonstration_weight: float = float("nan")
    rollout_weight: float = float("nan")
    score_s: float = 0.0
    generate_s: float = 0.0
    verify_s: float = 0.0
    reference_s: float = 0.0
    served: dict[str, float] = field(default_factory=dict)
    """Metric name -> value of what servers did: the sync, and the sampling."""

    @property
    def num_rollouts(self) -> int:
        return sum(self.verdicts.values())

    @property
    def solve_rate(self) -> float:
        """Correct over all rollouts; NaN if there were none."""
        return self.verdicts["correct"] / self.num_rollouts if self.num_rollouts else float("nan")


@dataclass
class Plan:
    """The problems of a window, and those of them (or of the hard pool) that get rollouts."""

    ids: list[str]
    chosen: list[str]


def as_rollouts(
    problem_id: str,
    request: Request,
    answers: Sequence[Response | None],
    iteration: int,
    decode: Callable[[list[int]], str],
) -> list[Rollout]:
    """The sampled responses of one problem, not yet verified; none for a seed that was not answered."""
    return [
        Rollout(
            problem_id=problem_id,
            sample_index=index,
            weight_version=iteration,
            prompt_ids=request.prompt_ids,
            response_ids=answer.token_ids,
            response_logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            text=decode(answer.token_ids),
        )
        for index, answer in enumerate(answers)
        if answer is not None
    ]


class Planner:
    """Makes the windows of a run, one after the other.

    Args:
        demonstrations: all problems; needed on rank 0 only, others may pass [].
        num_problems: number of all problems, on every rank.
        batch_size: problems per step.
        total_steps: steps of the whole run, for the curriculum's slide.
        policy: the model.
        decode: token ids -> text; rank 0 only.
        stop_ids: ids that end a response.
        max_tokens: longest prompt plus response.
        verifier: grades rollouts; rank 0 only, None where nothing is sampled.
        servers: sample instead of the policy itself; None where there are none.
        replay: has the rollouts of --rollout-engine replay; rank 0 only.
        store: keeps rollouts; rank 0 only.
        cache: reference log-probabilities; rank 0 only.
    """

    def __init__(
        self,
        config: RasftConfig,
        demonstrations: Sequence[Demonstration],
        *,
        batch_size: int,
        total_steps: int,
        policy: Policy,
        decode: Callable[[list[int]], str],
        stop_ids: frozenset[int],
        max_tokens: int,
        verifier: VerifierPool | None,
        servers: RolloutServers | None,
        replay: ReplayEngine | None,
        store: RolloutStore | None,
        cache: LogprobCache | None,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.policy = policy
        self.decode = decode
        self.max_tokens = max_tokens
        self.verifier = verifier
        self.servers = servers
        self.store = store
        self._cache_on_rank_zero = cache
        self._by_id = ByProblem(demonstrations, lambda d: d)
        self._curriculum_on_rank_zero = (
            Curriculum(
                list(self._by_id),
                config.curriculum,
                seed=config.data.data_seed,
                memory=config.weighting.weighting_memory,
            )
            if demonstrations
            else None
        )
        self._replay = replay
        self._ahead: Plan | None = None
        """Of the next window, with --rollout-lag 1."""
        self._before: dict[str, Any] | None = None
        """``state_dict()`` at the start of a window that is being made: one that is broken off is made again."""
        self._served_version: int | None = None
        """Weights from which servers are sampling the next plan; None while they are not."""
        rollout = config.rollout
        self.stop_ids = stop_ids
        self._sampling = SamplingParams(
            num_samples=rollout.rollout_num_samples,
            max_new_tokens=rollout.rollout_max_new_tokens,
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            repetition_penalty=rollout.rollout_repetition_penalty,
            stop_ids=stop_ids,
            max_batch_size=rollout.rollout_batch_size,
            max_total_tokens=max_tokens,
        )

    @property
    def curriculum(self) -> Curriculum:
        """Rank 0 only."""
        assert self._curriculum_on_rank_zero is not None, "only rank 0 has the curriculum"
        return self._curriculum_on_rank_zero

    @property
    def cache(self) -> LogprobCache:
        """Rank 0 only, and only of an objective with a reference."""
        assert self._cache_on_rank_zero is not None, "only rank 0 has the cache, if there is a reference"
        return self._cache_on_rank_zero

    def refresh(self, iteration: int) -> tuple[BatchQueue, RefreshReport]:
        """The batches of the next refresh interval.

        Args:
            iteration: optimizer steps done, which is the version of the weights.

        Raises:
            Stopped: the run is to stop; ``state_dict()`` is that from before the call.
        """
        self.policy.stop.check()
        self._before = self.state_dict() if self._curriculum_on_rank_zero is not None else None
        report = RefreshReport()
        plan = self._ahead or self._plan(iteration, report)
        self._ahead = None
        ids = plan.ids
        report.num_problems = len(ids)
        groups = self._sample(plan, iteration, report)
        samples: dict[str, list[TrainingSample]] = kept_by_rank_zero(
            lambda: self._weigh(ids, groups, report), {}
        )
        flat = [s for group in samples.values() for s in group]
        self._attach_logprobs(flat, iteration, report)
        sizes: list[tuple[int, int]] = on_rank_zero(lambda: self._sizes(ids, samples))
        report = on_rank_zero(lambda: report)
        arrays = kept_by_rank_zero(lambda: SampleArrays.of(flat), None)
        self._before = None
        return BatchQueue(sizes, arrays), report

    def _sizes(self, ids: list[str], samples: dict[str, list[TrainingSample]]) -> list[tuple[int, int]]:
        """Problems and samples of each step's batch."""
        parts = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
        return [(len(part), sum(len(samples[i]) for i in part)) for part in parts]

    def _plan(self, iteration: int, report: RefreshReport) -> Plan:
        """What comes in the window that begins after ``iteration`` steps."""
        size = self.batch_size * min(
            self.config.run.rasft_refresh_interval, max(1, self.total_steps - iteration)
        )
        ids: list[str] = on_rank_zero(lambda: self.curriculum.next_problems(size))
        return Plan(ids, self._choose(ids, iteration, report))

    def _demonstration_sample(self, problem_id: str) -> TrainingSample:
        demonstration = self._by_id[problem_id]
        return TrainingSample(
            problem_id=problem_id,
            kind="demonstration",
            prompt_ids=demonstration.prompt_ids,
            response_ids=demonstration.response_ids,
            weight=1.0,
        )

    def _difficulties(self, ids: Sequence[str]) -> dict[str, float]:
        """Mean cross-entropy of each demonstration under the policy of the moment, nats per token; rank 0 only."""
        samples: list[TrainingSample] = kept_by_rank_zero(
            lambda: [self._demonstration_sample(i) for i in ids], []
        )
        logprobs = self.policy.score(samples, with_reference=False)
        scored = zip(samples, logprobs, strict=True)
        return {s.problem_id: -sum(v) / max(1, len(v)) for s, v in scored}

    def _choose(self, ids: list[str], iteration: int, report: RefreshReport) -> list[str]:
        """The problems to sample now, the same list on every rank."""
        if not self.config.samples_rollouts:
            return []
        if self.config.curriculum.curriculum_mode != "band":
            return on_rank_zero(lambda: self.curriculum.choose_for_rollouts(dict.fromkeys(ids, "middle")))
        began = time.monotonic()
        calibration: list[str] = on_rank_zero(
            lambda: self.curriculum.calibration_sample() if self.curriculum.thresholds is None else []
        )
        if calibration:
            reference = self._difficulties(calibration)
            on_rank_zero(lambda: self.curriculum.calibrate(reference.values()))
        difficulties = self._difficulties(ids)
        report.mean_difficulty = sum(difficulties.values()) / max(1, len(difficulties))
        report.score_s = time.monotonic() - began
        progress = iteration / max(1, self.total_steps)
        return on_rank_zero(
            lambda: self.curriculum.choose_for_rollouts(self.curriculum.route(difficulties, progress))
        )

    def _sample(self, plan: Plan, iteration: int, report: RefreshReport) -> dict[str, RolloutGroup]:
        """Rollouts of the chosen problems, verified and filtered; on rank 0, {} on the others."""
        began = time.monotonic()
        chosen = plan.chosen
        if self.servers is not None:
            groups = self._served(plan, iteration, self.servers, report)
        elif not chosen:
            return {}
        elif self.config.rollout.rollout_engine == "replay":
            groups = kept_by_rank_zero(lambda: self._replayed(chosen), {})
        else:
            requests: list[Request] = on_rank_zero(lambda: [self._request(i, iteration) for i in chosen])
            responses = self.policy.generate(requests, self._sampling)
            groups = kept_by_rank_zero(lambda: self._grouped(chosen, requests, responses, iteration), {})
        report.generate_s = time.monotonic() - began
        return self.policy.stop.kept_by_rank_zero(lambda: self._verified(groups, report), {})

    def _served(
        self, plan: Plan, iteration: int, servers: RolloutServers, report: RefreshReport
    ) -> dict[str, RolloutGroup]:
        """The servers' rollouts of a plan; with --rollout-lag 1 they are at the next plan when this returns."""
        if self._served_version is None:
            self._set_to_work(plan, iteration, servers, report)
        version, self._served_version = self._served_version, None
        assert version is not None
        servers.wait(self.policy.stop.check)

        def take() -> tuple[dict[str, RolloutGroup], dict[str, float]]:
            answers = servers.result()
            requests = [self._request(i, version) for i in plan.chosen]
            groups = self._grouped(plan.chosen, requests, answers.responses, version)
            for group in groups.values():
                for rollout in group.rollouts:
                    rollout.policy_age = iteration - version
            return {i: g for i, g in groups.items() if g.rollouts}, answers.report.values()

        nothing: tuple[dict[str, RolloutGroup], dict[str, float]] = ({}, {})
        groups, values = kept_by_rank_zero(take, nothing)
        report.served |= values
        upcoming = iteration + -(-len(plan.ids) // self.batch_size)
        if self.config.rollout.rollout_lag and upcoming < self.total_steps:
            self._ahead = self._plan(upcoming, report)
            self._set_to_work(self._ahead, iteration, servers, report)
        elif self.config.sync.sync_method == "tensor":
            servers.rest()
        return groups

    def _set_to_work(
        self, plan: Plan, iteration: int, servers: RolloutServers, report: RefreshReport
    ) -> None:
        """Bring the servers the weights of now, and have them sample a plan."""
        probes: list[TrainingSample] = kept_by_rank_zero(
            lambda: [self._demonstration_sample(i) for i in plan.ids[:_NUM_PROBES]], []
        )
        report.served |= servers.sync(iteration, probes, self.policy.stop)

        def start() -> None:
            requests = [self._request(i, iteration) for i in plan.chosen]
            servers.start(requests, self._sampling, iteration)

        on_rank_zero(start)
        self._served_version = iteration

    def _request(self, problem_id: str, iteration: int) -> Request:
        seed = self.config.rollout.rollout_seed
        seeds = [
            sample_seed(seed, problem_id, iteration, index) for index in range(self._sampling.num_samples)
        ]
        return Request(prompt_ids=list(self._by_id[problem_id].prompt_ids), seeds=seeds)

    def _grouped(
        self,
        chosen: list[str],
        requests: list[Request],
        responses: Sequence[Sequence[Response | None]],
        iteration: int,
    ) -> dict[str, RolloutGroup]:
        groups = {}
        for problem_id, request, answers in zip(chosen, requests, responses, strict=True):
            groups[problem_id] = RolloutGroup(
                problem_id=problem_id,
                rollouts=as_rollouts(problem_id, request, answers, iteration, self.decode),
            )
        return groups

    def _replayed(self, chosen: list[str]) -> dict[str, RolloutGroup]:
        assert self._replay is not None, "rank 0 of a run that replays has opened the stores"
        groups = {}
        for problem_id in chosen:
            known = self.curriculum.solvability.get(problem_id)
            rollouts = self._replay.take(
                problem_id, self._sampling.num_samples, 0 if known is None else known.num_refreshes
            )
            if rollouts:
                groups[problem_id] = RolloutGroup(problem_id=problem_id, rollouts=rollouts)
        return groups

    def _verified(self, groups: dict[str, RolloutGroup], report: RefreshReport) -> dict[str, RolloutGroup]:
        began = time.monotonic()
        rollouts = [r for group in groups.values() for r in group.rollouts]
        assert self.verifier is not None, "a run that samples has a verifier"
        checks = {i: self._by_id[i].check for i in groups}
        self.verifier.verify(rollouts, checks, self.policy.stop.check_here)
        for rollout in rollouts:
            rollout.filtered_by = first_failed_filter(rollout.text, self.config.verify)
        report.num_sampled = len(groups)
        report.verdicts = Counter(r.verdict or "unverifiable" for r in rollouts)
        report.num_filtered = sum(bool(r.filtered_by) for r in rollouts)
        report.num_solved = sum(group.num_correct > 0 for group in groups.values())
        report.mean_response_tokens = sum(len(r.response_ids) for r in rollouts) / max(1, len(rollouts))
        report.verify_s = time.monotonic() - began
        return groups

    def _weigh(
        self, ids: list[str], groups: dict[str, RolloutGroup], report: RefreshReport
    ) -> dict[str, list[TrainingSample]]:
        verify = self.config.verify
        curriculum = self.curriculum
        samples: dict[str, list[TrainingSample]] = {}
        for problem_id in ids:
            made = make_samples(
                self.config.objective.objective,
                self._by_id[problem_id],
                groups.get(problem_id),
                config=self.config.weighting,
                remembered=curriculum.remembered(problem_id),
                deduplicate=lambda texts: deduplicate(
                    texts, verify.verify_dedup_threshold, verify.verify_dedup_ngram
                ),
                similarity=lambda a, b: max_similarity(a, [b]),
            )
            samples[problem_id] = [s for s in made if s.response_ids and s.num_tokens <= self.max_tokens]
        # Also of a problem that was only probed: what was learnt about it counts when it is next trained.
        for problem_id, group in groups.items():
            curriculum.record(problem_id, *count_solved(group))
        if self.store is not None:
            self.store.append(r for group in groups.values() for r in group.rollouts)
        trained = [s for i in ids for s in samples[i]]
        for kind in ("demonstration", "rollout"):
            weights = [s.weight for s in trained if s.kind == kind]
            setattr(report, f"{kind}_weight", sum(weights) / len(weights) if weights else float("nan"))
        return samples

    def _attach_logprobs(self, samples: list[TrainingSample], iteration: int, report: RefreshReport) -> None:
        """Set the log-probabilities the objective needs; rank 0 has the samples."""
        objective = self.config.objective
        began = time.monotonic()
        if objective.needs_reference_logprobs():
            unknown: list[TrainingSample] = kept_by_rank_zero(lambda: self.cache.fill(samples), [])
            if on_rank_zero(lambda: len(unknown)):
                # Before the first update the policy is the reference: no weights to swap.
                logprobs = self.policy.score(unknown, with_reference=iteration > 0)
                on_rank_zero(lambda: self._remember(unknown, logprobs, samples))
        if objective.needs_old_logprobs() and on_rank_zero(lambda: len(samples)):
            old = self.policy.score(samples, with_reference=False)
            for sample, values in zip(samples, old, strict=True):
                sample.old_logprobs = values
        report.reference_s = time.monotonic() - began

    def _remember(
        self,
        unknown: list[TrainingSample],
        logprobs: Sequence[Sequence[float]],
        samples: list[TrainingSample],
    ) -> None:
        """Fill the cache, and from it every sample: several may have the content of one that was scored."""
        self.cache.add(unknown, logprobs)
        left = self.cache.fill(samples)
        assert not left, f"{len(left)} samples have no reference log-probabilities"

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a resumed run goes on from; rank 0 only."""
        if self._before is not None:
            return self._before
        return {
            "curriculum": self.curriculum.state_dict(),
            "ahead": None if self._ahead is None else asdict(self._ahead),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``, on every rank.

        What servers were sampling when it was taken is sampled again, from the weights of now.
        """
        self._ahead = None if state["ahead"] is None else Plan(**state["ahead"])
        on_rank_zero(lambda: self.curriculum.load_state_dict(state["curriculum"]))
