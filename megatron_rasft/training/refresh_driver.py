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
                        collects responses <------------------------------- sleep (2)
    verify              sends rollouts -----------------------------------------------------------> grades in
                        sets verdicts <------------------------------------------------------------ processes
                        filters texts                                                               of rank 0
    weigh               weights of demonstrations
                        and rollouts; records them
    score_reference     has the samples        ---> score them (3)
    train_step          hands batches out      ---> train steps k+1 .. k+n

    (1) --curriculum-mode band only.
    (2) Servers on the trainer's own GPUs (--sync-method tensor) free their memory for the training steps.
    (3) Objectives with a reference or with old log-probabilities only.

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

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from megatron_rasft.config import RasftConfig
from megatron_rasft.ranks import kept_by_rank_zero, on_rank_zero
from megatron_rasft.training.policy import Policy
from megatron_rasft.training.refresh import ProblemChoice, Refresh, difficulties
from megatron_rasft.training.refresh_report import RefreshReport
from megatron_rasft.training.rollout_servers import RolloutServers
from megatron_rasft.training.samples import BatchQueue, SampleArrays
from megatron_rasft.types import Request, RolloutGroup, SamplingParams, TrainingSample

Groups = Mapping[str, RolloutGroup]
"""Problem id -> rollouts of the problem; empty on ranks other than 0."""

Samples = Sequence[Sequence[TrainingSample]]
"""The training samples of each problem; empty on ranks other than 0."""


class RefreshDriver:
    """Runs the refreshes of a run. Every method is a collective of the world unless it says otherwise.

    Args:
        refresh: makes the decisions on rank 0; None on other ranks.
        policy: scores and samples with the model.
        servers: None if rollouts are not sampled by servers.
        sampling: how responses are drawn.
        batch_size: problems per step.
        total_steps: steps of the whole run.
    """

    def __init__(
        self,
        config: RasftConfig,
        refresh: Refresh | None,
        *,
        policy: Policy,
        servers: RolloutServers | None,
        sampling: SamplingParams,
        batch_size: int,
        total_steps: int,
    ) -> None:
        self._config = config
        self._refresh_on_rank_zero = refresh
        self._policy = policy
        self._servers = servers
        self._sampling = sampling
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._iteration = 0
        self._report = RefreshReport()
        self._next_choice: ProblemChoice | None = None
        """With --rollout-lag 1: the next refresh's problems, which the servers are sampling."""
        self._state_at_start: dict[str, Any] | None = None
        """``state_dict()`` from before the refresh that is running. If it is interrupted, the resumed run repeats it."""

    @property
    def _refresh(self) -> Refresh:
        assert self._refresh_on_rank_zero is not None, "only rank 0 decides"
        return self._refresh_on_rank_zero

    def start(self, iteration: int) -> None:
        """Begins a refresh after ``iteration`` optimizer steps, which are also the version of the weights.

        Raises:
            Stopped: the run is to stop. The methods below raise it too; ``state_dict()`` then returns the state at the start of
                the refresh.
        """
        self._policy.stop.check()
        # choose_problems advances the curriculum: a checkpoint that is written during the refresh needs the state from before.
        self._state_at_start = None if self._refresh_on_rank_zero is None else self.state_dict()
        self._iteration = iteration
        self._report = RefreshReport()

    # ---- choose problems

    def choose_problems(self) -> ProblemChoice:
        """Chooses the problems of this refresh, unless the previous refresh has chosen them (--rollout-lag 1)."""
        choice = self._next_choice or self._choose(self._iteration)
        self._next_choice = None
        self._report.num_problems = len(choice.problem_ids)
        return choice

    def _choose(self, iteration: int) -> ProblemChoice:
        """The problems of the refresh that begins after ``iteration`` steps, the same on every rank."""
        problem_ids: list[str] = on_rank_zero(lambda: self._refresh.next_problems(iteration))
        if not self._config.samples_rollouts:
            return ProblemChoice(problem_ids=problem_ids, sampled_ids=[])
        if self._config.curriculum.curriculum_mode != "band":
            sampled = on_rank_zero(lambda: self._refresh.choose_for_rollouts(problem_ids))
            return ProblemChoice(problem_ids=problem_ids, sampled_ids=sampled)
        began = time.monotonic()
        self._calibrate()
        scored = self._difficulties(
            kept_by_rank_zero(lambda: self._refresh.demonstration_samples(problem_ids), [])
        )
        self._report.mean_difficulty = sum(scored.values()) / max(1, len(scored))
        self._report.score_s = time.monotonic() - began
        sampled = on_rank_zero(lambda: self._refresh.choose_by_difficulty(scored, iteration))
        return ProblemChoice(problem_ids=problem_ids, sampled_ids=sampled)

    def _calibrate(self) -> None:
        """Fixes the curriculum's thresholds with the policy of the first refresh."""
        samples: list[TrainingSample] = kept_by_rank_zero(lambda: self._refresh.calibration_samples(), [])
        if on_rank_zero(lambda: len(samples)):
            scored = self._difficulties(samples)
            on_rank_zero(lambda: self._refresh.curriculum.calibrate(scored.values()))

    def _difficulties(self, samples: list[TrainingSample]) -> dict[str, float]:
        """Problem id -> difficulty under the current policy, on rank 0; {} on the others."""
        logprobs = self._policy.score(samples, with_reference=False)
        return difficulties(samples, logprobs)

    # ---- sync weights

    def sync_weights(self, choice: ProblemChoice) -> None:
        """Sends the trainer's weights to the rollout servers, unless these are sampling ``choice`` already."""
        if self._servers is None or choice.weight_version is not None:
            return
        with self._timed_as_generate():
            probes: list[TrainingSample] = kept_by_rank_zero(lambda: self._refresh.probes(choice), [])
            self._report.servers |= self._servers.sync(self._iteration, probes, self._policy.stop)

    # ---- sample

    def sample(self, choice: ProblemChoice) -> Groups:
        """Collects this refresh's rollouts, not yet verified."""
        with self._timed_as_generate():
            if self._servers is not None:
                return self._sample_with_servers(choice, self._servers)
            if not choice.sampled_ids:
                return {}
            if self._config.rollout.rollout_engine == "replay":
                return kept_by_rank_zero(lambda: self._refresh.replay(choice.sampled_ids), {})
            return self._sample_with_trainer(choice.sampled_ids)

    def _sample_with_trainer(self, problem_ids: list[str]) -> Groups:
        version = self._iteration
        requests: list[Request] = on_rank_zero(lambda: self._refresh.requests(problem_ids, version))
        responses = self._policy.generate(requests, self._sampling)
        return kept_by_rank_zero(
            lambda: self._refresh.group(problem_ids, responses, weight_version=version, iteration=version), {}
        )

    def _sample_with_servers(self, choice: ProblemChoice, servers: RolloutServers) -> Groups:
        self._start_servers(choice, servers)
        servers.wait(self._policy.stop.check)

        def collect() -> Groups:
            answers = servers.result()
            self._report.servers |= answers.report.values()
            assert choice.weight_version is not None, "the servers have started"
            return self._refresh.group(
                choice.sampled_ids,
                answers.responses,
                weight_version=choice.weight_version,
                iteration=self._iteration,
            )

        groups: Groups = kept_by_rank_zero(collect, {})
        # Servers that will sample ahead next need their memory.
        if self._next_iteration(choice) is None and self._config.sync.sync_method == "tensor":
            servers.sleep()
        return groups

    def _start_servers(self, choice: ProblemChoice, servers: RolloutServers) -> None:
        """Starts the servers on ``choice`` with the weights of the last sync, unless they are sampling it already."""
        if choice.weight_version is not None:
            return
        version = choice.weight_version = self._iteration
        on_rank_zero(
            lambda: servers.start(
                self._refresh.requests(choice.sampled_ids, version), self._sampling, version
            )
        )

    # ---- --rollout-lag 1

    def sample_ahead(self, choice: ProblemChoice) -> None:
        """With --rollout-lag 1, starts the servers on the next refresh's problems; they sample while ``choice`` is trained."""
        iteration = self._next_iteration(choice)
        if iteration is None:
            return
        assert self._servers is not None, "--rollout-lag 1 needs servers"
        with self._timed_as_generate():
            upcoming = self._choose(iteration)
            self.sync_weights(upcoming)
            self._start_servers(upcoming, self._servers)
            self._next_choice = upcoming

    def _next_iteration(self, choice: ProblemChoice) -> int | None:
        """Returns the number of steps before the next refresh; None if that refresh is not sampled ahead."""
        iteration = self._iteration + -(-len(choice.problem_ids) // self._batch_size)
        is_ahead = self._servers is not None and self._config.rollout.rollout_lag
        return iteration if is_ahead and iteration < self._total_steps else None

    # ---- verify, weigh

    def verify(self, groups: Groups) -> None:
        """Sets the rollouts' verdicts and marks bad texts. The other ranks wait for rank 0."""
        stop = self._policy.stop

        def work() -> None:
            began = time.monotonic()
            if groups:
                self._refresh.verify(groups, stop.check_here)
            self._report.count_rollouts(groups.values())
            self._report.verify_s = time.monotonic() - began

        stop.on_rank_zero(work)

    def weigh(self, choice: ProblemChoice, groups: Groups) -> Samples:
        """Turns demonstrations and rollouts into weighted training samples, and records the rollouts."""

        def work() -> Samples:
            samples = self._refresh.weigh(choice.problem_ids, groups)
            self._refresh.record(groups)
            self._report.average_weights(chain.from_iterable(samples))
            return samples

        return kept_by_rank_zero(work, [])

    # ---- score under the reference

    def score_reference(self, samples: Samples) -> None:
        """Sets the log-probabilities that the objective needs: under the frozen reference, and under the current policy."""
        objective = self._config.objective
        flat = list(chain.from_iterable(samples))
        began = time.monotonic()
        if objective.needs_reference_logprobs():
            self._set_reference_logprobs(flat)
        if objective.needs_old_logprobs() and on_rank_zero(lambda: len(flat)):
            old = self._policy.score(flat, with_reference=False)
            for sample, values in zip(flat, old, strict=True):
                sample.old_logprobs = values
        self._report.reference_s = time.monotonic() - began

    def _set_reference_logprobs(self, samples: list[TrainingSample]) -> None:
        unknown: list[TrainingSample] = kept_by_rank_zero(lambda: self._refresh.fill_reference(samples), [])
        if on_rank_zero(lambda: len(unknown)):
            # Before the first step the policy is the reference: the weights need not be swapped.
            logprobs = self._policy.score(unknown, with_reference=self._iteration > 0)
            on_rank_zero(lambda: self._refresh.add_reference(samples, unknown, logprobs))

    # ---- finish

    def finish(self, samples: Samples) -> tuple[BatchQueue, RefreshReport]:
        """Ends the refresh. Returns its report and its batches on every rank; only rank 0 has the samples."""
        sizes: list[tuple[int, int]] = on_rank_zero(lambda: self._refresh.batch_sizes(samples))
        # The report goes to every rank, because the trackers' writers are on the last rank.
        report: RefreshReport = on_rank_zero(lambda: self._report)
        arrays = kept_by_rank_zero(lambda: SampleArrays.of(list(chain.from_iterable(samples))), None)
        self._state_at_start = None
        return BatchQueue(sizes, arrays), report

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns the JSON values from which a resumed run continues. Rank 0 only, not a collective."""
        if self._state_at_start is not None:
            return self._state_at_start
        ahead = self._next_choice
        return {
            "curriculum": self._refresh.curriculum.state_dict(),
            "next_choice": None if ahead is None else [ahead.problem_ids, ahead.sampled_ids],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()``.

        Responses that servers were sampling when it was taken are lost: the next refresh samples the same problems again, with
        the weights of the checkpoint.
        """
        if state["next_choice"] is not None:
            problem_ids, sampled_ids = state["next_choice"]
            self._next_choice = ProblemChoice(problem_ids=problem_ids, sampled_ids=sampled_ids)
        on_rank_zero(lambda: self._refresh.curriculum.load_state_dict(state["curriculum"]))

    @contextmanager
    def _timed_as_generate(self) -> Iterator[None]:
        began, before = time.monotonic(), self._report.generate_s
        try:
            yield
        finally:
            # Assigned, not added: sample_ahead calls sync_weights, which measures a part of the same time.
            self._report.generate_s = before + time.monotonic() - began
