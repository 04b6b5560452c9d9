"""The base class of the objectives. Imports no torch, because flags are parsed and clusters are planned without it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from megatron_rasft.flags import FlagSection
from megatron_rasft.types import KLDirection, RolloutGroup

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms
    from megatron_rasft.objective.weighting import WeightingConfig

UNSAMPLED_WEIGHT = 1.0
"""Weight of the demonstration of a problem without rollouts."""

Deduplicate = Callable[[Sequence[str]], Sequence[int]]
"""Texts -> indices of the distinct ones. Of several near-duplicates the first is kept."""

Similarity = Callable[[str, str], float]
"""Two texts -> 0 (nothing in common) to 1 (equal)."""


class KLTerm(NamedTuple):
    """The full-vocabulary KL that an objective adds to each token's loss."""

    coef: float
    direction: KLDirection


class RatioRule(NamedTuple):
    """How an importance ratio is computed: clip(exp(power * difference of log-probabilities), clip_low, clip_high)."""

    level: Literal["sequence", "token", "off"]
    """sequence: from the means over each response; token: from each token; off: the ratio is 1."""
    direction: Literal["ref_over_policy", "policy_over_ref"]
    power: float
    clip_low: float
    clip_high: float


@dataclass(frozen=True, kw_only=True)
class SampledProblem:
    """The rollouts of one problem, and how their texts are compared: the inputs of an objective's weights."""

    group: RolloutGroup | None
    """Verified rollouts; None for a problem that was not sampled."""

    weighting: "WeightingConfig"

    remembered: tuple[float, float] | None
    """(solve rate, number of samples) of earlier refreshes, discounted; None if there were none."""

    deduplicate: Deduplicate

    similarity: Similarity | None


@dataclass(frozen=True, kw_only=True)
class SampleWeights:
    """The weight A of each sequence that one problem contributes to training."""

    demonstration: float | None = UNSAMPLED_WEIGHT
    """None: the demonstration is not trained on."""

    rollouts: dict[int, float]
    """Index into the group -> weight. The other rollouts are not trained on."""


@dataclass(kw_only=True)
class Objective(FlagSection):
    """An objective. The fields of a subclass are its flags; ``families.OBJECTIVES`` lists the subclasses.

    The defaults of the methods are those of an objective that trains on demonstrations and needs neither a reference nor
    old log-probabilities.
    """

    name: ClassVar[str]
    """The value of --objective."""

    trains_on: ClassVar[Literal["demonstrations", "rollouts", "both"]] = "demonstrations"

    def uses_rollouts(self) -> bool:
        """Whether problems are sampled for this objective."""
        return self.trains_on != "demonstrations"

    def needs_reference_logprobs(self) -> bool:
        """Whether each response token's log-probability under the frozen reference is needed."""
        return False

    def needs_old_logprobs(self) -> bool:
        """Whether each response token's log-probability under the policy at the last refresh is needed."""
        return False

    def kl_term(self) -> KLTerm | None:
        """The full-vocabulary KL to the reference; None for an objective without this term."""
        return None

    def needs_reference_distribution(self) -> bool:
        """Whether the reference's full next-token distribution is needed: a reference forward pass in every step."""
        return self.kl_term() is not None

    def needs_reference(self) -> bool:
        """Whether the frozen reference is needed at all."""
        return self.needs_reference_logprobs() or self.needs_reference_distribution()

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """The weights of the demonstration and of the rollouts of one problem."""
        return SampleWeights(rollouts={})

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """The loss of each token: a pure function of tensors, built from the methods of ``PackedTokens``."""
        raise NotImplementedError
