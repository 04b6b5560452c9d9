"""Importance-weighted SFT (arXiv 2507.12856)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rasft.flags import NonNegativeFloat, PositiveFloat
from megatron_rasft.objective.declaration import Objective, RatioRule

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms

_DEFAULTS = {
    "sequence": RatioRule("sequence", "policy_over_ref", power=2.0, clip_low=0.0, clip_high=16.0),
    "token": RatioRule("token", "policy_over_ref", power=1.0, clip_low=0.2, clip_high=1.8),
}
"""Level of the importance weight -> its published rule."""


@dataclass(kw_only=True)
class IwSft(Objective):
    """SFT weighted by the clipped ratio of the policy to the frozen reference (arXiv 2507.12856)."""

    name = "iw_sft"

    objective_iw_level: Literal["sequence", "token"] = "sequence"
    """Level of the importance weight: one weight per sequence, from mean log-probabilities, or one per token."""

    objective_iw_power: PositiveFloat | None = None
    """Exponent of the ratio before clipping. Unset: 2 per sequence, which is the default of the published function, although its
    trainer passes 1; 1 per token."""

    objective_iw_clip_low: NonNegativeFloat | None = None
    """Smallest weight. Unset: 0 per sequence, 0.2 per token."""

    objective_iw_clip_high: PositiveFloat | None = None
    """Largest weight. Unset: 16 per sequence, 1.8 per token."""

    def check(self) -> None:
        rule = self.ratio_rule()
        if rule.clip_low > rule.clip_high:
            raise self.refusal(
                "objective_iw_clip_low",
                f"must be at most --objective-iw-clip-high: {rule.clip_low} exceeds {rule.clip_high}. Give both.",
            )

    def ratio_rule(self) -> RatioRule:
        """The rule of the importance weight, with the defaults of its level."""
        default = _DEFAULTS[self.objective_iw_level]
        power, low, high = self.objective_iw_power, self.objective_iw_clip_low, self.objective_iw_clip_high
        return default._replace(
            power=default.power if power is None else power,
            clip_low=default.clip_low if low is None else low,
            clip_high=default.clip_high if high is None else high,
        )

    def needs_reference_logprobs(self) -> bool:
        return True

    def remarks(self) -> list[str]:
        rule = self.ratio_rule()
        published = "the published function's default is 2 per sequence, its trainer passes 1"
        return [f"iw_sft raises the ratio per {rule.level} to the power {rule.power:g} ({published})"]

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A w log p, where w is the detached importance weight."""
        ratio, metrics = tokens.reference_ratio(self.ratio_rule())
        return tokens.weighted_ce(ratio * tokens.token_weights(), metrics)
