"""Counts and advantages of the rollouts of one problem."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rasft.objective.groups import (
    GroupAdvantages,
    count_solved,
    distinct_positives,
    distinct_texts,
    gft_advantages,
    grpo_advantages,
    judged_rewards,
    standardise,
    wrong_attempts,
)
from megatron_rasft.types import Rollout
from tests.unit.objective.sampled_groups import make_group, rollout


@pytest.mark.parametrize(
    ("rollouts", "expected"),
    [
        ([], (0, 0)),
        ([rollout(0), rollout(1, "wrong")], (1, 2)),
        ([rollout(0, finish="length"), rollout(1)], (1, 2)),
        ([rollout(0, filtered="shortcut"), rollout(1), rollout(2, "wrong", filtered="loop")], (2, 3)),
        ([rollout(0, "unverifiable"), rollout(1, "wrong")], (0, 2)),
        ([rollout(0, "unverifiable"), rollout(1, "unverifiable")], (0, 0)),
        ([rollout(0, "unverifiable", finish="length"), rollout(1, "unverifiable")], (0, 2)),
        ([rollout(0, "timeout"), rollout(1)], (1, 1)),
        ([rollout(0, None, finish="abort"), rollout(1)], (1, 1)),
        ([rollout(0, reward=1.0), rollout(1, "wrong", reward=0.25)], (1.25, 2)),
        ([rollout(0, reward=0.9), rollout(1, "wrong", reward=0.0)], (0.9, 2)),
        ([rollout(0, reward=0.9, finish="length"), rollout(1, "timeout", reward=0.5)], (0, 1)),
    ],
)
def test_solved_rollouts_and_attempts_are_counted(
    rollouts: list[Rollout], expected: tuple[float, int]
) -> None:
    assert count_solved(make_group(*rollouts).rollouts) == expected


def test_a_part_of_the_reward_is_neither_imitated_nor_wrong() -> None:
    group = make_group(
        rollout(0, reward=1.0),
        rollout(1, "wrong", reward=0.5),
        rollout(2, "wrong", reward=0.0),
        rollout(3, "wrong"),
    )
    assert distinct_positives(group.rollouts, distinct_texts) == [0]
    assert wrong_attempts(group) == [2, 3]
    assert judged_rewards(group) == ([0, 1, 2, 3], [1.0, 0.5, 0.0, 0.0])


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=16), st.booleans())
def test_rewards_are_standardised(rewards: list[float], is_sample: bool) -> None:
    advantages = standardise(rewards, is_sample=is_sample)
    x = np.array(rewards)
    assert advantages.is_degenerate == (np.ptp(x) == 0)
    if not advantages.is_degenerate:
        expected = (x - x.mean()) / (x.std(ddof=int(is_sample)) + 1e-6)
        np.testing.assert_allclose(advantages.values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "advantages", [grpo_advantages, lambda rewards: gft_advantages(rewards[1:], rewards[0])]
)
def test_advantages_divide_by_the_deviation_of_the_sample(advantages: Callable[..., GroupAdvantages]) -> None:
    # The squared deviations of 1, 0, 0, 0 sum to 3/4. Divided by K - 1 = 3 they give the variance (1/2)^2.
    assert advantages([1.0, 0.0, 0.0, 0.0]).values == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages([1.0]).values == (0.0,), "a single reward"


def test_equal_rewards_have_advantage_exactly_zero() -> None:
    assert grpo_advantages([0.1] * 3).values == (0.0, 0.0, 0.0)
    assert grpo_advantages([]).is_degenerate


def test_gft_group_includes_the_demonstration() -> None:
    values = gft_advantages([1.0, 0.0, 0.0]).values
    assert values == pytest.approx([3**0.5 / 2, 3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2], abs=1e-5)
    assert gft_advantages([1.0, 1.0]).is_degenerate
    assert gft_advantages([]).is_degenerate
