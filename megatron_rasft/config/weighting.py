"""How verified rollouts become training weights."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class WeightingConfig:
    """Weights of the demonstration and of the policy's own correct rollouts, from solvability s.

    The adaptive rule is ``demonstration(s) = min + (max - min) (1 - s) ** demonstration_exponent`` and
    ``rollouts(s) = total * s ** rollout_exponent``, the latter shared by the distinct correct rollouts. The
    solvability at which the demonstration weight is 1, the weight of an unsampled problem, follows from these (0.417
    with the defaults) and is also the mean of the prior.
    """

    rasft_weighting: Literal["adaptive", "published"] = "adaptive"
    """Rule of the rasft objective: adaptive (the harder the problem, the more the demonstration counts) or
    published (what the authors' script computes; it ignores every weighting_* constant, and the script's quality
    filters are on unless a --no-verify-filter-* flag switches one off)."""

    weighting_demonstration_max: float = 1.5
    """Demonstration weight of a problem that is never solved, s = 0; > 1, the weight of an unsampled one."""

    weighting_demonstration_min: float = 0.3
    """Demonstration weight of a problem that is always solved, s = 1; > 0 and < 1."""

    weighting_demonstration_exponent: float = 1.0
    """Exponent on (1 - s), > 0. Below 1 the demonstration stays strong for long; above 1 it fades early."""

    weighting_rollout_total: float = 0.7
    """Weight the correct rollouts of an always solved problem share, >= 0; 0 trains demonstrations only."""

    weighting_rollout_exponent: float = 1.0
    """Exponent on s, > 0. Above 1 self-imitation is kept for problems that are solved reliably."""

    weighting_prior_strength: float = 1.0
    """Pseudo-rollouts of the Beta prior on s, >= 0, centred where the demonstration weight is 1: with little
    evidence a problem is treated nearly as an unsampled one. 0 takes s = correct / sampled as it is."""

    weighting_memory: float = 0.5
    """Share of a problem's earlier rollout counts that is carried into its next estimate of s, 0 .. 1.
    0 forgets, 1 never forgets although the policy moves on."""

    weighting_skip_degenerate: bool | None = None
    """grpo only: leave out groups whose rewards are all equal. Off, they are kept with advantage 0, so they still count
    in the token total and in the KL term. Unset: on with --objective-grpo-dapo, else off."""

    def __post_init__(self) -> None:
        if self.rasft_weighting not in ("adaptive", "published"):
            raise ValueError(
                f"--rasft-weighting must be adaptive or published, got {self.rasft_weighting!r}."
            )
        if not (math.isfinite(self.weighting_demonstration_max) and self.weighting_demonstration_max > 1):
            raise ValueError(
                f"--weighting-demonstration-max must be finite and > 1, got {self.weighting_demonstration_max}: an "
                "unsolved problem must count more than an unsampled one, which has weight 1."
            )
        if not 0 < self.weighting_demonstration_min < 1:
            raise ValueError(
                f"--weighting-demonstration-min must be > 0 and < 1, got {self.weighting_demonstration_min}: a solved "
                "problem must count less than an unsampled one. Use a small positive value to drop its "
                "demonstration almost fully."
            )
        for flag, exponent in (
            ("--weighting-demonstration-exponent", self.weighting_demonstration_exponent),
            ("--weighting-rollout-exponent", self.weighting_rollout_exponent),
        ):
            if not (math.isfinite(exponent) and exponent > 0):
                raise ValueError(f"{flag} must be finite and > 0, got {exponent}: at 0 the weight ignores s.")
        for flag, amount in (
            ("--weighting-rollout-total", self.weighting_rollout_total),
            ("--weighting-prior-strength", self.weighting_prior_strength),
        ):
            if not (math.isfinite(amount) and amount >= 0):
                raise ValueError(f"{flag} must be finite and >= 0, got {amount}. 0 turns it off.")
        if not 0 <= self.weighting_memory <= 1:
            raise ValueError(
                f"--weighting-memory is a share, 0 .. 1, got {self.weighting_memory}. 0 turns memory off."
            )
