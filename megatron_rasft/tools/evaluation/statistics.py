"""Statistics of repeated samples: pass@k, maj@k, and bootstrap intervals of means."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from random import Random

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

_MAX_SUBSETS = 2000
"""maj@k uses all subsets of k samples if there are at most this many, else this number of random subsets."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the probability that at least one of ``k`` samples, drawn without replacement, is correct.

    This is 1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. (arXiv 2107.03374).

    Args:
        num_samples: n.
        num_correct: c.
        k: number of drawn samples, 1 .. n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples, got k {k} of {num_samples} samples.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@k needs 0 <= correct <= samples, got {num_correct} of {num_samples}.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[bool], k: int, seed: int = 0
) -> float:
    """Returns the probability that the most frequent answer among ``k`` of the samples is correct.

    All correct samples count as the same answer, in any notation. If several answers are equally frequent, each is
    chosen with the same probability.

    Args:
        answers: answer of each sample; equal entries vote together, None does not vote.
        correct: whether each sample was graded correct.
        k: number of votes, 1 .. number of samples.
        seed: seed of the random subsets, if there are too many to use all.
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
    """Returns the percentile bootstrap interval of the mean of ``scores``.

    Resamples problems and, if there are several, seeds.

    Args:
        scores: [problems], or [seeds, problems] of training runs that differ in their seed. The score of a problem is the
            mean of its samples, so that samples of a problem are resampled together.
        confidence: probability mass between the bounds, in (0, 1).
        num_resamples: more resamples reduce the noise of the bounds.
        seed: seed of the resampling; the same scores and seed give the same bounds.
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
    """Returns the bootstrap interval of mean(scores) - mean(others), with the problems paired.

    Each resample takes the same problems on both sides, so that the difficulty of a problem cancels.

    Args:
        scores: as in ``bootstrap_interval``.
        others: scores of the same problems in the same order, of any number of seeds.
        confidence: as in ``bootstrap_interval``.
        num_resamples: as in ``bootstrap_interval``.
        seed: as in ``bootstrap_interval``.
        pairs_seeds: whether row i of both sides belongs to the same seed, so that the effect of the seed cancels too. False
            resamples the seeds of each side separately.
    """
    a, b = (np.atleast_2d(np.asarray(s, dtype=np.float64)) for s in (scores, others))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a paired interval needs the same problems, got {a.shape[1]} and {b.shape[1]}.")
    if pairs_seeds:
        if len(a) != len(b):
            raise ValueError(f"paired seeds need equal numbers of seeds, got {len(a)} and {len(b)}.")
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
    """Resamples the rows (seeds) of ``table`` with replacement, and returns them at these problems."""
    return table[rng.integers(len(table), size=len(table))][:, problems]


def _percentiles(means: Sequence[float], confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)
