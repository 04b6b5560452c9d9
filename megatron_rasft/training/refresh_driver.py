"""One refresh on all ranks: joins rank 0's decisions (refresh.py) to the model and the rollout servers.

pretrain_rasft.py calls the methods of ``RefreshDriver`` in the order of the diagrams. All ranks call them together. Rank 0 decides,
grades and keeps rollouts and samples; the other ranks only help to compute.

Who does what in a refresh after k steps, which is followed by n steps (with --rollout-lag 0):

    pretrain_rasft.py   rank 0                      all trainer ranks       rollout servers       verifier
    -----------------   -------------------------   ---------------------   -------------------   -------------
    choose_problems     draws problems         ---> score difficulties (1)
                        chooses some for rollouts
    sync_weights                                    send the weights   ---> load weights k
    sample              sends prompts and seeds --------------------------> sample with weights k
                        collects responses <------------------------------- return them
    sample_ahead                                                            sleep (2)
    verify              sends rollouts -----------------------------------------------------------> grades in
                        sets verdicts <------------------------------------------------------------ processes
                        filters texts                                                               of rank 0
    weigh               weights of demonstrations
                        and rollouts; records them
    score_reference     has the samples        ---> score them (3)
    train_step          hands batches out      ---> train steps k+1 .. k+n

    (1) --curriculum-mode band only.
    (2) Servers on the trainer's own GPUs (--sync-method tensor) free their memory for the training steps.
    (3) Objectives with a reference, with old log-probabilities or with a teacher only.

Who waits for whom. A, B and C are the problems of three refreshes; a column ends when everything in it has finished:

    --rollout-lag 0: the servers sample while the trainer waits, and are idle while it trains.

    trainer ranks  | choose A | sync 0 | wait     | wait    | weigh, score A | train A    | choose B | sync n | wait     | ...
    servers        |          | load 0 | sample A |         |                |            |          | load n | sample B | ...
    verifier       |          |        |          | grade A |                |            |          |        |          | ...

    --rollout-lag 1: the servers sample B while the trainer trains A. If they have finished by then, it does not wait for B.

    trainer ranks  | choose A | sync 0 | wait     | choose B | wait    | weigh, score A | train A    | wait | choose C | ...
    servers        |          | load 0 | sample A |          | sample B ................................... |          | ...
    verifier       |          |        |          |          | grade A |                |            |      |          | ...

    Servers that have the weights already are not sent them again: only the first refresh samples twice with the same ones.
    Later rollouts were sampled with weights one refresh older than those that train on them (``Rollout.policy_age``).

Without servers, sync_weights does nothing and ``sample`` uses the trainer's own weights, or the store of --rollout-engine replay.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain

from megatron_rasft.config import RasftConfig
from megatron_rasft.data.sample_arrays import BatchQueue, SampleArrays
from megatron_rasft.monitoring import live, stalls
from megatron_rasft.objective.declaration import Teacher
from megatron_rasft.ranks import kept_by_rank_zero, on_rank_zero
from megatron_rasft.training.policy import Policy
from megatron_rasft.training.refresh import ProblemChoice, Refresh, difficulties
from megatron_rasft.training.refresh_report import RefreshReport
from megatron_rasft.training.rollout_servers import RolloutServers
from megatron_rasft.types import BatchSize, Request, RolloutGroup, SamplingParams, TrainingSample

Groups = Mapping[str, RolloutGroup]
"""Problem id -> rollouts of the problem; empty on ranks other than 0."""

Samples = Sequence[Sequence[TrainingSample]]
"""The training samples of each problem; empty on ranks other than 0."""


class RefreshDriver:
    """Runs the refreshes of a run. Every method is a collective of the world, and may raise Stopped.

    Args:
        decisions: makes the decisions on rank 0; None on other ranks.
        policy: scores and samples with the model.
        servers: None if rollouts are not sampled by servers.
        sampling: how responses are drawn.
    """

    def __init__(
        self,
        config: RasftConfig,
        decisions: Refresh | None,
        *,
        policy: Policy,
        servers: RolloutServers | None,
        sampling: SamplingParams,
    ) -> None:
        self._config = config
        self._decisions = decisions
        self._policy = policy
        self._servers = servers
        self._sampling = sampling
        self._iteration = 0
        self._report = RefreshReport()

    @property
    def decisions(self) -> Refresh:
        """The decisions of the run's refreshes, with their state for checkpoints. Rank 0 only."""
        assert self._decisions is not None, "only rank 0 decides"
        return self._decisions

    def start(self, iteration: int) -> None:
        """Begins a refresh after ``iteration`` optimizer steps, which are also the version of the weights."""
        self._policy.stop.check()
        self._iteration = iteration
        self._report = RefreshReport()
        on_rank_zero(lambda: self.decisions.begin())

    @stalls.phase("choose")
    def choose_problems(self) -> ProblemChoice:
        """Chooses the problems of this refresh, unless the previous refresh has chosen them (--rollout-lag 1)."""
        ahead: ProblemChoice | None = on_rank_zero(lambda: self.decisions.take_ahead())
        choice = ahead or self._choose(self._iteration)
        self._report.num_problems = len(choice.problem_ids)
        return choice

    def _choose(self, iteration: int) -> ProblemChoice:
        """The problems of the refresh that begins after ``iteration`` steps, the same on every rank."""
        problem_ids: list[str] = on_rank_zero(lambda: self.decisions.next_problems(iteration))
        scored: dict[str, float] = {}
        if self._config.samples_rollouts and self._config.curriculum.curriculum_mode == "band":
            with self._report.timed("score_s"):
                scored = self._score_difficulties(problem_ids)
            self._report.mean_difficulty = sum(scored.values()) / max(1, len(scored))
        return on_rank_zero(lambda: self.decisions.choose(problem_ids, scored, iteration))

    def _score_difficulties(self, problem_ids: list[str]) -> dict[str, float]:
        """Problem id -> difficulty under the current policy, on rank 0. The first call fixes the curriculum's thresholds."""
        samples: list[TrainingSample] = kept_by_rank_zero(lambda: self.decisions.calibration_samples(), [])
        scored = difficulties(samples, self._policy.score(samples, with_reference=False))
        on_rank_zero(lambda: self.decisions.calibrate(scored))
        samples = kept_by_rank_zero(lambda: self.decisions.demonstration_samples(problem_ids), [])
        return difficulties(samples, self._policy.score(samples, with_reference=False))

    @stalls.phase("sync")
    def sync_weights(self, choice: ProblemChoice) -> None:
        """Sends the trainer's weights to the rollout servers, unless these are sampling ``choice`` already."""
        if self._servers is None or choice.weight_version is not None:
            return
        with self._report.timed("generate_s"):
            probes: list[TrainingSample] = kept_by_rank_zero(lambda: self.decisions.probes(choice), [])
            self._report.servers |= self._servers.sync(self._iteration, probes, self._policy.stop)

    @stalls.phase("sample")
    def sample(self, choice: ProblemChoice) -> Groups:
        """Collects this refresh's rollouts, not yet verified."""
        with self._report.timed("generate_s"):
            if self._servers is not None:
                return self._sample_with_servers(choice, self._servers)
            if not choice.sampled_ids:
                return {}
            if self._config.rollout.rollout_engine == "replay":
                return kept_by_rank_zero(lambda: self.decisions.replay(choice), {})
            return self._sample_with_trainer(choice)

    def _sample_with_trainer(self, choice: ProblemChoice) -> Groups:
        choice.weight_version = self._iteration
        requests: list[Request] = on_rank_zero(lambda: self.decisions.requests(choice))
        responses = self._policy.generate(requests, self._sampling)
        return kept_by_rank_zero(lambda: self.decisions.group(choice, responses, self._iteration), {})

    def _sample_with_servers(self, choice: ProblemChoice, servers: RolloutServers) -> Groups:
        def collect() -> Groups:
            answers = servers.result()
            self._report.servers |= answers.report.values()
            return self.decisions.group(choice, answers.responses, self._iteration)

        self._start_servers(choice, servers)
        servers.wait(self._policy.stop.check)
        return kept_by_rank_zero(collect, {})

    def _start_servers(self, choice: ProblemChoice, servers: RolloutServers) -> None:
        """Starts the servers on ``choice`` with the weights of the last sync, unless they are sampling it already."""
        if choice.weight_version is None:
            version = choice.weight_version = self._iteration
            on_rank_zero(lambda: servers.start(self.decisions.requests(choice), self._sampling, version))

    @stalls.phase("sample")
    def sample_ahead(self, choice: ProblemChoice) -> None:
        """With --rollout-lag 1, starts the servers on the next refresh's problems; they sample while ``choice`` is trained.

        Otherwise, servers on the trainer's own GPUs free their memory.
        """
        if self._servers is None:
            return
        with self._report.timed("generate_s"):
            iteration: int | None = on_rank_zero(
                lambda: self.decisions.iteration_ahead(choice, self._iteration)
            )
            if iteration is not None:
                ahead = self._choose(iteration)
                self.sync_weights(ahead)
                self._start_servers(ahead, self._servers)
                on_rank_zero(lambda: self.decisions.keep_ahead(ahead))
            elif self._config.sync.sync_method == "tensor":
                self._servers.sleep()

    @stalls.phase("verify")
    def verify(self, groups: Groups) -> None:
        """Sets the rollouts' verdicts and marks bad texts, if the objective needs it. The other ranks wait for rank 0."""
        stop = self._policy.stop
        rollouts = [rollout for group in groups.values() for rollout in group.all_rollouts]
        shown = live.verifying(rollouts) if self._config.grades_rollouts else nullcontext()
        with self._report.timed("verify_s"), shown:
            stop.on_rank_zero(lambda: self.decisions.verify(groups, stop.check_here))
        # Slurm sends a signal to the grading processes too. Their last verdicts then say that they crashed, and must not be trained on.
        stop.check()
        self._report.count_rollouts(groups.values(), are_graded=self._config.grades_rollouts)

    @stalls.phase("weigh")
    def weigh(self, choice: ProblemChoice, groups: Groups) -> Samples:
        """Turns demonstrations and rollouts into weighted training samples, and records the rollouts."""
        samples: Samples = kept_by_rank_zero(lambda: self.decisions.weigh(choice.problem_ids, groups), [])
        on_rank_zero(lambda: self.decisions.record(groups))
        self._report.guidance = kept_by_rank_zero(lambda: self.decisions.guidance, math.nan)
        self._report.count_samples(samples)
        self._report.num_too_long = kept_by_rank_zero(lambda: self.decisions.count_too_long(groups), 0)
        return samples

    @stalls.phase("score")
    def score_reference(self, samples: Samples) -> None:
        """Sets the log-probabilities that the objective needs: under the frozen reference, the current policy and the teacher."""
        objective, flat = self._config.objective, _computed(samples)
        with self._report.timed("reference_s"):
            if objective.needs_reference_logprobs():
                self._set_reference_logprobs(flat)
            if objective.needs_old_logprobs():
                old = self._policy.score(flat, with_reference=False)
                for sample, values in zip(flat, old, strict=True):
                    sample.old_logprobs = values
            if (teacher := objective.teacher()) is not None:
                self._set_teacher_logprobs(flat, teacher)

    def _set_teacher_logprobs(self, samples: list[TrainingSample], teacher: Teacher) -> None:
        asked: list[TrainingSample] = kept_by_rank_zero(lambda: self.decisions.teacher_samples(samples), [])
        if teacher.is_reference:
            self._set_reference_logprobs(asked)
            for sample, scored in zip(samples, asked, strict=True):
                sample.teacher_logprobs = scored.ref_logprobs
        else:
            values = self._policy.score(asked, with_reference=False)
            for sample, logprobs in zip(samples, values, strict=True):
                sample.teacher_logprobs = logprobs

    def _set_reference_logprobs(self, samples: list[TrainingSample]) -> None:
        unknown: list[TrainingSample] = kept_by_rank_zero(lambda: self.decisions.fill_reference(samples), [])
        # Before the first step the policy is the reference: the weights need not be swapped.
        logprobs = self._policy.score(unknown, with_reference=self._iteration > 0)
        on_rank_zero(lambda: self.decisions.add_reference(samples, unknown, logprobs))

    def finish(self, samples: Samples) -> tuple[BatchQueue, RefreshReport]:
        """Ends the refresh. Returns its report and its batches on every rank; only rank 0 has the samples."""
        sizes: list[BatchSize] = on_rank_zero(lambda: self.decisions.end(samples))
        # The report goes to every rank, because the trackers' writers are on the last rank.
        report: RefreshReport = on_rank_zero(lambda: self._report)
        arrays = kept_by_rank_zero(lambda: SampleArrays.of(_computed(samples)), None)
        return BatchQueue(sizes, arrays), report


def _computed(samples: Samples) -> list[TrainingSample]:
    """The samples that go through the model."""
    return [sample for sample in chain.from_iterable(samples) if sample.is_computed]
