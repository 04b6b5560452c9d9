"""Which demonstrations get rollouts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class CurriculumConfig:
    """Choice of the problems that get rollouts at a refresh.

    Difficulty is the current policy's mean cross-entropy on the demonstration, in nats per token. The
    quantile flags cut the difficulties of a calibration sample, taken with the initial policy; the difficulty band of
    problems worth sampling slides from its start to its end linearly over training. Everything but the mode
    matters in mode ``band`` only.
    """

    curriculum_mode: Literal["all", "band", "off"] = "all"
    """all: every problem gets rollouts before it is trained; band: the published sliding band of difficulties;
    off: no rollouts, every problem is trained on its demonstration."""

    curriculum_easy_floor: float = 0.10
    """Quantile, 0 .. 1: problems at or below it are easy and never sampled."""

    curriculum_low_start: float = 0.20
    """Quantile, 0 .. 1: lower edge of the band at the start of training."""

    curriculum_low_end: float = 0.50
    """Quantile, 0 .. 1: lower edge of the band at the end of training."""

    curriculum_high_start: float = 0.45
    """Quantile, 0 .. 1: upper edge of the band at the start of training."""

    curriculum_high_end: float = 0.75
    """Quantile, 0 .. 1: upper edge of the band at the end of training."""

    curriculum_ceiling: float = 0.90
    """Quantile, 0 .. 1: above the band and up to here: the hard pool; beyond, never sampled."""

    curriculum_calibration_rows: int = 1000
    """Demonstrations in the calibration sample, >= 1; all of them where the data has fewer."""

    curriculum_middle_frac: float = 0.35
    """Share of the problems inside the band to sample at a refresh, 0 .. 1; at least one unless 0."""

    curriculum_hard_frac: float = 0.03
    """Share of the hard pool that is probed at a refresh, 0 .. 1; at least one unless 0."""

    def __post_init__(self) -> None:
        if self.curriculum_mode not in ("all", "band", "off"):
            raise ValueError(f"--curriculum-mode must be all, band or off, got {self.curriculum_mode!r}.")
        if self.curriculum_calibration_rows < 1:
            raise ValueError(
                f"--curriculum-calibration-rows must be >= 1, got {self.curriculum_calibration_rows}: "
                "quantiles need a sample."
            )
        for name in (
            "easy_floor",
            "low_start",
            "low_end",
            "high_start",
            "high_end",
            "ceiling",
            "middle_frac",
            "hard_frac",
        ):
            value = getattr(self, f"curriculum_{name}")
            if not 0 <= value <= 1:
                raise ValueError(f"--curriculum-{name.replace('_', '-')} must lie in 0 .. 1, got {value}.")
        for lower, upper in (
            ("easy_floor", "low_start"),
            ("easy_floor", "low_end"),
            ("low_start", "high_start"),
            ("low_end", "high_end"),
            ("high_start", "ceiling"),
            ("high_end", "ceiling"),
        ):
            low, high = getattr(self, f"curriculum_{lower}"), getattr(self, f"curriculum_{upper}")
            if low > high:
                raise ValueError(
                    f"--curriculum-{lower.replace('_', '-')} ({low}) must not exceed "
                    f"--curriculum-{upper.replace('_', '-')} ({high}): easy floor <= band <= ceiling. "
                    "Lower the first or raise the second."
                )
