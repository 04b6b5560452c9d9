"""Counts, rewards and advantages of the rollouts of one problem.

This is plain Python on Python floats. Rank 0 calls it once per problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rasft.objective.declaration import Deduplicate
from megatron_rasft.types import Rollout, RolloutGroup, counts_as_attempt, counts_as_solved, credit_of

STD_EPSILON = 1e-6
"""Added to the standard deviation of a group's rewards, so that it can be divided by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdvantages:
    """Rewards of a group, standardised within it."""

    values: tuple[float, ...]
    is_degenerate: bool
    """Whether all rewards are equal, so that every value is 0. True also for a single reward or none."""


def distinct_texts(texts: Sequence[str]) -> list[int]:
    """Indices of the texts that differ from every earlier text: the default de-duplication."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    return list(first.values())


def is_attempt(rollout: Rollout) -> bool:
    """Whether the rollout counts as an attempt of the policy (``types.counts_as_attempt``)."""
    return counts_as_attempt(len(rollout.response_ids), rollout.finish_reason, rollout.verdict)


def is_solved(rollout: Rollout) -> bool:
    """Whether the rollout is a complete, correct attempt (``types.counts_as_solved``)."""
    return counts_as_solved(len(rollout.response_ids), rollout.finish_reason, rollout.verdict)


def credit(rollout: Rollout) -> float:
    """The part of a solved attempt that the rollout counts as (``types.credit_of``)."""
    return credit_of(len(rollout.response_ids), rollout.finish_reason, rollout.verdict, rollout.reward)


def is_positive(rollout: Rollout) -> bool:
    """Whether the rollout may be imitated: solved, and not removed by a text filter."""
    return is_solved(rollout) and not rollout.filtered_by


def distinct_positives(rollouts: Sequence[Rollout], deduplicate: Deduplicate) -> list[int]:
    """Indices of the rollouts that may be imitated, without near-duplicates."""
    positives = [i for i, rollout in enumerate(rollouts) if is_positive(rollout)]
    distinct = deduplicate([rollouts[i].text for i in positives]) if positives else []
    return [positives[j] for j in distinct]


def wrong_attempts(group: RolloutGroup | None) -> list[int]:
    """Indices into the group of the attempts with the verdict wrong.

    An unverifiable attempt is left out, because its answer may be right, and so is an attempt with a part of the reward.
    """
    rollouts = [] if group is None else group.rollouts
    return [
        i
        for i, rollout in enumerate(rollouts)
        if is_attempt(rollout) and rollout.verdict == "wrong" and not rollout.reward
    ]


def count_solved(rollouts: Sequence[Rollout]) -> tuple[float, int]:
    """(solved, attempts) of a problem's rollouts: the counts from which solvability is estimated. A reward r counts as r solved attempts.

    Near-duplicates count, because each is a draw from the policy. A correct response that a text filter keeps out of training counts
    as solved: the filters judge whether a text is worth imitating, not whether the policy can solve the problem. There are no attempts if no verdict is correct or wrong and no response was
    truncated by the length limit: the gold answer is then more likely at fault than the policy.
    """
    attempts = [r for r in rollouts if is_attempt(r)]
    if not any(r.verdict in ("correct", "wrong") or r.finish_reason == "length" for r in attempts):
        return 0, 0
    return math.fsum(map(credit, attempts)), len(attempts)


def judged_rewards(group: RolloutGroup | None) -> tuple[list[int], list[float]]:
    """Indices of the attempts and their rewards: those of --verify-function, otherwise 1 if solved, else 0.

    Both are empty if the verifier judged no attempt. No reward is known then, so the group counts as unsampled.
    """
    if group is None or count_solved(group.rollouts)[1] == 0:
        return [], []
    attempts = [i for i, rollout in enumerate(group.rollouts) if is_attempt(rollout)]
    return attempts, [credit(group.rollouts[i]) for i in attempts]


def standardise(rewards: Sequence[float], *, is_sample: bool) -> GroupAdvantages:
    """(R - mean) / (std + 1e-6) over one group; zeros if all rewards are equal, also for a single reward.

    Args:
        is_sample: whether the variance is divided by K - 1, as an estimate from a sample, or by K.
    """
    if all(reward == rewards[0] for reward in rewards):
        return GroupAdvantages(values=(0.0,) * len(rewards), is_degenerate=True)
    mean = math.fsum(rewards) / len(rewards)
    squares = math.fsum((reward - mean) ** 2 for reward in rewards)
    std = math.sqrt(squares / (len(rewards) - is_sample))
    return GroupAdvantages(
        values=tuple((reward - mean) / (std + STD_EPSILON) for reward in rewards), is_degenerate=False
    )


def grpo_advantages(rewards: Sequence[float]) -> GroupAdvantages:
    """Rewards standardised by the deviation of the sample (K - 1), as in verl and TRL (arXiv 2402.03300).

    A group of one reward has no deviation, so its advantage is 0. verl uses the reward itself there, and TRL refuses such groups.
    """
    return standardise(rewards, is_sample=True)


def gft_advantages(rollout_rewards: Sequence[float], demonstration_reward: float = 1.0) -> GroupAdvantages:
    """Advantages of the demonstration and the rollouts as one group (arXiv 2604.14258), the demonstration's first."""
    return grpo_advantages([demonstration_reward, *rollout_rewards])
