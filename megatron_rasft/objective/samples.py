"""The sequences that one problem contributes to training. Plain Python: rank 0 calls this once per problem."""

import math
from collections.abc import Mapping

from megatron_rasft.objective.declaration import (
    Deduplicate,
    Objective,
    SampledProblem,
    Similarity,
)
from megatron_rasft.objective.groups import distinct_texts, is_attempt
from megatron_rasft.objective.weighting import WeightingConfig
from megatron_rasft.types import Demonstration, RolloutGroup, TrainingSample


def make_samples(
    objective: Objective,
    demonstration: Demonstration,
    group: RolloutGroup | None = None,
    *,
    config: WeightingConfig,
    remembered: tuple[float, float] | None = None,
    deduplicate: Deduplicate = distinct_texts,
    similarity: Similarity | None = None,
    max_tokens: int | None = None,
    borrowed: float | None = None,
    guidance: float | None = None,
) -> list[TrainingSample]:
    """The weighted sequences of one problem, demonstration first; possibly none.

    Writes the weight of every rollout of ``group`` into ``rollout.weight``. A rollout that was aborted, is empty or whose
    grading timed out is never trained on, and a response cut by the length limit never counts as correct.

    Args:
        remembered: (solve rate, number of samples) of earlier refreshes, discounted; adaptive rasft only.
        borrowed: another problem's solvability, which replaces this problem's own; adaptive rasft only.
        guidance: ``Guidance.confidence``; adaptive rasft only.
        deduplicate: finds distinct texts; rasft and raft only.
        similarity: compares two texts; published rasft only.
        max_tokens: longest sequence that can be trained on, prompt and response; None for no limit. Longer ones are left out, and so
            are responses that exceed it after the teacher's prompt. With
            --weighting-normalization problem a problem whose demonstration is left out is not trained on at all.
    """
    if group is not None:
        _check_group(demonstration, group, needs_verdicts=objective.needs_verdicts)
    weights = objective.weigh(
        SampledProblem(
            group=group,
            weighting=config,
            remembered=remembered,
            deduplicate=deduplicate,
            similarity=similarity,
            borrowed=borrowed,
            guidance=guidance,
        )
    )
    rollouts = [] if group is None else group.rollouts
    longest = math.inf if max_tokens is None else max_tokens - demonstration.longest_prompt
    lengths = {i: len(rollouts[i].response_ids) for i in weights.rollouts}
    trained = {i: weight for i, weight in weights.rollouts.items() if 0 < lengths[i] <= longest}
    if weights.wrong_needs_correct and not any(weight > 0 for weight in trained.values()):
        trained = {i: weight for i, weight in trained.items() if weight >= 0}
    num_tokens = len(demonstration.response_ids)
    has_demonstration = weights.demonstration is not None and 0 < num_tokens <= longest
    if weights.is_per_problem:
        # Shares are relative to the tokens of the demonstration. Without it the denominator would not count them, and a batch of
        # rollouts alone would be divided by nothing.
        fitting = {i: lengths[i] for i in trained if has_demonstration}
        trained = shared_by_tokens(weights.rollouts, num_tokens, fitting)
    for i, rollout in enumerate(rollouts):
        rollout.weight = trained.get(i, 0.0)
    samples = []
    if weights.demonstration is not None and has_demonstration:
        samples.append(
            TrainingSample(
                problem_id=demonstration.problem_id,
                kind="demonstration",
                prompt_ids=demonstration.prompt_ids,
                response_ids=demonstration.response_ids,
                weight=weights.demonstration,
                is_computed=weights.demonstration != 0 or not weights.is_proportional,
            )
        )
    samples += [
        TrainingSample(
            problem_id=rollouts[i].problem_id,
            kind="rollout",
            # Equal to rollouts[i].prompt_ids. All samples of a problem share one list, which saves memory.
            prompt_ids=demonstration.prompt_ids,
            response_ids=rollouts[i].response_ids,
            weight=weight,
            is_counted=not weights.is_per_problem,
        )
        for i, weight in trained.items()
    ]
    return samples


def shared_by_tokens(
    weights: Mapping[int, float], num_tokens: int, lengths: Mapping[int, int]
) -> dict[int, float]:
    """Divides the weights of each sign among the responses, so that all tokens of one sign have the same weight.

    For each sign, the sum of weight x tokens over the responses becomes the sum of that sign's ``weights``, times ``num_tokens``.

    Args:
        weights: rollout -> weight, not 0.
        num_tokens: response tokens of the demonstration.
        lengths: rollout -> its response tokens, > 0, for those of ``weights`` that are trained on.

    Returns:
        Rollout -> weight, in the order of ``lengths``.
    """
    per_token = {}
    for is_correct in (True, False):
        total = sum(weight for weight in weights.values() if (weight > 0) == is_correct)
        num = sum(length for i, length in lengths.items() if (weights[i] > 0) == is_correct)
        per_token[is_correct] = total * num_tokens / max(1, num)
    return {i: per_token[weights[i] > 0] for i in lengths}


def _check_group(demonstration: Demonstration, group: RolloutGroup, *, needs_verdicts: bool) -> None:
    assert group.problem_id == demonstration.problem_id, (
        f"rollouts of problem {group.problem_id!r} were given with the demonstration of {demonstration.problem_id!r}"
    )
    unverified = [r.sample_index for r in group.all_rollouts if is_attempt(r) and r.verdict is None]
    assert not (needs_verdicts and unverified), (
        f"problem {group.problem_id!r}: rollouts {unverified} have no verdict yet"
    )
