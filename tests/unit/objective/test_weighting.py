"""The adaptive weights, by their properties."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rasft.objective.weighting import (
    WeightingConfig,
    adaptive_weights,
    demonstration_weight,
    estimate_solvability,
    exchanged,
    neutral_solvability,
    rollout_total,
    wrong_total,
)
from tests.unit.objective.sampled_groups import counted_group, failed_group, make_group, rollout

NO_PRIOR = WeightingConfig(weighting_prior_strength=0.0)

configs = st.builds(
    WeightingConfig,
    weighting_demonstration_max=st.floats(1.01, 5.0),
    weighting_demonstration_min=st.floats(0.01, 0.9),
    weighting_demonstration_exponent=st.floats(0.3, 4.0),
    weighting_rollout_total=st.floats(0.01, 3.0),
    weighting_rollout_exponent=st.floats(0.3, 4.0),
    weighting_prior_strength=st.floats(0.0, 5.0),
)
shares = st.integers(0, 1000).map(lambda n: n / 1000)


@given(configs, shares, shares)
def test_demonstration_falls_and_rollouts_rise_with_solvability(
    config: WeightingConfig, one: float, other: float
) -> None:
    assume(one != other)
    low, high = sorted((one, other))
    assert demonstration_weight(low, config) >= demonstration_weight(high, config)
    assert rollout_total(low, config) < rollout_total(high, config)
    if (1 - low) ** config.weighting_demonstration_exponent - (
        1 - high
    ) ** config.weighting_demonstration_exponent > 1e-12:
        assert demonstration_weight(low, config) > demonstration_weight(high, config)


@given(configs)
def test_ends_of_the_curve_are_the_flags(config: WeightingConfig) -> None:
    assert (
        demonstration_weight(0.0, config) == pytest.approx(config.weighting_demonstration_max)
        and config.weighting_demonstration_max > 1
    )
    assert demonstration_weight(1.0, config) == config.weighting_demonstration_min < 1
    assert rollout_total(0.0, config) == 0.0
    assert rollout_total(1.0, config) == config.weighting_rollout_total


@given(shares, st.floats(0.01, 3.0), st.floats(0.01, 5.0), st.floats(0.01, 5.0))
def test_rollouts_of_problems_always_or_never_solved_have_no_weight(
    s: float, fall: float, total: float, wrong: float
) -> None:
    config = WeightingConfig(
        weighting_rollout_fall=fall, weighting_rollout_total=total, weighting_wrong_total=wrong
    )
    assert (
        [rollout_total(x, config) for x in (0.0, 1.0)]
        == [wrong_total(x, config) for x in (0.0, 1.0)]
        == [0, 0]
    )
    assert rollout_total(s, config) == pytest.approx(total * s * (1 - s) ** fall)
    assert (
        wrong_total(s, config) == pytest.approx(wrong * s * (1 - s)) and wrong_total(s, config) <= wrong / 4
    )


@given(configs)
def test_demonstration_weight_is_that_of_an_unsampled_problem_at_the_neutral_point(
    config: WeightingConfig,
) -> None:
    assert 0 < neutral_solvability(config) < 1
    assert demonstration_weight(neutral_solvability(config), config) == pytest.approx(1.0)


def test_default_constants() -> None:
    config = WeightingConfig()
    assert config.rasft_weighting == "adaptive"
    assert (demonstration_weight(0.0, config), demonstration_weight(1.0, config)) == pytest.approx((1.5, 0.3))
    assert rollout_total(0.5, config) == pytest.approx(0.35)
    assert neutral_solvability(config) == pytest.approx(5 / 12)


@given(configs, st.integers(0, 12), st.integers(0, 12))
def test_adaptive_total_is_bounded_and_shared_evenly(
    config: WeightingConfig, num_correct: int, num_wrong: int
) -> None:
    group = counted_group(num_correct, num_wrong)
    weights = adaptive_weights(group, config)
    assert len(weights.rollouts) == num_correct + num_wrong
    assert weights.demonstration + sum(weights.rollouts) <= (
        config.weighting_demonstration_max + config.weighting_rollout_total + 1e-9
    )
    assert not any(weights.rollouts[num_correct:])
    if num_correct:
        assert weights.solvability is not None
        total = rollout_total(weights.solvability, config)
        assert weights.rollouts[:num_correct] == pytest.approx([total / num_correct] * num_correct)
    if not group.rollouts:
        assert (weights.demonstration, weights.solvability) == (1.0, None)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(2, 5))
def test_adaptive_weights_do_not_depend_on_the_number_of_samples(
    num_correct: int, num_wrong: int, times: int
) -> None:
    assume(num_correct + num_wrong > 0)
    few = adaptive_weights(counted_group(num_correct, num_wrong), NO_PRIOR)
    many = adaptive_weights(counted_group(num_correct * times, num_wrong * times), NO_PRIOR)
    assert few.demonstration == pytest.approx(many.demonstration)
    assert sum(few.rollouts) == pytest.approx(sum(many.rollouts))


@given(configs, st.integers(1, 12))
def test_adaptive_is_monotone_in_the_number_of_correct_rollouts(
    config: WeightingConfig, num_samples: int
) -> None:
    ladder = [adaptive_weights(counted_group(c, num_samples - c), config) for c in range(num_samples + 1)]
    for worse, better in itertools.pairwise(ladder):
        assert worse.demonstration > better.demonstration
        assert sum(worse.rollouts) < sum(better.rollouts)
    assert sum(ladder[0].rollouts) == 0
    assert ladder[0].demonstration > 1 > ladder[-1].demonstration


def test_unsampled_problem_keeps_weight_one() -> None:
    assert adaptive_weights(None, WeightingConfig()).demonstration == 1.0


def test_failed_rollouts_are_not_wrong_answers() -> None:
    weights = adaptive_weights(failed_group(), WeightingConfig())
    assert (weights.demonstration, weights.solvability) == (1.0, None)


@pytest.mark.parametrize(("num_correct", "num_wrong"), [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0), (5, 11)])
def test_equal_totals_give_the_rollouts_the_advantages_of_their_group(
    num_correct: int, num_wrong: int
) -> None:
    config = WeightingConfig(
        weighting_prior_strength=0.0,
        weighting_rollout_fall=1.0,
        weighting_rollout_total=3.0,
        weighting_wrong_total=3.0,
    )
    rewards = np.array([1.0] * num_correct + [0.0] * num_wrong)
    expected = 3.0 * (rewards - rewards.mean()) / len(rewards)
    assert adaptive_weights(counted_group(num_correct, num_wrong), config).rollouts == pytest.approx(expected)


def test_wrong_rollouts_are_trained_on_beside_correct_ones_only() -> None:
    config = WeightingConfig(weighting_wrong_total=2.0)
    group = make_group(
        rollout(0),
        rollout(1, "wrong"),
        rollout(2, "correct", finish="length"),
        rollout(3, "wrong", finish="abort"),
        rollout(4, "wrong", finish="length"),
        rollout(5, "unverifiable"),
    )
    weights = adaptive_weights(group, config, remembered=(0.5, 2.0))
    s = (1 + 1 + 5 / 12) / (5 + 2 + 1)
    assert weights.rollouts == pytest.approx([0.7 * s, -s * (1 - s), 0.0, 0.0, -s * (1 - s), 0.0])
    filtered = make_group(rollout(0, filtered="loop_sentences"), rollout(1, "wrong"))
    for unsolved in (counted_group(0, 4), filtered):
        assert not any(adaptive_weights(unsolved, config, remembered=(0.5, 2.0)).rollouts)


def test_another_problems_solvability_replaces_the_own() -> None:
    group = counted_group(3, 1)
    weights = adaptive_weights(group, NO_PRIOR, borrowed=0.25)
    assert (weights.solvability, weights.demonstration) == (0.25, pytest.approx(1.5 - 1.2 / 4))
    assert weights.rollouts == pytest.approx([0.7 / 4 / 3] * 3 + [0])
    assert adaptive_weights(None, NO_PRIOR, borrowed=0.25).solvability is None


@given(st.integers(2, 30), st.integers(0, 1000))
def test_the_placebo_gives_every_problem_the_value_of_another(num: int, seed: int) -> None:
    own = {f"p{i}": random.Random(seed).random() + i for i in range(num)}
    found = exchanged(own, str(seed))
    assert found.keys() == own.keys() and sorted(found.values()) == sorted(own.values())
    assert all(found[i] != own[i] for i in own)
    assert found == exchanged(own, str(seed))


def test_a_single_problem_keeps_its_solvability() -> None:
    assert exchanged({"p": 0.5}, "x") == {"p": 0.5} and exchanged({}, "x") == {}


def test_near_duplicates_share_one_weight_but_count_as_draws() -> None:
    group = make_group(rollout(0, text="same"), rollout(1, text="same"), rollout(2), rollout(3, "wrong"))
    weights = adaptive_weights(group, NO_PRIOR)
    assert weights.solvability == 0.75
    assert weights.rollouts == pytest.approx([0.7 * 0.75 / 2, 0, 0.7 * 0.75 / 2, 0])


def test_a_correct_text_counts_although_a_wrong_text_equals_it() -> None:
    group = make_group(rollout(0, "wrong", text="same"), rollout(1, text="same"))
    assert adaptive_weights(group, NO_PRIOR).rollouts == pytest.approx([0, 0.35])


@given(configs, st.integers(0, 20), st.integers(1, 20), shares, st.floats(0, 50))
def test_estimate_is_the_mean_of_the_pooled_beta_posterior(
    config: WeightingConfig, num_correct: int, num_samples: int, past: float, past_samples: float
) -> None:
    assume(num_correct <= num_samples)
    mean = neutral_solvability(config)
    alpha = config.weighting_prior_strength * mean + num_correct + past_samples * past
    beta = (
        config.weighting_prior_strength * (1 - mean) + (num_samples - num_correct) + past_samples * (1 - past)
    )
    estimate = estimate_solvability(num_correct, num_samples, config, (past, past_samples))
    assert estimate == pytest.approx(alpha / (alpha + beta))


def test_remembered_solvability_weighs_a_problem_that_is_not_sampled_again() -> None:
    weights = adaptive_weights(None, NO_PRIOR, remembered=(1.0, 4.0))
    assert (weights.demonstration, weights.rollouts) == (pytest.approx(0.3), ())


def test_evidence_without_samples_counts_as_none() -> None:
    config = WeightingConfig()
    assert estimate_solvability(1, 4, config, (1.0, 0.0)) == estimate_solvability(1, 4, config)
    assert estimate_solvability(0, 0, config, (1.0, 0.0)) is None


def test_little_evidence_is_treated_nearly_as_none() -> None:
    config = WeightingConfig(weighting_prior_strength=1e6)
    assert adaptive_weights(counted_group(0, 3), config).demonstration == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("num_correct", "num_samples", "remembered"),
    [(2, 1, None), (-1, 1, None), (0, 1, (1.5, 1)), (0, 1, (0.5, -1))],
)
def test_impossible_evidence_is_refused(
    num_correct: int, num_samples: int, remembered: tuple[float, float] | None
) -> None:
    with pytest.raises(ValueError):
        estimate_solvability(num_correct, num_samples, WeightingConfig(), remembered)


@pytest.mark.parametrize(
    ("guidance", "imitates", "practises"),
    [(None, True, True), (0.05, True, False), (1.0, True, False), (0.0499, False, True), (0.0, False, True)],
)
def test_guidance_below_its_threshold_leaves_demonstrations_out(
    guidance: float | None, imitates: bool, practises: bool
) -> None:
    both = adaptive_weights(counted_group(2, 1), WeightingConfig())
    weights = adaptive_weights(counted_group(2, 1), WeightingConfig(), guidance=guidance)
    assert weights.demonstration == imitates * both.demonstration
    assert weights.rollouts == tuple(practises * weight for weight in both.rollouts)
    assert weights.solvability == both.solvability
