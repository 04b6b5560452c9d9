"""Difficulty of a problem against a calibration sample: thresholds, the sliding window and the routes.

Difficulty is the current policy's mean cross-entropy on the demonstration's response, in nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rasft.config.curriculum import CurriculumConfig

Route = Literal["easy", "middle", "hard", "rest"]
"""easy, rest: the demonstration alone; middle: perhaps rollouts first; hard: the hard pool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Difficulties in nats per token that separate the routes; fixed once calibrated."""

    easy_floor: float
    low_start: float
    low_end: float
    high_start: float
    high_end: float
    ceiling: float


def interpolated_quantile(ordered: Sequence[float], q: float) -> float:
    """Quantile q (0 .. 1) of values in ascending order, linear between neighbours: position q (n - 1)."""
    position = q * (len(ordered) - 1)
    below = min(int(position), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def calibrate_thresholds(difficulties: Iterable[float], config: CurriculumConfig) -> Thresholds:
    """Thresholds at the configured quantiles of a calibration sample, of at least one finite difficulty."""
    ordered = sorted(difficulties)
    if not ordered or not all(math.isfinite(d) for d in ordered):
        raise ValueError(
            f"the curriculum's calibration needs finite difficulties, got {len(ordered)} of which "
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


def sliding_window(thresholds: Thresholds, progress: float) -> tuple[float, float]:
    """Lower and upper edge of the window at a share of training done; progress is cut to 0 .. 1."""
    done = min(1.0, max(0.0, progress))
    low = thresholds.low_start + done * (thresholds.low_end - thresholds.low_start)
    high = thresholds.high_start + done * (thresholds.high_end - thresholds.high_start)
    return low, high


def route_difficulty(difficulty: float, thresholds: Thresholds, progress: float) -> Route:
    """Where a problem of this difficulty goes; the floor is easy, the ceiling hard, the window closed."""
    low, high = sliding_window(thresholds, progress)
    if difficulty <= thresholds.easy_floor:
        return "easy"
    if low <= difficulty <= high:
        return "middle"
    if high < difficulty <= thresholds.ceiling:
        return "hard"
    return "rest"
