"""The sequences that one problem contributes to training. Plain Python: rank 0 calls this once per problem."""

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
) -> list[TrainingSample]:
    """The weighted sequences of one problem, demonstration first; possibly none.

    Writes the weight of every rollout of ``group`` into ``rollout.weight``. A rollout that was aborted, is empty or whose
    grading timed out is never trained on, and a response cut by the length limit never counts as correct.

    Args:
        remembered: (solve rate, number of samples) of earlier refreshes, discounted; adaptive rasft only.
        deduplicate: finds distinct texts; rasft and raft only.
        similarity: compares two texts; published rasft only.
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
    for i, rollout in enumerate(rollouts):
        rollout.weight = weights.rollouts.get(i, 0.0)
    samples = []
    if weights.demonstration is not None:
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
        )
        for i, weight in weights.rollouts.items()
    ]
    return samples


def _check_group(demonstration: Demonstration, group: RolloutGroup) -> None:
    assert group.problem_id == demonstration.problem_id, (
        f"rollouts of problem {group.problem_id!r} were given with the demonstration of {demonstration.problem_id!r}"
    )
    unverified = [r.sample_index for r in group.rollouts if is_attempt(r) and r.verdict is None]
    assert not unverified, f"problem {group.problem_id!r}: rollouts {unverified} have no verdict yet"
