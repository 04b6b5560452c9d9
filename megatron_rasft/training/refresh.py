"""One refresh in a single process: which problems come next, what their rollouts are worth, what is trained on.

This module is plain Python: it needs neither torch nor Megatron nor another rank. refresh_driver.py calls it on
rank 0, joins it to the model and the rollout servers, and shows the order of the calls in a diagram.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched
from typing import Any, Protocol

from megatron_rasft.config import RasftConfig
from megatron_rasft.curriculum.curriculum import Curriculum
from megatron_rasft.data.tokenized_rows import ByProblem, fingerprint_of
from megatron_rasft.objective.groups import count_solved
from megatron_rasft.objective.guidance import Guidance
from megatron_rasft.objective.samples import make_samples
from megatron_rasft.objective.weighting import estimate_solvability, exchanged
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.types import (
    BatchSize,
    Check,
    Demonstration,
    Request,
    Response,
    Rollout,
    RolloutGroup,
    SamplingParams,
    TrainingSample,
)
from megatron_rasft.verify.text_quality import deduplicate, first_failed_filter, similarity

_NUM_PROBES = 4
"""Demonstrations on which the log-probabilities of servers and trainer are compared after a weight sync."""


class Verifier(Protocol):
    """Grades rollouts. In a run this is ``verify.pool.VerifierPool``."""

    def verify(
        self, rollouts: Sequence[Rollout], checks: Mapping[str, Check], look_up: Callable[[], None]
    ) -> Any:
        """Sets ``verdict`` of every rollout. Calls ``look_up`` at intervals; an exception from it ends the call."""


class ReferenceCache(Protocol):
    """Keeps log-probabilities under the reference. In a run this is ``training.reference.LogprobCache``."""

    def fill(self, samples: Iterable[TrainingSample]) -> list[TrainingSample]:
        """Sets ``ref_logprobs`` of the samples in the cache. Returns the others, without duplicates."""

    def add(self, samples: Iterable[TrainingSample], logprobs: Iterable[Sequence[float]]) -> None:
        """Stores the log-probabilities of these samples' responses."""


@dataclass(kw_only=True)
class ProblemChoice:
    """The problems of one refresh."""

    problem_ids: list[str]
    """Problems that the steps of this refresh train on."""
    sampled_ids: list[str]
    """Problems that get new rollouts: some of ``problem_ids``, and problems of the hard pool."""
    weight_version: int | None = None
    """Version (optimizer steps) of the weights that sample these problems; None until sampling has begun."""


class Refresh:
    """Makes the decisions of every refresh of a run, and keeps what a checkpoint needs to go on. Rank 0 only.

    One refresh is ``begin``, ``next_problems``, ``choose``, ``group`` (or ``replay``), ``verify``, ``weigh``, ``record``, ``end``.

    Args:
        demonstrations: all problems of the run.
        batch_size: problems per step.
        total_steps: steps of the whole run; they fix the curriculum's pace and the length of the last refresh.
        sampling: how responses are drawn; ``max_total_tokens`` also bounds the samples that are trained on.
        decode: token ids -> text.
        verifier: None if the run grades no rollouts.
        replay: the stored rollouts of --rollout-engine replay.
        store: stores every rollout; None if they are not stored.
        cache: log-probabilities under the reference; None if the objective has no reference.
        function_digest: identifies the code of --verify-function; "" without this flag.
    """

    def __init__(
        self,
        config: RasftConfig,
        demonstrations: Sequence[Demonstration],
        *,
        batch_size: int,
        total_steps: int,
        sampling: SamplingParams,
        decode: Callable[[list[int]], str],
        verifier: Verifier | None = None,
        replay: ReplayEngine | None = None,
        store: RolloutStore | None = None,
        cache: ReferenceCache | None = None,
        function_digest: str = "",
    ) -> None:
        self._config = config
        self._demonstrations = ByProblem(demonstrations, lambda d: d)
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._sampling = sampling
        self._decode = decode
        self._verifier = verifier
        self._replay = replay
        self._store = store
        self._cache = cache
        self._function_digest = function_digest
        self.curriculum = Curriculum(
            list(self._demonstrations),
            config.curriculum,
            seed=config.data.data_seed,
            memory=config.weighting.weighting_memory,
            content=fingerprint_of(demonstrations),
        )
        self._guidance = Guidance()
        self._ahead: ProblemChoice | None = None
        """With --rollout-lag 1: the next refresh's problems, which the servers are sampling."""
        self._state_at_start: dict[str, Any] | None = None
        """``state_dict()`` from before the refresh that is running. If it is interrupted, the resumed run repeats it."""

    @property
    def guidance(self) -> float:
        """``Guidance.confidence``; NaN without evidence."""
        confidence = self._guidance.confidence
        return math.nan if confidence is None else confidence

    # ---- begin and end, checkpoints

    def begin(self) -> None:
        """Begins a refresh. Until ``end``, ``state_dict`` returns the state from before it."""
        # next_problems advances the curriculum: a checkpoint that is written during the refresh needs the state from before.
        self._state_at_start = self.state_dict()

    def end(self, samples: Sequence[Sequence[TrainingSample]]) -> list[BatchSize]:
        """Ends the refresh. Returns the sizes of its batches, one per step.

        Args:
            samples: the samples of each problem.
        """
        self._state_at_start = None
        return [BatchSize.of(part) for part in batched(samples, self._batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the JSON values from which a resumed run continues."""
        if self._state_at_start is not None:
            return self._state_at_start
        ahead = self._ahead
        return {
            "curriculum": self.curriculum.state_dict(),
            "next_choice": None if ahead is None else [ahead.problem_ids, ahead.sampled_ids],
            "verify_function": self._function_digest,
            "guidance": self._guidance.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Continues from ``state_dict()``. Returns lines for the console about what differs from the run that made it.

        Responses that servers were sampling when it was taken are lost: the next refresh samples the same problems again, with
        the weights of the checkpoint.
        """
        self.curriculum.load_state_dict(state["curriculum"])
        self._guidance = Guidance(*state.get("guidance", ()))
        if state["next_choice"] is not None:
            problem_ids, sampled_ids = state["next_choice"]
            self._ahead = ProblemChoice(problem_ids=problem_ids, sampled_ids=sampled_ids)
        before, now = state.get("verify_function", ""), self._function_digest
        if before == now:
            return []
        return [
            f"warning: the code of --verify-function has changed since the checkpoint (sha256 {before or 'none'} -> "
            f"{now or 'none'}): the next rollouts are graded by the new code, and the earlier solve rates are kept"
        ]

    # ---- --rollout-lag 1

    def iteration_ahead(self, choice: ProblemChoice, iteration: int) -> int | None:
        """Returns the number of steps before the next refresh; None if that refresh is not sampled ahead.

        Args:
            choice: the problems of the refresh that began after ``iteration`` steps.
        """
        after = iteration + -(-len(choice.problem_ids) // self._batch_size)
        return after if self._config.rollout.rollout_lag and after < self._total_steps else None

    def keep_ahead(self, choice: ProblemChoice) -> None:
        """Keeps the problems of the next refresh, which servers are sampling."""
        self._ahead = choice

    def take_ahead(self) -> ProblemChoice | None:
        """Returns the problems that the previous refresh chose for this one; None if it chose none."""
        ahead, self._ahead = self._ahead, None
        return ahead

    # ---- choose

    def next_problems(self, iteration: int) -> list[str]:
        """The problems that are trained after ``iteration`` steps, until the next refresh or the end of the run."""
        num_steps = min(self._config.run.rasft_refresh_interval, max(1, self._total_steps - iteration))
        return self.curriculum.next_problems(self._batch_size * num_steps)

    def demonstration_samples(self, problem_ids: Iterable[str]) -> list[TrainingSample]:
        """The problems' demonstrations, with weight 1, to be scored."""
        return [
            TrainingSample(
                problem_id=problem_id,
                kind="demonstration",
                prompt_ids=self._demonstrations[problem_id].prompt_ids,
                response_ids=self._demonstrations[problem_id].response_ids,
                weight=1.0,
            )
            for problem_id in problem_ids
        ]

    def calibration_samples(self) -> list[TrainingSample]:
        """The demonstrations whose difficulties fix the curriculum's thresholds; [] once these are fixed."""
        is_calibrated = self.curriculum.thresholds is not None
        return [] if is_calibrated else self.demonstration_samples(self.curriculum.calibration_sample())

    def calibrate(self, difficulties: Mapping[str, float]) -> None:
        """Fixes the curriculum's thresholds with the difficulties of ``calibration_samples``, unless they are fixed already."""
        if self.curriculum.thresholds is None:
            self.curriculum.calibrate(difficulties.values())

    def choose(
        self, problem_ids: list[str], difficulties: Mapping[str, float], iteration: int
    ) -> ProblemChoice:
        """Chooses the problems to sample: some of ``problem_ids`` with --curriculum-mode band, otherwise all or none of them.

        Args:
            problem_ids: problems that are trained until the next refresh.
            difficulties: problem id -> mean cross-entropy of its demonstration, nats per token; read with band only.
            iteration: optimizer steps before the first step that trains on these problems.
        """
        if not self._config.samples_rollouts:
            return ProblemChoice(problem_ids=problem_ids, sampled_ids=[])
        if self._config.curriculum.curriculum_mode == "band":
            bands = self.curriculum.route(difficulties, iteration / self._total_steps)
        else:
            bands = dict.fromkeys(problem_ids, "middle")
        return ProblemChoice(problem_ids=problem_ids, sampled_ids=self.curriculum.choose_for_rollouts(bands))

    # ---- sample

    def probes(self, choice: ProblemChoice) -> list[TrainingSample]:
        """Demonstrations on which rollout servers are compared with the trainer after a weight sync."""
        return self.demonstration_samples(choice.problem_ids[:_NUM_PROBES])

    def requests(self, choice: ProblemChoice) -> list[Request]:
        """Each sampled problem's prompt, with a seed for each of its samples; then the same with the guides."""
        assert choice.weight_version is not None, "seeds depend on the weights that sample"
        num, num_guided = self._sampling.num_samples, self._config.num_guided_samples
        requests = [self._request(i, choice.weight_version, [], range(num)) for i in choice.sampled_ids]
        if num_guided:
            indices = range(num, num + num_guided)
            requests += [
                self._request(i, choice.weight_version, self._guide(i), indices) for i in choice.sampled_ids
            ]
        return requests

    def _request(
        self, problem_id: str, weight_version: int, guide: list[int], indices: Iterable[int]
    ) -> Request:
        seed = self._config.rollout.rollout_seed
        # Lists, because requests are pickled on their way to other ranks, and memoryviews of the row cache cannot be.
        return Request(
            prompt_ids=[*self._demonstrations[problem_id].prompt_ids, *guide],
            seeds=[sample_seed(seed, problem_id, weight_version, index) for index in indices],
        )

    def _guide(self, problem_id: str) -> list[int]:
        """The beginning of the demonstration that guided rollouts continue."""
        response = self._demonstrations[problem_id].response_ids
        return list(response[: max(1, int(self._config.rollout.rollout_guided_share * len(response)))])

    def group(
        self, choice: ProblemChoice, responses: Sequence[Sequence[Response | None]], iteration: int
    ) -> dict[str, RolloutGroup]:
        """Problem id -> its rollouts, not yet verified. Problems without any response are left out.

        Args:
            responses: of each request, in the order of its seeds; None where servers failed to deliver one.
            iteration: optimizer steps done at this refresh, for the rollouts' age.
        """
        weight_version = choice.weight_version
        assert weight_version is not None, "responses have been sampled with some weights"
        groups = {}
        num = len(choice.sampled_ids)
        guided = responses[num:] or [()] * num
        for problem_id, own, continued in zip(choice.sampled_ids, responses[:num], guided, strict=True):
            prompt_ids = list(self._demonstrations[problem_id].prompt_ids)
            group = RolloutGroup(
                problem_id=problem_id,
                rollouts=as_rollouts(problem_id, prompt_ids, own, weight_version, self._decode),
                guided=as_rollouts(
                    problem_id,
                    prompt_ids,
                    continued,
                    weight_version,
                    self._decode,
                    guide=self._guide(problem_id) if continued else [],
                    first_index=self._sampling.num_samples,
                ),
            )
            for rollout in group.all_rollouts:
                rollout.policy_age = iteration - weight_version
            if group.all_rollouts:
                groups[problem_id] = group
        return groups

    def replay(self, choice: ProblemChoice) -> dict[str, RolloutGroup]:
        """Takes the next stored rollouts of each sampled problem, so that every refresh gets new ones while the store has more."""
        assert self._replay is not None, "a run with --rollout-engine replay must have opened its stores"
        groups = {}
        for problem_id in choice.sampled_ids:
            visit = self._num_visits(problem_id)
            num, num_guided = self._sampling.num_samples, self._config.num_guided_samples
            group = RolloutGroup(
                problem_id=problem_id,
                rollouts=self._replay.take(problem_id, num, visit),
                guided=self._replay.take(problem_id, num_guided, visit, is_guided=True),
            )
            if group.all_rollouts:
                groups[problem_id] = group
        return groups

    def _num_visits(self, problem_id: str) -> int:
        """How many refreshes have sampled the problem before. Without verdicts there is no record, but each epoch is a visit."""
        if not self._config.grades_rollouts:
            return self.curriculum.epoch
        known = self.curriculum.solvability.get(problem_id)
        return 0 if known is None else known.num_refreshes

    # ---- verify

    def verify(self, groups: Mapping[str, RolloutGroup], look_up: Callable[[], None] = lambda: None) -> None:
        """Sets each rollout's verdict, and the name of the text filter that removes it, if any.

        Does nothing for an objective that needs no verdicts.

        Args:
            look_up: called at intervals; an exception from it ends the call.
        """
        if not groups or not self._config.grades_rollouts:
            return
        assert self._verifier is not None, "a run that grades rollouts needs a verifier"
        rollouts = [rollout for group in groups.values() for rollout in group.all_rollouts]
        checks = {problem_id: self._demonstrations[problem_id].check for problem_id in groups}
        self._verifier.verify(rollouts, checks, look_up)
        for rollout in rollouts:
            is_mathematics = isinstance(checks[rollout.problem_id], str)
            rollout.filtered_by = first_failed_filter(
                rollout.text, self._config.verify, is_mathematics=is_mathematics
            )

    # ---- weigh

    def weigh(
        self, problem_ids: Iterable[str], groups: Mapping[str, RolloutGroup]
    ) -> list[list[TrainingSample]]:
        """Returns the weighted training samples of each problem, without samples that are too long or have no response.

        Call it once in a refresh: it also adds the guided rollouts to the evidence about imitation.
        """
        problem_ids = list(problem_ids)
        config = self._config.weighting
        self._guidance.add(groups.values(), config.weighting_memory, config.weighting_guidance_solved)
        borrowed = self._borrowed(problem_ids, groups) if self._config.weighting.weighting_placebo else {}
        return [self._weighed(i, groups.get(i), borrowed.get(i)) for i in problem_ids]

    def _borrowed(self, problem_ids: Iterable[str], groups: Mapping[str, RolloutGroup]) -> dict[str, float]:
        """Problem -> the solvability of another problem of the refresh, for those with any evidence."""
        own = {i: self._solvability(i, groups.get(i)) for i in problem_ids}
        known = {i: s for i, s in own.items() if s is not None}
        return exchanged(known, f"placebo {self._config.data.data_seed} {self.curriculum.refresh}")

    def _solvability(self, problem_id: str, group: RolloutGroup | None) -> float | None:
        counts: tuple[float, int] = (0, 0) if group is None else count_solved(group.rollouts)
        remembered = self.curriculum.remembered(problem_id)
        return estimate_solvability(*counts, self._config.weighting, remembered)

    def _weighed(
        self, problem_id: str, group: RolloutGroup | None, borrowed: float | None
    ) -> list[TrainingSample]:
        verify = self._config.verify
        texts: dict[str, Any] = {
            "n": verify.verify_dedup_ngram,
            "short_texts": verify.verify_dedup_short_texts,
        }
        return make_samples(
            self._config.objective,
            self._demonstrations[problem_id],
            group,
            config=self._config.weighting,
            remembered=self.curriculum.remembered(problem_id),
            deduplicate=partial(deduplicate, threshold=verify.verify_dedup_threshold, **texts),
            similarity=partial(similarity, **texts),
            max_tokens=self._sampling.max_total_tokens,
            borrowed=borrowed,
            guidance=self._guidance.confidence,
        )

    def record(self, groups: Mapping[str, RolloutGroup]) -> None:
        """Adds the rollouts to the curriculum's memory and to the store.

        Call it after ``weigh``, which combines this refresh's rollouts with the memory of earlier refreshes.
        """
        # Problems of the hard pool that this refresh does not train are recorded too, for when they are trained.
        for problem_id, group in groups.items() if self._config.grades_rollouts else ():
            self.curriculum.record(problem_id, *count_solved(group.rollouts))
        if self._store is not None:
            self._store.append(rollout for group in groups.values() for rollout in group.all_rollouts)

    # ---- score under the reference and the teacher

    def count_too_long(self, groups: Mapping[str, RolloutGroup]) -> int:
        """Number of rollouts that are not trained on because they exceed the sequence length after the teacher's prompt."""
        longest = self._sampling.max_total_tokens
        if longest is None or self._config.objective.teacher() is None:
            return 0
        return sum(
            len(self._demonstrations[problem_id].teacher_prompt_ids) + len(rollout.response_ids) > longest
            for problem_id, group in groups.items()
            for rollout in group.rollouts
        )

    def teacher_samples(self, samples: Iterable[TrainingSample]) -> list[TrainingSample]:
        """The samples' responses after the teacher's prompts, to be scored."""
        return [replace(s, prompt_ids=self._demonstrations[s.problem_id].teacher_prompt_ids) for s in samples]

    def fill_reference(self, samples: Iterable[TrainingSample]) -> list[TrainingSample]:
        """Sets the cached reference log-probabilities. Returns the samples still to be scored, without duplicates."""
        assert self._cache is not None, "a run whose objective has a reference needs the cache"
        return self._cache.fill(samples)

    def add_reference(
        self,
        samples: Sequence[TrainingSample],
        scored: Sequence[TrainingSample],
        logprobs: Sequence[Sequence[float]],
    ) -> None:
        """Adds new log-probabilities to the cache and sets them in all samples, including samples with equal tokens."""
        if not scored:
            return
        assert self._cache is not None, "a run whose objective has a reference needs the cache"
        self._cache.add(scored, logprobs)
        missing = self._cache.fill(samples)
        assert not missing, f"{len(missing)} samples have no reference log-probabilities"


def difficulties(samples: Iterable[TrainingSample], logprobs: Iterable[Sequence[float]]) -> dict[str, float]:
    """Problem id -> mean cross-entropy of its demonstration, nats per token."""
    return {s.problem_id: -sum(v) / max(1, len(v)) for s, v in zip(samples, logprobs, strict=True)}


def as_rollouts(
    problem_id: str,
    prompt_ids: list[int],
    responses: Sequence[Response | None],
    weight_version: int,
    decode: Callable[[list[int]], str],
    guide: Sequence[int] = (),
    first_index: int = 0,
) -> list[Rollout]:
    """One problem's responses as rollouts that are not yet verified; a missing response (None) gives none."""
    return [
        Rollout(
            problem_id=problem_id,
            sample_index=index,
            weight_version=weight_version,
            prompt_ids=prompt_ids,
            response_ids=[*guide, *response.token_ids],
            response_logprobs=response.logprobs,
            finish_reason=response.finish_reason,
            text=decode([*guide, *response.token_ids]),
            num_guide_tokens=len(guide),
        )
        for index, response in enumerate(responses, first_index)
        if response is not None
    ]


def sampling_params(config: RasftConfig, stop_ids: frozenset[int], max_total_tokens: int) -> SamplingParams:
    """How a run draws its rollouts of the prompt alone.

    Args:
        stop_ids: token ids that end a response.
        max_total_tokens: maximum length of prompt plus response: the trainer's sequence length.
    """
    rollout = config.rollout
    return SamplingParams(
        num_samples=rollout.rollout_num_samples - config.num_guided_samples,
        max_new_tokens=rollout.rollout_max_new_tokens,
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        repetition_penalty=rollout.rollout_repetition_penalty,
        stop_ids=stop_ids,
        max_batch_size=rollout.rollout_batch_size,
        max_total_tokens=max_total_tokens,
    )
