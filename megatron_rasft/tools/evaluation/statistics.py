"""What repeated samples of a benchmark say: avg@k, pass@k, maj@k, and how sure one may be of them."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from random import Random

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

_MAX_SUBSETS = 2000
"""maj@k visits every k of n samples up to this many subsets; beyond, as many drawn ones."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of ``k`` samples, drawn without replacement, is correct.

    The unbiased estimator 1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples, got k {k} of {num_samples} samples.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@k needs 0 <= correct <= samples, got {num_correct} of {num_samples}.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[bool], k: int, seed: int = 0
) -> float:
    """Probability that the most frequent answer of ``k`` of the samples is correct.

    All correct samples are one answer, however they are written. None is no answer and has no vote. Of
    answers that are equally frequent each is as likely to be taken.

    Args:
        answers: what each sample answered; samples with equal entries vote together.
        correct: whether each sample was graded correct.
        k: votes, 1 .. number of samples.
        seed: of the drawn subsets, where there are too many to visit.
    """
    num = len(answers)
    if not 1 <= k <= num:
        raise ValueError(f"maj@k needs 1 <= k <= samples, got k {k} of {num} samples.")
    votes = [True if right else answer for answer, right in zip(answers, correct, strict=True)]
    if math.comb(num, k) <= _MAX_SUBSETS:
        subsets = [list(subset) for subset in combinations(votes, k)]
    else:
        rng = Random(seed)
        subsets = [rng.sample(votes, k) for _ in range(_MAX_SUBSETS)]
    return sum(map(_share_of_winners, subsets)) / len(subsets)


def _share_of_winners(votes: Sequence[Hashable | None]) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    winners = [vote for vote, count in counts.items() if count == most]
    return winners.count(True) / len(winners) if winners else 0.0


def bootstrap_interval(
    scores: ArrayLike, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of ``scores``, resampled over problems and, if there are several, seeds.

    Args:
        scores: [problems], or [seeds, problems] of trainings that differ by their seed; the score of a problem is
            the mean of its samples, so that samples of one problem stay together.
        confidence: probability mass between the bounds, in (0, 1).
        num_resamples: more narrow down the bounds' own noise.
        seed: the same scores and seed give the same bounds.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if not table.size:
        raise ValueError("an interval needs at least one problem")
    num_problems = table.shape[1]
    rng = np.random.default_rng(seed)
    means = [
        _resampled(table, rng.integers(num_problems, size=(num_problems,)), rng).mean()
        for _ in range(num_resamples)
    ]
    return _percentiles(means, confidence)


def paired_interval(
    scores: ArrayLike,
    others: ArrayLike,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    *,
    pairs_seeds: bool = False,
) -> tuple[float, float]:
    """Interval of mean(scores) - mean(others), problems paired: what is hard for both cancels.

    Args:
        scores: as in ``bootstrap_interval``.
        others: the same problems in the same order, of as many seeds as there are.
        confidence: as in ``bootstrap_interval``.
        num_resamples: as in ``bootstrap_interval``.
        seed: as in ``bootstrap_interval``.
        pairs_seeds: row i of both is of one seed, so that what it does to both cancels too. False draws the seeds of
            each side by themselves.
    """
    a, b = (np.atleast_2d(np.asarray(s, dtype=np.float64)) for s in (scores, others))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a paired interval needs the same problems, got {a.shape[1]} and {b.shape[1]}.")
    if pairs_seeds:
        if len(a) != len(b):
            raise ValueError(f"seeds can be paired only with as many, got {len(a)} and {len(b)}.")
        return bootstrap_interval(a - b, confidence, num_resamples, seed)
    rng = np.random.default_rng(seed)
    return _percentiles(
        [
            _resampled(a, problems, rng).mean() - _resampled(b, problems, rng).mean()
            for problems in rng.integers(a.shape[1], size=(num_resamples, a.shape[1]))
        ],
        confidence,
    )


def _resampled(
    table: NDArray[np.float64], problems: NDArray[np.int64], rng: Generator
) -> NDArray[np.float64]:
    """As many of the rows of ``table``, drawn with replacement, at these problems."""
    return table[rng.integers(len(table), size=len(table))][:, problems]


def _percentiles(means: Sequence[float], confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)
