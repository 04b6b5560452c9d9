"""Objectives that treat likely and unlikely tokens differently: ProFit and GFT."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from megatron_rasft.flags import Range
from megatron_rasft.objective.declaration import Objective, SampledProblem, SampleWeights
from megatron_rasft.objective.groups import gft_advantages, judged_rewards

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms


@dataclass(kw_only=True)
class Profit(Objective):
    """SFT on the likely tokens of the demonstrations (arXiv 2601.09195)."""

    name = "profit"

    objective_profit_threshold: Annotated[
        float,
        Range(
            at_least=0, below=1, advice="The threshold is a token's probability. The published value is 0.1."
        ),
    ] = 0.1
    """Only tokens with a higher probability than this are trained on. The loss is divided by their number; the authors' code divides
    by the number of all response tokens."""

    def remarks(self) -> list[str]:
        threshold = self.objective_profit_threshold
        return [
            f"profit divides by the tokens with a probability above {threshold:g} (the authors' code by all response tokens); a "
            "step without such a token has no gradient (the published script trains it as sft)"
        ]

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A log p on the tokens above the threshold, divided by their number."""
        is_kept = tokens.loss_mask & (tokens.probabilities() > self.objective_profit_threshold)
        metrics = {"kept_frac": tokens.sum_and_count(is_kept)}
        return replace(tokens.weighted_ce(tokens.token_weights(), metrics), counted=is_kept)


@dataclass(kw_only=True)
class Gft(Objective):
    """Demonstration and rollouts, weighted by their advantages in one group (arXiv 2604.14258)."""

    name = "gft"
    trains_on = "both"
    trains_on_wrong_rollouts = True

    objective_gft_threshold: Annotated[
        float,
        Range(
            at_least=0,
            at_most=1,
            advice="Use 0 for plain cross-entropy, 1 for the DFT factor on every token.",
        ),
    ] = 0.1
    """Tokens above this probability get the full gradient, the others the DFT factor."""

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """The demonstration (reward 1) and every attempt with their advantages.

        If all rewards are equal or nothing was verified, only the demonstration is trained on, with weight 1.
        """
        attempts, rewards = judged_rewards(problem.group)
        advantages = gft_advantages(rewards)
        if advantages.is_degenerate:
            return SampleWeights(rollouts={})
        demonstration, *of_rollouts = advantages.values
        return SampleWeights(
            demonstration=demonstration, rollouts=dict(zip(attempts, of_rollouts, strict=True))
        )

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A c log p, where c is 1 on tokens above the threshold and the detached p on the others."""
        probabilities = tokens.probabilities()
        is_likely = probabilities > self.objective_gft_threshold
        factor = probabilities.masked_fill(is_likely, 1.0)
        metrics = {"full_gradient_frac": tokens.sum_and_count(is_likely)}
        return tokens.weighted_ce(tokens.token_weights() * factor, metrics)
