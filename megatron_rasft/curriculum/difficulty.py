"""Turns difficulties into routes: by thresholds from a calibration sample and a difficulty band that slides between them.

A problem's difficulty is the mean cross-entropy of its demonstration's response under the current policy, in nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rasft.config.curriculum import CurriculumConfig

Route = Literal["easy", "middle", "hard", "rest"]
"""easy: at or below the floor. middle: inside the band; a share of these problems gets rollouts. hard: above the band, up to the
ceiling; these problems form the hard pool. rest: all others. Problems of the routes easy and rest never get rollouts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Difficulties that separate the routes, nats per token."""

    easy_floor: float
    low_start: float
    """Lower edge of the band at the start of training."""
    low_end: float
    """Lower edge of the band at the end of training."""
    high_start: float
    """Upper edge of the band at the start of training."""
    high_end: float
    """Upper edge of the band at the end of training."""
    ceiling: float


def interpolated_quantile(ordered: Sequence[float], q: float) -> float:
    """Quantile q, 0 .. 1, of ascending values: linear between the neighbours of position q * (n - 1)."""
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def calibrate_thresholds(difficulties: Iterable[float], config: CurriculumConfig) -> Thresholds:
    """Thresholds at the configured quantiles of a calibration sample.

    Raises:
        ValueError: the sample is empty, or a difficulty is not finite.
    """
    ordered = sorted(difficulties)
    if not ordered or not all(math.isfinite(d) for d in ordered):
        raise ValueError(
            f"the curriculum's calibration needs finite difficulties, got {len(ordered)}, of which "
            f"{sum(not math.isfinite(d) for d in ordered)} are not: check the model's loss on them."
        )
    return Thresholds(
        easy_floor=interpolated_quantile(ordered, config.curriculum_easy_floor),
        low_start=interpolated_quantile(ordered, config.curriculum_low_start),
        low_end=interpolated_quantile(ordered, config.curriculum_low_end),
        high_start=interpolated_quantile(ordered, config.curriculum_high_start),
        high_end=interpolated_quantile(ordered, config.curriculum_high_end),
        ceiling=interpolated_quantile(ordered, config.curriculum_ceiling),
    )


def difficulty_band(thresholds: Thresholds, progress: float) -> tuple[float, float]:
    """Lower and upper edge of the band once a share ``progress`` of training is done; values outside 0 .. 1 are clipped."""
    done = min(1.0, max(0.0, progress))
    low = thresholds.low_start + done * (thresholds.low_end - thresholds.low_start)
    high = thresholds.high_start + done * (thresholds.high_end - thresholds.high_start)
    return low, high


def route_difficulty(difficulty: float, thresholds: Thresholds, progress: float) -> Route:
    """The route of a problem of this difficulty. The edges of the band are middle, the floor is easy, and the ceiling is hard."""
    low, high = difficulty_band(thresholds, progress)
    if difficulty <= thresholds.easy_floor:
        return "easy"
    if low <= difficulty <= high:
        return "middle"
    if high < difficulty <= thresholds.ceiling:
        return "hard"
    return "rest"
