"""Weights from verified rollouts: the published rule against a second implementation, the adaptive rule by its properties."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.objective.families.likelihood import Raft
from megatron_rasft.objective.families.policy_ratio import Grpo
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.objective.families.token_selective import Gft
from megatron_rasft.objective.groups import count_solved, gft_advantages, grpo_advantages
from megatron_rasft.objective.published_weighting import published_weights
from megatron_rasft.objective.samples import make_samples
from megatron_rasft.objective.weighting import (
    WeightingConfig,
    adaptive_weights,
    demonstration_weight,
    estimate_solvability,
    neutral_solvability,
    rollout_total,
)
from megatron_rasft.types import Demonstration, Rollout, RolloutGroup

NO_PRIOR = WeightingConfig(weighting_prior_strength=0.0)


def rollout(index=0, verdict="correct", text=None, finish="stop", filtered="", num_tokens=3):
    return Rollout(
        problem_id="p",
        sample_index=index,
        weight_version=0,
        prompt_ids=[1, 2],
        response_ids=[10 + index] * num_tokens,
        response_logprobs=[-0.5] * num_tokens,
        finish_reason=finish,
        text=f"text {index}" if text is None else text,
        verdict=verdict,
        filtered_by=filtered,
    )


def make_group(*rollouts):
    return RolloutGroup(problem_id="p", rollouts=list(rollouts))


def counted_group(num_correct, num_wrong):
    verdicts = ["correct"] * num_correct + ["wrong"] * num_wrong
    return make_group(*(rollout(i, verdict) for i, verdict in enumerate(verdicts)))


def demonstration():
    return Demonstration(
        problem_id="p", problem="?", response="!", answer="1", prompt_ids=[1, 2], response_ids=[3, 4]
    )


def weights_of(samples):
    return [(s.kind, pytest.approx(s.weight)) for s in samples]


# ---- published


@pytest.mark.parametrize(
    ("num_correct", "num_wrong", "demonstration", "each"),
    [
        (0, 3, 1.0, 0.0),
        (1, 2, 0.2779, 0.00869),
        (2, 1, 0.1551, 0.005),
        (3, 0, 1.0, 0.0),
        (8, 0, 1.0, 0.0),
    ],
)
def test_published_vectors_of_few_samples(num_correct, num_wrong, demonstration, each):
    weights = published_weights(counted_group(num_correct, num_wrong))
    assert weights.demonstration == pytest.approx(demonstration, abs=5e-5)
    assert weights.rollouts == pytest.approx([each] * num_correct + [0.0] * num_wrong, abs=5e-6)


@pytest.mark.parametrize(
    ("num_correct", "num_wrong", "demonstration", "each"),
    [(1, 7, 0.31638, 0.011623), (4, 4, 0.12773, 0.007502), (7, 1, 0.04749, 0.005)],
)
def test_published_vectors_of_eight_samples_keep_three_wrong(num_correct, num_wrong, demonstration, each):
    weights = published_weights(counted_group(num_correct, num_wrong))
    assert weights.demonstration == pytest.approx(demonstration, abs=5e-6)
    assert weights.rollouts[:num_correct] == pytest.approx([each] * num_correct, abs=5e-7)
    assert not any(weights.rollouts[num_correct:])


def word_overlap(a, b):
    left, right = set(a.split()), set(b.split())
    return len(left & right) / max(1, len(left | right))


def near_distinct(texts):
    kept = []
    for i, text in enumerate(texts):
        if all(word_overlap(text, texts[j]) < 0.82 for j in kept):
            kept.append(i)
    return kept


def published_again(group):
    """A second implementation of the published rule, in numpy. It ranks the wrong rollouts as the script does."""
    attempts = [
        r
        for r in group.rollouts
        if r.finish_reason != "abort" and r.verdict != "timeout" and r.response_ids != []
    ]
    kept = [attempts[i] for i in near_distinct([r.text for r in attempts])]
    survivors = [r for r in kept if r.filtered_by == ""]
    right = [r for r in survivors if r.verdict == "correct" and r.finish_reason == "stop"]
    wrong = [r for r in survivors if r.verdict != "correct"]
    table = np.zeros(len(group.rollouts), dtype=np.float64)
    if not right:
        return 1.0, table
    likeness = np.array([[word_overlap(w.text, c.text) for c in right] for w in wrong]).reshape(
        -1, len(right)
    )
    nearest = likeness.max(axis=1)
    nearest = nearest[nearest < 0.88]
    wrong_kept = np.argsort(np.abs(nearest - 0.45), kind="stable")[:3]
    rewards = np.concatenate(
        [[3.0 - 2.0 * len(right) / len(kept)], np.ones(len(right)), np.zeros(len(wrong_kept))]
    )
    if np.ptp(rewards) == 0:
        return 1.0, table
    a = np.tanh(0.4 * (rewards - rewards.mean()) / (rewards.std(ddof=0) + 1e-6)) / (1 + len(right))
    for r, value in zip(right, np.clip(a[1 : 1 + len(right)], 0.02, 0.15), strict=True):
        table[next(i for i, other in enumerate(group.rollouts) if other is r)] = 0.25 * value
    return a[0], table


def test_published_agrees_with_a_second_implementation_on_random_groups():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(5000):
        group = make_group(
            *(
                rollout(
                    i,
                    rng.choice(["correct", "correct", "wrong", "wrong", "unverifiable", "timeout"]),
                    text=" ".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 9))),
                    finish=rng.choice(["stop", "stop", "stop", "stop", "length", "abort"]),
                    filtered=rng.choice(["", "", "", "loop"]),
                    num_tokens=rng.choice([0, 1, 2, 3, 4]),
                )
                for i in range(rng.randint(0, 12))
            )
        )
        weights = published_weights(group, deduplicate=near_distinct, similarity=word_overlap)
        demonstration, table = published_again(group)
        assert weights.demonstration == pytest.approx(demonstration, rel=1e-12, abs=1e-15)
        np.testing.assert_allclose(weights.rollouts, table, rtol=1e-12, atol=1e-15)
        outcomes.add(round(demonstration, 6))
    assert len(outcomes) > 20, "the random groups are too much alike to prove anything"


def test_published_wrong_copies_of_a_correct_text_leave_the_group():
    one_copy = make_group(rollout(0), rollout(1, "wrong"), rollout(2, "wrong"))
    copies = published_weights(one_copy, similarity=lambda w, c: 0.88 if w == "text 2" else 0.879)
    # d stays 2/3, because the copy was sampled. Only its wrong answer is left out of the group.
    rewards = np.array([1 + 4 / 3, 1.0, 0.0])
    z = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert copies.demonstration == pytest.approx(np.tanh(0.4 * z[0]) / 2, rel=1e-12)


# ---- the adaptive curve

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
def test_demonstration_falls_and_rollouts_rise_with_solvability(config, one, other):
    assume(one != other)
    low, high = sorted((one, other))
    assert demonstration_weight(low, config) >= demonstration_weight(high, config)
    assert rollout_total(low, config) < rollout_total(high, config)
    if (1 - low) ** config.weighting_demonstration_exponent - (
        1 - high
    ) ** config.weighting_demonstration_exponent > 1e-12:
        assert demonstration_weight(low, config) > demonstration_weight(high, config)


@given(configs)
def test_ends_of_the_curve_are_the_flags(config):
    assert (
        demonstration_weight(0.0, config) == pytest.approx(config.weighting_demonstration_max)
        and config.weighting_demonstration_max > 1
    )
    assert demonstration_weight(1.0, config) == config.weighting_demonstration_min < 1
    assert rollout_total(0.0, config) == 0.0
    assert rollout_total(1.0, config) == config.weighting_rollout_total


@given(configs)
def test_demonstration_weight_is_that_of_an_unsampled_problem_at_the_neutral_point(config):
    assert 0 < neutral_solvability(config) < 1
    assert demonstration_weight(neutral_solvability(config), config) == pytest.approx(1.0)


def test_default_constants():
    config = WeightingConfig()
    assert config.rasft_weighting == "adaptive"
    assert (demonstration_weight(0.0, config), demonstration_weight(1.0, config)) == pytest.approx((1.5, 0.3))
    assert rollout_total(0.5, config) == pytest.approx(0.35)
    assert neutral_solvability(config) == pytest.approx(5 / 12)


# ---- the adaptive weights of a group


@given(configs, st.integers(0, 12), st.integers(0, 12))
def test_adaptive_total_is_bounded_and_shared_evenly(config, num_correct, num_wrong):
    group = counted_group(num_correct, num_wrong)
    weights = adaptive_weights(group, config)
    assert len(weights.rollouts) == num_correct + num_wrong
    assert weights.demonstration + sum(weights.rollouts) <= (
        config.weighting_demonstration_max + config.weighting_rollout_total + 1e-9
    )
    assert not any(weights.rollouts[num_correct:])
    if num_correct:
        total = rollout_total(weights.solvability, config)
        assert weights.rollouts[:num_correct] == pytest.approx([total / num_correct] * num_correct)
    if not group.rollouts:
        assert (weights.demonstration, weights.solvability) == (1.0, None)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(2, 5))
def test_adaptive_weights_do_not_depend_on_the_number_of_samples(num_correct, num_wrong, times):
    assume(num_correct + num_wrong > 0)
    few = adaptive_weights(counted_group(num_correct, num_wrong), NO_PRIOR)
    many = adaptive_weights(counted_group(num_correct * times, num_wrong * times), NO_PRIOR)
    assert few.demonstration == pytest.approx(many.demonstration)
    assert sum(few.rollouts) == pytest.approx(sum(many.rollouts))


@given(configs, st.integers(1, 12))
def test_adaptive_is_monotone_in_the_number_of_correct_rollouts(config, num_samples):
    ladder = [adaptive_weights(counted_group(c, num_samples - c), config) for c in range(num_samples + 1)]
    for worse, better in itertools.pairwise(ladder):
        assert worse.demonstration > better.demonstration
        assert sum(worse.rollouts) < sum(better.rollouts)
    assert sum(ladder[0].rollouts) == 0
    assert ladder[0].demonstration > 1 > ladder[-1].demonstration


def test_unsampled_problem_keeps_weight_one():
    assert adaptive_weights(None, WeightingConfig()).demonstration == 1.0
    assert published_weights(None).demonstration == 1.0


@pytest.mark.parametrize("weigh", [lambda g: adaptive_weights(g, WeightingConfig()), published_weights])
def test_failed_rollouts_are_not_wrong_answers(weigh):
    failed = make_group(
        rollout(0, None, finish="abort"), rollout(1, "timeout"), rollout(2, "wrong", num_tokens=0)
    )
    assert weigh(failed).demonstration == 1.0
    assert weigh(failed).solvability is None


def test_near_duplicates_share_one_weight_but_count_as_draws():
    group = make_group(rollout(0, text="same"), rollout(1, text="same"), rollout(2), rollout(3, "wrong"))
    weights = adaptive_weights(group, NO_PRIOR)
    assert weights.solvability == 0.75
    assert weights.rollouts == pytest.approx([0.7 * 0.75 / 2, 0, 0.7 * 0.75 / 2, 0])


def test_a_correct_text_counts_although_a_wrong_text_equals_it():
    group = make_group(rollout(0, "wrong", text="same"), rollout(1, text="same"))
    assert adaptive_weights(group, NO_PRIOR).rollouts == pytest.approx([0, 0.35])


@pytest.mark.parametrize(
    ("rollouts", "expected"),
    [
        ([], (0, 0)),
        ([rollout(0), rollout(1, "wrong")], (1, 2)),
        ([rollout(0, finish="length"), rollout(1)], (1, 2)),
        ([rollout(0, filtered="shortcut"), rollout(1)], (1, 2)),
        ([rollout(0, "unverifiable"), rollout(1, "wrong")], (0, 2)),
        ([rollout(0, "unverifiable"), rollout(1, "unverifiable")], (0, 0)),
        ([rollout(0, "unverifiable", finish="length"), rollout(1, "unverifiable")], (0, 2)),
        ([rollout(0, "timeout"), rollout(1)], (1, 1)),
        ([rollout(0, None, finish="abort"), rollout(1)], (1, 1)),
    ],
)
def test_solved_rollouts_and_attempts_are_counted(rollouts, expected):
    assert count_solved(make_group(*rollouts)) == expected


# ---- memory and prior


@given(configs, st.integers(0, 20), st.integers(1, 20), shares, st.floats(0, 50))
def test_estimate_is_the_mean_of_the_pooled_beta_posterior(
    config, num_correct, num_samples, past, past_samples
):
    assume(num_correct <= num_samples)
    mean = neutral_solvability(config)
    alpha = config.weighting_prior_strength * mean + num_correct + past_samples * past
    beta = (
        config.weighting_prior_strength * (1 - mean) + (num_samples - num_correct) + past_samples * (1 - past)
    )
    estimate = estimate_solvability(num_correct, num_samples, config, (past, past_samples))
    assert estimate == pytest.approx(alpha / (alpha + beta))


def test_remembered_solvability_weighs_a_problem_that_is_not_sampled_again():
    weights = adaptive_weights(None, NO_PRIOR, remembered=(1.0, 4.0))
    assert (weights.demonstration, weights.rollouts) == (pytest.approx(0.3), ())


def test_evidence_without_samples_counts_as_none():
    config = WeightingConfig()
    assert estimate_solvability(1, 4, config, (1.0, 0.0)) == estimate_solvability(1, 4, config)
    assert estimate_solvability(0, 0, config, (1.0, 0.0)) is None


def test_little_evidence_is_treated_nearly_as_none():
    config = WeightingConfig(weighting_prior_strength=1e6)
    assert adaptive_weights(counted_group(0, 3), config).demonstration == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("num_correct", "num_samples", "remembered"),
    [(2, 1, None), (-1, 1, None), (0, 1, (1.5, 1)), (0, 1, (0.5, -1))],
)
def test_impossible_evidence_is_refused(num_correct, num_samples, remembered):
    with pytest.raises(ValueError):
        estimate_solvability(num_correct, num_samples, WeightingConfig(), remembered)


# ---- advantages


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=16))
def test_grpo_advantages_are_population_z_scores(rewards):
    advantages = grpo_advantages(rewards)
    x = np.array(rewards)
    assert advantages.is_degenerate == (np.ptp(x) == 0)
    np.testing.assert_allclose(advantages.values, (x - x.mean()) / (x.std() + 1e-6), rtol=1e-12, atol=1e-12)


def test_equal_rewards_have_advantage_exactly_zero():
    assert grpo_advantages([0.1] * 3).values == (0.0, 0.0, 0.0)
    assert grpo_advantages([]).is_degenerate


def test_gft_group_includes_the_demonstration():
    values = gft_advantages([1.0, 0.0, 0.0]).values
    assert values == pytest.approx([1, 1, -1, -1], abs=1e-5)
    assert gft_advantages([1.0, 1.0]).is_degenerate
    assert gft_advantages([]).is_degenerate


# ---- samples

MIXED = (
    {"index": 0, "verdict": "correct"},
    {"index": 1, "verdict": "wrong"},
    {"index": 2, "verdict": "correct", "finish": "length"},
    {"index": 3, "verdict": "correct", "finish": "abort"},
    {"index": 4, "verdict": "correct", "num_tokens": 0},
    {"index": 5, "verdict": "wrong", "finish": "length"},
)


def mixed_group():
    return make_group(*(rollout(**fields) for fields in MIXED))


@pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_trains_on_what_it_declares(kind):
    kinds = {s.kind for s in make_samples(kind(), demonstration(), mixed_group(), config=NO_PRIOR)}
    expected = {
        "demonstrations": {"demonstration"},
        "rollouts": {"rollout"},
        "both": {"demonstration", "rollout"},
    }
    assert kinds == expected[kind.trains_on]


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES.values() if kind.trains_on == "demonstrations"])
def test_demonstration_objectives_ignore_rollouts(kind):
    group = mixed_group()
    group.rollouts[0].weight = 9.0
    samples = make_samples(kind(), demonstration(), group, config=WeightingConfig())
    assert weights_of(samples) == [("demonstration", 1.0)]
    assert (samples[0].prompt_ids, samples[0].response_ids) == ([1, 2], [3, 4])
    assert [r.weight for r in group.rollouts] == [0.0] * 6


def test_rasft_trains_the_demonstration_and_the_complete_correct_rollouts():
    group = mixed_group()
    samples = make_samples(Rasft(), demonstration(), group, config=NO_PRIOR)
    # four attempts, one solved: s = 1/4
    assert weights_of(samples) == [("demonstration", 1.5 - 1.2 / 4), ("rollout", 0.7 / 4)]
    assert samples[1].response_ids == [10, 10, 10]
    assert [r.weight for r in group.rollouts] == pytest.approx([0.175, 0, 0, 0, 0, 0])


def test_rasft_published_uses_the_published_rule():
    samples = make_samples(
        Rasft(), demonstration(), counted_group(1, 2), config=WeightingConfig(rasft_weighting="published")
    )
    assert [s.weight for s in samples] == pytest.approx([0.2779, 0.00869], abs=5e-5)


def test_rasft_without_rollout_weight_trains_no_rollout():
    config = WeightingConfig(weighting_rollout_total=0.0)
    assert len(make_samples(Rasft(), demonstration(), counted_group(3, 1), config=config)) == 1


def test_raft_trains_distinct_correct_rollouts_only():
    group = make_group(rollout(0, text="a"), rollout(1, text="a"), *mixed_group().rollouts[1:])
    samples = make_samples(Raft(), demonstration(), group, config=WeightingConfig())
    assert weights_of(samples) == [("rollout", 1.0)]
    assert make_samples(Raft(), demonstration(), counted_group(0, 3), config=WeightingConfig()) == []
    assert make_samples(Raft(), demonstration(), config=WeightingConfig()) == []


def test_grpo_trains_every_delivered_rollout_with_its_advantage():
    group = mixed_group()
    samples = make_samples(Grpo(), demonstration(), group, config=WeightingConfig())
    assert [s.response_ids[0] for s in samples] == [10, 11, 12, 15]
    x = np.array([1.0, 0.0, 0.0, 0.0])  # the correct response that was cut by the length limit has reward 0
    assert [s.weight for s in samples] == pytest.approx(list((x - 0.25) / (x.std() + 1e-6)))
    assert [r.weight for r in group.rollouts if r.weight] == [s.weight for s in samples]


@pytest.mark.parametrize(
    ("objective", "num_samples"),
    [
        (Grpo(), 4),
        (Grpo(weighting_skip_degenerate=True), 0),
        (Grpo(objective_grpo_dapo=True), 0),
        (Grpo(objective_grpo_dapo=True, weighting_skip_degenerate=True), 0),
        (Grpo(objective_grpo_dapo=True, weighting_skip_degenerate=False), 4),
    ],
)
def test_groups_with_equal_rewards_are_kept_or_skipped(objective, num_samples):
    for group in (counted_group(4, 0), counted_group(0, 4)):
        samples = make_samples(objective, demonstration(), group, config=WeightingConfig())
        assert [s.weight for s in samples] == [0.0] * num_samples
    assert len(make_samples(objective, demonstration(), counted_group(3, 1), config=WeightingConfig())) == 4
    assert make_samples(objective, demonstration(), config=WeightingConfig()) == []


def test_gft_standardises_demonstration_and_rollouts_together():
    samples = make_samples(Gft(), demonstration(), counted_group(1, 2), config=WeightingConfig())
    assert [s.kind for s in samples] == ["demonstration", "rollout", "rollout", "rollout"]
    assert [s.weight for s in samples] == pytest.approx([1, 1, -1, -1], abs=1e-5)


@pytest.mark.parametrize(
    "group",
    [
        None,
        make_group(),
        counted_group(3, 0),
        make_group(rollout(0, "unverifiable"), rollout(1, "unverifiable")),
    ],
)
def test_gft_falls_back_to_the_demonstration(group):
    assert weights_of(make_samples(Gft(), demonstration(), group, config=WeightingConfig())) == [
        ("demonstration", 1.0)
    ]


@pytest.mark.parametrize("objective", [Rasft(), Raft(), Grpo(), Gft()])
@pytest.mark.parametrize("weighting", ["adaptive", "published"])
def test_no_positive_weight_on_incomplete_or_undelivered_rollouts(objective, weighting):
    rng = random.Random(1)
    config = WeightingConfig(rasft_weighting=weighting)
    for _ in range(300):
        group = make_group(
            *(
                rollout(
                    i,
                    rng.choice(["correct", "wrong", "unverifiable", "timeout"]),
                    finish=rng.choice(["stop", "length", "abort"]),
                    num_tokens=rng.choice([0, 3]),
                )
                for i in range(8)
            )
        )
        samples = make_samples(objective, demonstration(), group, config=config)
        assert all(s.response_ids for s in samples)
        for r in group.rollouts:
            assert r.weight <= 0 or (r.finish_reason == "stop" and r.verdict == "correct")
            assert r.weight == 0 or (r.response_ids and r.finish_reason != "abort")
        assert sum(s.kind == "demonstration" for s in samples) == (objective.trains_on == "both")


def test_misuse_is_named():
    with pytest.raises(AssertionError, match="other"):
        make_samples(Rasft(), demonstration(), RolloutGroup(problem_id="other"), config=WeightingConfig())
    with pytest.raises(AssertionError, match="no verdict"):
        make_samples(Rasft(), demonstration(), make_group(rollout(0, None)), config=WeightingConfig())
