"""Objectives with a clipped ratio between the policy and the policy at the last refresh: PSFT and GRPO."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from megatron_rasft.flags import NonNegativeFloat, PositiveFloat, Range
from megatron_rasft.objective.declaration import Objective, SampledProblem, SampleWeights
from megatron_rasft.objective.groups import grpo_advantages, judged_rewards

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms


@dataclass(kw_only=True)
class Psft(Objective):
    """SFT with a clipped ratio of the policy to the policy at the last refresh (arXiv 2508.17784)."""

    name = "psft"

    objective_psft_clip_low: Annotated[
        float,
        Range(
            at_least=0, at_most=1, advice="The flag bounds the ratio itself: for an epsilon of 0.2 give 0.8."
        ),
    ] = 0.8
    """Lower bound of the policy ratio itself, not an epsilon."""

    objective_psft_clip_high: Annotated[
        float, Range(at_least=1, advice="The flag bounds the ratio itself: for an epsilon of 0.2 give 1.2.")
    ] = 1.28
    """Upper bound of the policy ratio itself. A token above it has no gradient."""

    def needs_old_logprobs(self) -> bool:
        return True

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-min(q A, clip(q) A), where q is the ratio of the policy to the policy at the last refresh."""
        return tokens.clipped_surrogate(self.objective_psft_clip_low, self.objective_psft_clip_high)


@dataclass(kw_only=True)
class Grpo(Objective):
    """Group relative policy optimisation on all rollouts, correct and wrong (arXiv 2402.03300). Has a DAPO variant."""

    name = "grpo"
    trains_on = "rollouts"
    trains_on_wrong_rollouts = True

    objective_grpo_clip_low: Annotated[
        float,
        Range(at_least=0, at_most=1, advice="The flag is an epsilon: for a lower bound of 0.8 give 0.2."),
    ] = 0.2
    """Lower clip epsilon: the ratio to the policy at the last refresh is clipped at 1 minus this. With --rollout-lag 1 or a
    replay, rollouts are older than that policy; the ratio does not correct for this."""

    objective_grpo_clip_high: NonNegativeFloat | None = None
    """Upper clip epsilon: the ratio is clipped at 1 plus this. Unset: 0.2, or 0.28 with --objective-grpo-dapo."""

    objective_grpo_beta: NonNegativeFloat | None = None
    """Weight of the per-token KL estimate to the reference; 0 needs no reference. Unset: 0.001, or 0 with
    --objective-grpo-dapo."""

    objective_grpo_kl_cap: PositiveFloat | None = None
    """Largest KL estimate of a token, nats: a token above it has no gradient from the KL term. verl uses 10. Unset: no limit."""

    objective_grpo_dual_clip: (
        Annotated[
            float, Range(above=1, advice="The flag bounds the ratio itself. verl uses 3 (clip_ratio_c).")
        ]
        | None
    ) = None
    """Upper bound of the ratio of tokens with a negative advantage, which the upper clip does not bound (dual clip; verl's
    clip_ratio_c, 3). A token above it has no gradient. Unset: no bound, as in TRL."""

    objective_grpo_dapo: bool = False
    """The DAPO variant: larger upper clip, no KL, and groups with equal rewards are left out. Each of these can also be set by
    its own flag: --objective-grpo-clip-high, --objective-grpo-beta, --no-weighting-skip-degenerate."""

    weighting_skip_degenerate: bool | None = None
    """Leave out groups whose rewards are all equal. Off: they are kept with advantage 0, so they count in the number of tokens
    and in the KL term. Unset: on with --objective-grpo-dapo, else off."""

    @property
    def clip_high(self) -> float:
        """The upper clip epsilon, with the default of the variant."""
        default = 0.28 if self.objective_grpo_dapo else 0.2
        return default if self.objective_grpo_clip_high is None else self.objective_grpo_clip_high

    @property
    def beta(self) -> float:
        """The weight of the KL estimate, with the default of the variant."""
        default = 0.0 if self.objective_grpo_dapo else 0.001
        return default if self.objective_grpo_beta is None else self.objective_grpo_beta

    @property
    def skips_degenerate_groups(self) -> bool:
        """Whether groups with equal rewards are left out, with the default of the variant."""
        if self.weighting_skip_degenerate is None:
            return self.objective_grpo_dapo
        return self.weighting_skip_degenerate

    def needs_reference_logprobs(self) -> bool:
        return self.beta > 0

    def needs_old_logprobs(self) -> bool:
        return True

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """Every attempt, correct or wrong, with its advantage. The demonstration is not trained on."""
        attempts, rewards = judged_rewards(problem.group)
        advantages = grpo_advantages(rewards)
        if advantages.is_degenerate and self.skips_degenerate_groups:
            return SampleWeights(demonstration=None, rollouts={})
        return SampleWeights(demonstration=None, rollouts=dict(zip(attempts, advantages.values, strict=True)))

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-min(q A, clip(q) A) + beta KL, where q is the ratio of the policy to the policy at the last refresh."""
        terms = tokens.clipped_surrogate(
            1.0 - self.objective_grpo_clip_low, 1.0 + self.clip_high, self.objective_grpo_dual_clip
        )
        if self.beta == 0.0:
            return terms
        kl = tokens.reference_kl_estimate(self.objective_grpo_kl_cap)
        metrics = terms.metrics | {"kl_nats": tokens.sum_and_count(kl.detach())}
        return replace(terms, loss=terms.loss + self.beta * kl, metrics=metrics)
