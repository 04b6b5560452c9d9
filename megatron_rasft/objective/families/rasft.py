"""RASFT, the method of this project: imitation weighted by solvability and by the drift from the reference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_rasft.flags import NonNegativeFloat, PositiveFloat, Range
from megatron_rasft.objective.declaration import Objective, RatioRule, SampledProblem, SampleWeights
from megatron_rasft.objective.published_weighting import published_weights
from megatron_rasft.objective.weighting import adaptive_weights

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms


@dataclass(kw_only=True)
class Rasft(Objective):
    """Demonstrations and correct rollouts, weighted by solvability, by the drift from the frozen reference and by the DFT
    factor."""

    name = "rasft"
    trains_on = "both"

    objective_ratio: Literal["sequence", "token", "off"] = "sequence"
    """Level of the drift ratio: one per sequence, from mean log-probabilities; one per token; or off, which sets it to 1."""

    objective_ratio_direction: Literal["ref_over_policy", "policy_over_ref"] = "ref_over_policy"
    """Numerator and denominator of the ratio. The method divides the frozen reference by the policy."""

    objective_ratio_power: Annotated[
        float,
        Range(
            above=0,
            advice="To invert the ratio use --objective-ratio-direction; to leave it out use --objective-ratio off.",
        ),
    ] = 1.0
    """Exponent of the ratio before clipping."""

    objective_ratio_clip_low: NonNegativeFloat = 0.4
    """Smallest ratio. At most --objective-ratio-clip-high."""

    objective_ratio_clip_high: PositiveFloat = 1.2
    """Largest ratio."""

    objective_dft_factor: bool = True
    """Multiply each token's weight by its own detached probability (the DFT factor)."""

    def check(self) -> None:
        if self.objective_ratio_clip_low > self.objective_ratio_clip_high:
            raise self.refusal(
                "objective_ratio_clip_low",
                f"must be at most --objective-ratio-clip-high, {self.objective_ratio_clip_high}. Lower the first or raise "
                "the second.",
            )

    def ratio_rule(self) -> RatioRule:
        """The rule of the drift ratio."""
        return RatioRule(
            level=self.objective_ratio,
            direction=self.objective_ratio_direction,
            power=self.objective_ratio_power,
            clip_low=self.objective_ratio_clip_low,
            clip_high=self.objective_ratio_clip_high,
        )

    def needs_reference_logprobs(self) -> bool:
        return self.objective_ratio != "off"

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """The demonstration and the distinct correct rollouts, weighted by --rasft-weighting; with --weighting-wrong-total also the wrong
        rollouts."""
        if problem.weighting.rasft_weighting == "published":
            weights = published_weights(
                problem.group, deduplicate=problem.deduplicate, similarity=problem.similarity
            )
        else:
            weights = adaptive_weights(
                problem.group,
                problem.weighting,
                remembered=problem.remembered,
                deduplicate=problem.deduplicate,
                borrowed=problem.borrowed,
                guidance=problem.guidance,
            )
        return SampleWeights(
            demonstration=weights.demonstration,
            rollouts={i: weight for i, weight in enumerate(weights.rollouts) if weight != 0},
            is_proportional=True,
            wrong_needs_correct=True,
            is_per_problem=problem.weighting.is_per_problem,
        )

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-log p times the clipped drift ratio, A and the DFT factor p. All three weights are detached."""
        ratio, metrics = tokens.reference_ratio(self.ratio_rule())
        weight = ratio * tokens.token_weights()
        if self.objective_dft_factor:
            weight = weight * tokens.probabilities()
        return tokens.weighted_ce(weight, metrics)
