"""Flags of ``megatron_rasft/curriculum``: which problems get rollouts."""

from dataclasses import dataclass
from typing import Literal

from megatron_rasft.flags import FlagSection, PositiveInt, Share, flag_name

_ASCENDING = (
    ("easy_floor", "low_start"),
    ("easy_floor", "low_end"),
    ("low_start", "high_start"),
    ("low_end", "high_end"),
    ("high_start", "ceiling"),
    ("high_end", "ceiling"),
)
"""Pairs of quantiles. The first of a pair must not exceed the second."""


@dataclass(kw_only=True)
class CurriculumConfig(FlagSection):
    """Choice of the problems that get rollouts at a refresh.

    The difficulty of a problem is the current policy's mean cross-entropy on its demonstration, in nats per token. The quantiles
    refer to the difficulties of a calibration sample under the initial policy. The band of difficulties that are sampled slides
    from its start to its end linearly over training. All flags but the mode are used in mode ``band`` only.
    """

    curriculum_mode: Literal["all", "band", "off"] = "all"
    """all: every problem gets rollouts before it is trained on; band: the published sliding band of difficulties; off: no
    rollouts, every problem is trained on its demonstration."""

    curriculum_easy_floor: Share = 0.10
    """Quantile: problems up to this difficulty are easy and never sampled."""

    curriculum_low_start: Share = 0.20
    """Quantile: lower edge of the band at the start of training."""

    curriculum_low_end: Share = 0.50
    """Quantile: lower edge of the band at the end of training."""

    curriculum_high_start: Share = 0.45
    """Quantile: upper edge of the band at the start of training."""

    curriculum_high_end: Share = 0.75
    """Quantile: upper edge of the band at the end of training."""

    curriculum_ceiling: Share = 0.90
    """Quantile: problems between the band and this difficulty form the hard pool. More difficult problems are never sampled."""

    curriculum_calibration_rows: PositiveInt = 1000
    """Demonstrations in the calibration sample; all of them if the data has fewer."""

    curriculum_middle_frac: Share = 0.35
    """Share of the problems inside the band that is sampled at a refresh; the number is rounded up."""

    curriculum_hard_frac: Share = 0.03
    """Share of the hard pool that is sampled at a refresh; the number is rounded down, to at least one problem unless 0."""

    def check(self) -> None:
        for lower, upper in _ASCENDING:
            limit = getattr(self, f"curriculum_{upper}")
            if getattr(self, f"curriculum_{lower}") > limit:
                raise self.refusal(
                    f"curriculum_{lower}",
                    f"must not exceed {flag_name(f'curriculum_{upper}')} ({limit}), because easy floor <= band <= ceiling. "
                    "Lower the first or raise the second.",
                )
