"""Weights of a problem's demonstration and correct rollouts from its solvability, for the rasft objective.

Plain Python on Python floats: rank 0 calls this once per problem. The comparison of texts is passed in as two callables, because
it belongs to the package verify/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_rasft.flags import FlagSection, Range, Share
from megatron_rasft.objective.declaration import UNSAMPLED_WEIGHT, Deduplicate, Similarity
from megatron_rasft.objective.groups import (
    count_solved,
    distinct_positives,
    distinct_texts,
    grpo_advantages,
    is_attempt,
    is_positive,
)
from megatron_rasft.types import RolloutGroup

# The published rule has no flags: with other constants it would no longer be the published rule.
PUBLISHED_WRONG_COPY_SIMILARITY = 0.88
PUBLISHED_WRONG_KEPT = 3
PUBLISHED_DIFFICULTY_GAIN = 2.0
PUBLISHED_TANH_SLOPE = 0.4
PUBLISHED_ROLLOUT_SCALE = 0.25
PUBLISHED_ROLLOUT_MIN = 0.02
PUBLISHED_ROLLOUT_MAX = 0.15

Amount = Annotated[float, Range(at_least=0, below=math.inf, advice="0 turns it off.")]
Exponent = Annotated[
    float, Range(above=0, below=math.inf, advice="With 0 the weight would not depend on solvability.")
]


@dataclass(kw_only=True)
class WeightingConfig(FlagSection):
    """Weights of the demonstration and of the policy's own correct rollouts, from solvability s.

    The adaptive rule is ``demonstration(s) = min + (max - min) (1 - s) ** demonstration_exponent`` and
    ``rollouts(s) = total * s ** rollout_exponent``, which the distinct correct rollouts share. The solvability at which the
    demonstration has weight 1, the weight of an unsampled problem, follows from these values (0.417 with the defaults). It is also
    the mean of the prior.
    """

    rasft_weighting: Literal["adaptive", "published"] = "adaptive"
    """Rule of the rasft objective. adaptive: the harder the problem, the larger the weight of the demonstration. published: the
    computation of the authors' script, which ignores every --weighting-* flag; the script's quality filters are then on unless a
    --no-verify-filter-* flag turns one off."""

    weighting_demonstration_max: Annotated[
        float,
        Range(
            above=1,
            below=math.inf,
            advice="An unsolved problem must have a larger weight than an unsampled problem, whose weight is 1.",
        ),
    ] = 1.5
    """Demonstration weight of a problem that is never solved (s = 0)."""

    weighting_demonstration_min: Annotated[
        float,
        Range(
            above=0,
            below=1,
            advice="A solved problem must have a smaller weight than an unsampled problem, whose weight is 1. To drop its "
            "demonstration almost completely use a small positive value.",
        ),
    ] = 0.3
    """Demonstration weight of a problem that is always solved (s = 1)."""

    weighting_demonstration_exponent: Exponent = 1.0
    """Exponent of (1 - s). Below 1 the demonstration keeps a large weight until s is near 1; above 1 its weight falls early."""

    weighting_rollout_total: Amount = 0.7
    """Weight that the correct rollouts of an always solved problem share. 0 trains on demonstrations only."""

    weighting_rollout_exponent: Exponent = 1.0
    """Exponent of s. Above 1 only rollouts of reliably solved problems have much weight."""

    weighting_prior_strength: Amount = 1.0
    """Size of the Beta prior on s, in rollouts. Its mean is the s at which the demonstration weight is 1, so a problem with
    little evidence is treated almost like an unsampled problem. 0 uses s = correct / sampled unchanged."""

    weighting_memory: Share = 0.5
    """Share of a problem's earlier rollout counts that is carried into its next estimate of s. 0 forgets them; 1 keeps all,
    although the policy has changed since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWeights:
    """Weights of one problem's demonstration and rollouts."""

    demonstration: float
    rollouts: tuple[float, ...]
    """One per rollout of the group, in its order; 0 for a rollout that is not trained on."""
    solvability: float | None
    """The estimate of s that the weights are computed from; None if nothing is known about the problem."""


# ---- the adaptive rule


def neutral_solvability(config: WeightingConfig) -> float:
    """The s at which ``demonstration_weight`` is 1, the weight of an unsampled problem; strictly inside 0 .. 1."""
    spread = config.weighting_demonstration_max - config.weighting_demonstration_min
    share = (UNSAMPLED_WEIGHT - config.weighting_demonstration_min) / spread
    return 1.0 - math.pow(share, 1.0 / config.weighting_demonstration_exponent)


def demonstration_weight(solvability: float, config: WeightingConfig) -> float:
    """Demonstration weight at s: strictly down from weighting_demonstration_max (0) to weighting_demonstration_min (1)."""
    spread = config.weighting_demonstration_max - config.weighting_demonstration_min
    return config.weighting_demonstration_min + spread * math.pow(
        1.0 - solvability, config.weighting_demonstration_exponent
    )


def rollout_total(solvability: float, config: WeightingConfig) -> float:
    """Weight all correct rollouts of a problem share at s: from 0 at 0 up to weighting_rollout_total at 1."""
    return config.weighting_rollout_total * math.pow(solvability, config.weighting_rollout_exponent)


def estimate_solvability(
    num_correct: int, num_samples: int, config: WeightingConfig, remembered: tuple[float, float] | None = None
) -> float | None:
    """Posterior mean of s from this refresh's counts, discounted earlier evidence and a Beta prior.

    Args:
        num_correct: solved attempts of this refresh.
        num_samples: attempts of this refresh; 0 if the problem was not sampled.
        config: weighting_prior_strength is the prior's size.
        remembered: (solve rate, number of samples) of earlier refreshes, discounted by the curriculum.

    Returns:
        s in 0 .. 1, or None if there is no evidence at all.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must lie in 0 .. num_samples = {num_samples}, got {num_correct}.")
    correct, samples = float(num_correct), float(num_samples)
    if remembered is not None:
        past_solvability, past_samples = remembered
        if not (0 <= past_solvability <= 1 and past_samples >= 0):
            raise ValueError(f"remembered must be (0 .. 1, >= 0), got {remembered}.")
        correct += past_samples * past_solvability
        samples += past_samples
    if samples <= 0:
        return None
    prior = config.weighting_prior_strength
    estimate = (correct + prior * neutral_solvability(config)) / (samples + prior)
    return min(1.0, max(0.0, estimate))


def adaptive_weights(
    group: RolloutGroup | None,
    config: WeightingConfig,
    *,
    remembered: tuple[float, float] | None = None,
    deduplicate: Deduplicate = distinct_texts,
) -> GroupWeights:
    """Weights that imitate the demonstration less and the policy's own solutions more as solvability grows.

    The sum of the weights depends on the group through s and on nothing else, so it does not grow with
    the number of samples and stays within weighting_demonstration_max + weighting_rollout_total (by default it falls
    from 1.5 to 1). With a prior, more samples move s further from neutral, as more evidence should.
    """
    num_correct, num_samples = (0, 0) if group is None else count_solved(group)
    solvability = estimate_solvability(num_correct, num_samples, config, remembered)
    weights = [0.0] * (0 if group is None else len(group.rollouts))
    if solvability is None:
        return GroupWeights(demonstration=UNSAMPLED_WEIGHT, rollouts=tuple(weights), solvability=None)
    trained = [] if group is None else distinct_positives(group, deduplicate)
    for i in trained:
        weights[i] = rollout_total(solvability, config) / len(trained)
    return GroupWeights(
        demonstration=demonstration_weight(solvability, config),
        rollouts=tuple(weights),
        solvability=solvability,
    )


# ---- the published rule


def published_weights(
    group: RolloutGroup | None,
    *,
    deduplicate: Deduplicate = distinct_texts,
    similarity: Similarity | None = None,
) -> GroupWeights:
    """What the authors' script computes (method.md section 3), step by step.

    Two departures, both for mistakes of that script: rollouts that were aborted or that the grader gave up on
    are not seen at all, and a correct one cut by length counts as sampled but is neither right nor wrong.

    Args:
        group: verified rollouts, ``filtered_by`` set; None if the problem was not sampled.
        deduplicate: applied to the texts of all attempts, before the quality filters.
        similarity: between a wrong and a correct text. Without it every pair is unlike (0), which changes
            only which wrong rollouts are kept where there are more than three.
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
    demonstration_reward = 1.0 + PUBLISHED_DIFFICULTY_GAIN * (1.0 - solvability)
    group_advantages = grpo_advantages([demonstration_reward] + [1.0] * len(positives) + [0.0] * num_wrong)
    if group_advantages.is_degenerate:
        return GroupWeights(demonstration=UNSAMPLED_WEIGHT, rollouts=tuple(weights), solvability=solvability)

    squashed = [math.tanh(PUBLISHED_TANH_SLOPE * z) for z in group_advantages.values]
    scale = 1.0 / (1.0 + len(positives))
    for i, advantage in zip(
        positives, squashed[1:], strict=False
    ):  # the wrong ones' advantages are left over
        clipped = min(PUBLISHED_ROLLOUT_MAX, max(PUBLISHED_ROLLOUT_MIN, advantage * scale))
        weights[i] = PUBLISHED_ROLLOUT_SCALE * clipped
    return GroupWeights(demonstration=squashed[0] * scale, rollouts=tuple(weights), solvability=solvability)


def _count_wrong_kept(wrong: Sequence[str], correct: Sequence[str], similarity: Similarity | None) -> int:
    """How many wrong texts stay in the published group.

    The script keeps the three closest to a similarity of 0.45; every wrong rollout has reward 0 and none is
    trained on, so which three they are has no effect and only their number is computed.
    """
    if similarity is None:
        return min(PUBLISHED_WRONG_KEPT, len(wrong))
    unlike = [w for w in wrong if max(similarity(w, c) for c in correct) < PUBLISHED_WRONG_COPY_SIMILARITY]
    return min(PUBLISHED_WRONG_KEPT, len(unlike))
