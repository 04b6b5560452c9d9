"""From the verified rollouts of one problem to the sequences that are trained on and their weights.

Plain Python on Python floats: this runs once per problem on rank 0. Text similarity is the verifier's
business and comes in as two callables, so that this room needs nothing of that one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from megatron_rasft.config.objective import ObjectiveName
from megatron_rasft.config.weighting import WeightingConfig
from megatron_rasft.types import (
    Demonstration,
    Rollout,
    RolloutGroup,
    TrainingSample,
    counts_as_attempt,
    counts_as_solved,
)

DEMONSTRATION_OBJECTIVES = frozenset({"sft", "sft_kl", "dft", "asft", "profit", "iw_sft", "psft"})
"""Objectives that train on demonstrations alone, each with weight 1."""

Deduplicate = Callable[[Sequence[str]], Sequence[int]]
"""Texts -> indices of the distinct ones, first come first kept."""
Similarity = Callable[[str, str], float]
"""Two texts -> 0 (nothing shared) .. 1 (the same)."""

UNSAMPLED_WEIGHT = 1.0
"""Demonstration weight of a problem nothing is known about."""

DUPLICATE_FILTER = "duplicate"
"""``Rollout.filtered_by`` of a near-duplicate, should de-duplication be recorded there: such a rollout is not
trained on, but it is a real draw from the policy and counts in the solvability."""

STD_EPSILON = 1e-6
"""Added to the group's standard deviation (GRPO, and the published weighting)."""

# The published rule is history, not a choice: its constants are not flags, because with other values it would
# no longer be the published rule. The adaptive rule has flags.
PUBLISHED_WRONG_COPY_SIMILARITY = 0.88
PUBLISHED_WRONG_TARGET_SIMILARITY = 0.45
PUBLISHED_WRONG_KEPT = 3
PUBLISHED_DIFFICULTY_GAIN = 2.0
PUBLISHED_TANH_SLOPE = 0.4
PUBLISHED_ROLLOUT_SCALE = 0.25
PUBLISHED_ROLLOUT_MIN = 0.02
PUBLISHED_ROLLOUT_MAX = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWeights:
    """Weights of one problem's demonstration and rollouts."""

    demonstration: float
    rollouts: tuple[float, ...]
    """One per rollout of the group, in its order; 0 for a rollout that is not trained on."""
    solvability: float | None
    """The estimate of s the weights follow from; None if nothing is known about the problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdvantages:
    """Rewards of a group, standardised within it."""

    values: tuple[float, ...]
    is_degenerate: bool
    """All rewards equal (one reward included): the values are zeros and teach nothing."""


def distinct_texts(texts: Sequence[str]) -> list[int]:
    """Indices of the texts that no earlier text equals: the de-duplication used when none is handed in."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    return list(first.values())


# ---- what a rollout counts as


def is_attempt(rollout: Rollout) -> bool:
    """``types.counts_as_attempt``"""
    return counts_as_attempt(len(rollout.response_ids), rollout.finish_reason, rollout.verdict)


def is_solved(rollout: Rollout) -> bool:
    """``types.counts_as_solved``"""
    return counts_as_solved(len(rollout.response_ids), rollout.finish_reason, rollout.verdict)


def is_positive(rollout: Rollout) -> bool:
    """Whether the rollout may be imitated: solved, and let through by every text filter."""
    return is_solved(rollout) and not rollout.filtered_by


def count_solved(group: RolloutGroup) -> tuple[int, int]:
    """(solved, attempts) of a group: what solvability is estimated from and what the curriculum records.

    Near-duplicates count, being draws from the policy; a correct answer that a quality filter removed (a
    guess, a loop) is an attempt that solved nothing. A group in which the verifier could nowhere tell right
    from wrong and that ran into no length limit has no attempts: that says more about the gold answer than
    about the policy.
    """
    attempts = [r for r in group.rollouts if is_attempt(r)]
    if not any(r.verdict in ("correct", "wrong") or r.finish_reason == "length" for r in attempts):
        return 0, 0
    solved = sum(is_solved(r) and r.filtered_by in ("", DUPLICATE_FILTER) for r in attempts)
    return solved, len(attempts)


def _distinct_positives(group: RolloutGroup, deduplicate: Deduplicate) -> list[int]:
    """Indices into the group of the rollouts worth imitating, near-duplicates among them removed."""
    positives = [i for i, rollout in enumerate(group.rollouts) if is_positive(rollout)]
    return [positives[j] for j in deduplicate([group.rollouts[i].text for i in positives])]


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
        config: weighting_memory discounts ``remembered``; weighting_prior_strength is the prior's size.
        remembered: (solvability, number of samples it rests on) from before this refresh, without this one.

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
        kept = config.weighting_memory * past_samples
        correct += kept * past_solvability
        samples += kept
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
    trained = [] if group is None else _distinct_positives(group, deduplicate)
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


# ---- group advantages


def grpo_advantages(rewards: Sequence[float]) -> GroupAdvantages:
    """(R - mean) / (population std + 1e-6) over one group (2402.03300); zeros where all rewards are equal."""
    if all(reward == rewards[0] for reward in rewards):
        return GroupAdvantages(values=(0.0,) * len(rewards), is_degenerate=True)
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return GroupAdvantages(
        values=tuple((reward - mean) / (std + STD_EPSILON) for reward in rewards), is_degenerate=False
    )


def gft_advantages(rollout_rewards: Sequence[float], demonstration_reward: float = 1.0) -> GroupAdvantages:
    """Advantages of the mixed group of demonstration and rollouts (2604.14258); ``values[0]`` is the demonstration's."""
    return grpo_advantages([demonstration_reward, *rollout_rewards])


# ---- what is trained on


def make_samples(
    objective: ObjectiveName,
    demonstration: Demonstration,
    group: RolloutGroup | None = None,
    *,
    config: WeightingConfig,
    remembered: tuple[float, float] | None = None,
    deduplicate: Deduplicate = distinct_texts,
    similarity: Similarity | None = None,
) -> list[TrainingSample]:
    """The sequences one problem contributes to training, demonstration first, and their weights.

    Writes the weight of every rollout of ``group`` into ``rollout.weight``. A rollout that was aborted, is
    empty or that the grader gave up on is never trained on, and one cut by length never as a positive.

    - rasft: demonstration and distinct correct rollouts, by ``--rasft-weighting``.
    - raft: distinct correct rollouts with weight 1, nothing else; possibly no sample at all.
    - grpo: every attempt with its advantage, no demonstration; nothing for a degenerate group if
      weighting_skip_degenerate.
    - gft: demonstration (reward 1) and every attempt with their advantages; the demonstration with weight 1
      where all rewards are equal or there is no attempt.
    - the others: the demonstration with weight 1, whatever was sampled.

    Args:
        remembered: (solvability, samples it rests on) from before this refresh; adaptive rasft only.
        deduplicate: which of some texts are distinct; rasft and raft.
        similarity: of two texts; published rasft only.
    """
    if objective not in get_args(ObjectiveName):
        raise ValueError(
            f"--objective must be one of {', '.join(get_args(ObjectiveName))}, got {objective!r}."
        )
    if group is not None:
        assert group.problem_id == demonstration.problem_id, (
            f"rollouts of problem {group.problem_id!r} met the demonstration of {demonstration.problem_id!r}"
        )
        unverified = [r.sample_index for r in group.rollouts if is_attempt(r) and r.verdict is None]
        assert not unverified, f"problem {group.problem_id!r}: rollouts {unverified} have no verdict yet"

    rollouts = [] if group is None else group.rollouts
    trained: dict[int, float] = {}  # index into rollouts -> weight
    demonstration_share: float | None = UNSAMPLED_WEIGHT  # None: the demonstration is not trained on
    if objective == "rasft":
        if config.rasft_weighting == "published":
            weights = published_weights(group, deduplicate=deduplicate, similarity=similarity)
        else:
            weights = adaptive_weights(group, config, remembered=remembered, deduplicate=deduplicate)
        demonstration_share = weights.demonstration
        trained = {i: weight for i, weight in enumerate(weights.rollouts) if weight > 0}
    elif objective == "raft":
        demonstration_share = None
        trained = {} if group is None else dict.fromkeys(_distinct_positives(group, deduplicate), 1.0)
    elif objective in ("grpo", "gft"):
        # Where nothing could be verified, no reward is known: the group counts as unsampled.
        is_judged = group is not None and count_solved(group)[1] > 0
        attempts = [i for i, rollout in enumerate(rollouts) if is_judged and is_attempt(rollout)]
        rewards = [1.0 if is_solved(rollouts[i]) else 0.0 for i in attempts]
        if objective == "grpo":
            demonstration_share = None
            advantages = grpo_advantages(rewards)
            if not (advantages.is_degenerate and config.weighting_skip_degenerate):
                trained = dict(zip(attempts, advantages.values, strict=True))
        else:
            advantages = gft_advantages(rewards)
            if not advantages.is_degenerate:
                demonstration_share = advantages.values[0]
                trained = dict(zip(attempts, advantages.values[1:], strict=True))

    for i, rollout in enumerate(rollouts):
        rollout.weight = trained.get(i, 0.0)
    samples = []
    if demonstration_share is not None:
        samples.append(
            TrainingSample(
                problem_id=demonstration.problem_id,
                kind="demonstration",
                prompt_ids=demonstration.prompt_ids,
                response_ids=demonstration.response_ids,
                weight=demonstration_share,
            )
        )
    samples += [
        TrainingSample(
            problem_id=rollouts[i].problem_id,
            kind="rollout",
            # the same tokens as rollouts[i].prompt_ids, which may be a list of its own
            prompt_ids=demonstration.prompt_ids,
            response_ids=rollouts[i].response_ids,
            weight=weight,
        )
        for i, weight in trained.items()
    ]
    return samples
