"""Compares the statistics with independent formulas: enumeration, products, closed forms."""

import itertools
import math
import statistics as st

import numpy as np
import pytest

from megatron_rasft.tools.evaluation.statistics import (
    bootstrap_interval,
    majority_at_k,
    paired_interval,
    pass_at_k,
)


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in (1, 2, 5, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int) -> None:
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_equals_the_product_form_for_large_n() -> None:
    for n, c, k in [(200, 13, 100), (1000, 1, 10), (64, 63, 2), (64, 0, 64)]:
        product = 1 - math.prod((n - c - i) / (n - i) for i in range(k))
        assert pass_at_k(n, c, k) == pytest.approx(max(product, 0.0), abs=1e-12)


def test_pass_at_one_is_the_mean_and_pass_at_n_requires_one_correct_sample() -> None:
    assert pass_at_k(16, 5, 1) == pytest.approx(5 / 16)
    assert [pass_at_k(16, c, 16) for c in (0, 1, 16)] == [0, 1, 1]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_counts_out_of_range_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased() -> None:
    p, n, k = 0.3, 6, 3
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "share"),
    [
        (["5", "5", "4"], [True, True, False], 1.0),
        (["5", "4", "4"], [True, False, False], 0.0),
        (["5", "4"], [True, False], 0.5),
        (["1/2", "0.5", "4", "4"], [True, True, False, False], 0.5),
        (["1/2", "0.5", "50%", "4", "4"], [True, True, True, False, False], 1.0),
        ([None, None, "5"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        (["3", "4", "5"], [False, False, True], 1 / 3),
    ],
)
def test_majority_of_all_samples(answers: list[str | None], correct: list[bool], share: float) -> None:
    assert majority_at_k(answers, correct, len(answers)) == pytest.approx(share)


def test_majority_at_one_is_the_mean() -> None:
    assert majority_at_k(["5", "4", "3", None], [True, False, False, False], 1) == pytest.approx(0.25)


def test_majority_at_k_of_two_answers_is_hypergeometric() -> None:
    n, c, k = 10, 6, 5  # with an odd k, the correct and the wrong answer cannot tie
    wins = sum(math.comb(c, i) * math.comb(n - c, k - i) for i in range(3, k + 1)) / math.comb(n, k)
    answers = ["5"] * c + ["4"] * (n - c)
    assert majority_at_k(answers, [a == "5" for a in answers], k) == pytest.approx(wins, abs=1e-12)


def test_random_subsets_approximate_the_exact_value_and_are_reproducible() -> None:
    n, c, k = 32, 18, 9
    wins = sum(math.comb(c, i) * math.comb(n - c, k - i) for i in range(5, k + 1)) / math.comb(n, k)
    answers = ["5"] * c + ["4"] * (n - c)
    correct = [a == "5" for a in answers]
    drawn = majority_at_k(answers, correct, k, seed=3)
    assert drawn == majority_at_k(answers, correct, k, seed=3)
    assert drawn == pytest.approx(wins, abs=4 * math.sqrt(0.25 / 2000))


def test_interval_agrees_with_the_normal_approximation() -> None:
    scores = np.random.default_rng(0).beta(2, 3, size=400)
    low, high = bootstrap_interval(scores)
    error = st.stdev(scores) / math.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_covers_the_true_mean_with_its_confidence() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        scores = rng.binomial(16, 0.3, size=60) / 16
        low, high = bootstrap_interval(scores, 0.9, num_resamples=300, seed=trial)
        hits += low <= 0.3 <= high
    assert (
        165 <= hits <= 195
    )  # 180 expected with a standard deviation of 4.2; percentile intervals are slightly too narrow


def test_interval_of_equal_scores_has_no_width_and_a_seed_gives_one_result() -> None:
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)
    scores = [0.0, 1.0, 0.25, 0.5]
    assert bootstrap_interval(scores, seed=2) == bootstrap_interval(scores, seed=2)


def test_interval_over_seeds_is_wider_where_the_seeds_differ() -> None:
    problems = np.linspace(0, 1, 200)
    same = np.stack([problems, problems, problems])
    apart = np.stack([problems - 0.1, problems, problems + 0.1])
    width = [high - low for low, high in map(bootstrap_interval, (same, apart))]
    assert width[1] > 1.5 * width[0]


def test_paired_interval_cancels_the_difficulty_of_problems() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    better = hard + 0.05 + 0.01 * rng.standard_normal(300)
    low, high = paired_interval(better, hard)
    assert 0.045 < low < 0.05 < high < 0.055
    one, other = bootstrap_interval(better), bootstrap_interval(hard)
    assert one[0] < other[1], "unpaired, the two cannot be told apart"


def test_paired_interval_refuses_other_problems() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_interval([1.0, 0.0], [1.0])


def test_paired_interval_keeps_the_spread_of_seeds_that_have_no_pair() -> None:
    others = np.stack([np.full(50, mean) for mean in (0.15, 0.30, 0.45)])
    low, high = paired_interval(np.full(50, 0.2), others)
    assert (low, high) == pytest.approx((-0.25, 0.05)), "one resample in 27 draws the worst seed only"
    low, high = paired_interval(others[:2], others)
    assert low < -0.2 and high > 0.05


def test_paired_seeds_cancel_and_must_be_equal_in_number() -> None:
    others = np.stack([np.full(50, mean) for mean in (0.15, 0.30, 0.45)])
    assert paired_interval(others + 0.1, others, pairs_seeds=True) == pytest.approx((0.1, 0.1))
    low, high = paired_interval(others + 0.1, others)
    assert low < 0 < 0.2 < high
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_interval(others[:2], others, pairs_seeds=True)
