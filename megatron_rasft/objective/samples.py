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
) -> list[TrainingSample]:
    """The weighted sequences of one problem, demonstration first; possibly none.

    Writes the weight of every rollout of ``group`` into ``rollout.weight``. A rollout that was aborted, is empty or whose
    grading timed out is never trained on, and a response cut by the length limit never counts as correct.

    Args:
        remembered: (solve rate, number of samples) of earlier refreshes, discounted; adaptive rasft only.
        deduplicate: finds distinct texts; rasft and raft only.
        similarity: compares two texts; published rasft only.
        max_tokens: longest sequence that can be trained on, prompt and response; None for no limit. Longer ones are left out. With
            --weighting-normalization problem a problem whose demonstration is left out is not trained on at all.
    """
    if group is not None:
        _check_group(demonstration, group)
    weights = objective.weigh(
        SampledProblem(
            group=group,
            weighting=config,
            remembered=remembered,
            deduplicate=deduplicate,
            similarity=similarity,
        )
    )
    rollouts = [] if group is None else group.rollouts
    longest = math.inf if max_tokens is None else max_tokens - len(demonstration.prompt_ids)
    lengths = {i: len(rollouts[i].response_ids) for i in weights.rollouts}
    trained = {i: weight for i, weight in weights.rollouts.items() if 0 < lengths[i] <= longest}
    num_tokens = len(demonstration.response_ids)
    has_demonstration = weights.demonstration is not None and 0 < num_tokens <= longest
    if weights.is_per_problem:
        # Shares are relative to the tokens of the demonstration. Without it the denominator would not count them, and a batch of
        # rollouts alone would be divided by nothing.
        total = sum(weights.rollouts.values()) if has_demonstration else 0.0
        trained = shared_by_tokens(total, num_tokens, {i: lengths[i] for i in trained if total > 0})
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


def shared_by_tokens(total: float, num_tokens: int, lengths: Mapping[int, int]) -> dict[int, float]:
    """Shares a weight among responses, so that weight x tokens, summed over all of them, is ``total`` x ``num_tokens``.

    Args:
        num_tokens: response tokens of the demonstration.
        lengths: rollout -> its response tokens, > 0.

    Returns:
        Rollout -> weight. It is the same for all rollouts, so every token has the same weight.
    """
    if not lengths:
        return {}
    return dict.fromkeys(lengths, total * num_tokens / sum(lengths.values()))


def _check_group(demonstration: Demonstration, group: RolloutGroup) -> None:
    assert group.problem_id == demonstration.problem_id, (
        f"rollouts of problem {group.problem_id!r} were given with the demonstration of {demonstration.problem_id!r}"
    )
    unverified = [r.sample_index for r in group.rollouts if is_attempt(r) and r.verdict is None]
    assert not unverified, f"problem {group.problem_id!r}: rollouts {unverified} have no verdict yet"
