"""The weights of the authors' published script, for ``--rasft-weighting published``.

The source is ``train_RASFT.py`` of github.com/zjd1sq/RASFT. Its constants are not flags: with other values this would no longer
be the published rule.
"""

import math
from collections.abc import Sequence

from megatron_rasft.objective.declaration import UNSAMPLED_WEIGHT, Deduplicate, Similarity
from megatron_rasft.objective.groups import distinct_texts, is_attempt, is_positive, standardise
from megatron_rasft.objective.weighting import GroupWeights
from megatron_rasft.types import RolloutGroup

WRONG_COPY_SIMILARITY = 0.88
"""A wrong text with at least this similarity to a correct text is left out of the group."""
NUM_WRONG_KEPT = 3
DIFFICULTY_GAIN = 2.0
TANH_SLOPE = 0.4
ROLLOUT_SCALE = 0.25
ROLLOUT_MIN = 0.02
ROLLOUT_MAX = 0.15


def published_weights(
    group: RolloutGroup | None,
    *,
    deduplicate: Deduplicate = distinct_texts,
    similarity: Similarity | None = None,
) -> GroupWeights:
    """The weights that the published script computes.

    The reward of the demonstration is 1 + 2 (1 - s), that of a correct rollout is 1, that of a wrong rollout 0. The rewards are
    standardised within the group, squashed by tanh and divided by 1 + the number of correct rollouts; the result of a rollout
    is clipped and scaled down. The demonstration has weight 1 if no rollout is correct or all rewards are equal.

    Two mistakes of the script are not repeated: aborted rollouts and rollouts whose grading timed out are ignored, and a correct
    response that the length limit cut counts as sampled but neither as correct nor as wrong.

    Args:
        group: verified rollouts with ``filtered_by`` set; None if the problem was not sampled.
        deduplicate: finds distinct texts; applied to the texts of all attempts, before the text filters.
        similarity: compares a wrong with a correct text. None: no wrong text counts as similar to a correct text.
    """
    rollouts = [] if group is None else group.rollouts
    weights = [0.0] * len(rollouts)
    attempts = [i for i, rollout in enumerate(rollouts) if is_attempt(rollout)]
    distinct = [attempts[j] for j in deduplicate([rollouts[i].text for i in attempts])]
    positives = [i for i in distinct if is_positive(rollouts[i])]
    wrong = [i for i in distinct if not rollouts[i].filtered_by and rollouts[i].verdict != "correct"]
    if not positives:
        solvability = 0.0 if distinct else None
        return GroupWeights(demonstration=UNSAMPLED_WEIGHT, rollouts=tuple(weights), solvability=solvability)

    num_wrong = _count_wrong_kept(
        [rollouts[i].text for i in wrong], [rollouts[i].text for i in positives], similarity
    )
    solvability = len(positives) / len(distinct)
    demonstration_reward = 1.0 + DIFFICULTY_GAIN * (1.0 - solvability)
    rewards = [demonstration_reward] + [1.0] * len(positives) + [0.0] * num_wrong
    advantages = standardise(rewards, is_sample=False)
    if advantages.is_degenerate:
        return GroupWeights(demonstration=UNSAMPLED_WEIGHT, rollouts=tuple(weights), solvability=solvability)

    squashed = [math.tanh(TANH_SLOPE * z) for z in advantages.values]
    scale = 1.0 / (1.0 + len(positives))
    # zip is not strict: the advantages of wrong rollouts, at the end, are not used because these are not trained on.
    for i, advantage in zip(positives, squashed[1:], strict=False):
        weights[i] = ROLLOUT_SCALE * min(ROLLOUT_MAX, max(ROLLOUT_MIN, advantage * scale))
    return GroupWeights(demonstration=squashed[0] * scale, rollouts=tuple(weights), solvability=solvability)


def _count_wrong_kept(wrong: Sequence[str], correct: Sequence[str], similarity: Similarity | None) -> int:
    """Returns the number of wrong texts in the published group.

    The script keeps the three whose similarity to a correct text is closest to 0.45. All have reward 0 and none is trained on,
    so only their number has an effect.
    """
    if similarity is None:
        return min(NUM_WRONG_KEPT, len(wrong))
    unlike = [w for w in wrong if max(similarity(w, c) for c in correct) < WRONG_COPY_SIMILARITY]
    return min(NUM_WRONG_KEPT, len(unlike))
