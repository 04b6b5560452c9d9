"""The base class of the objectives. Does not import torch, because parsing flags and capacity planning work without it."""

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
"""A function: texts -> indices of the distinct texts. The first of several near-duplicates is kept."""

Similarity = Callable[[str, str], float]
"""A function: two texts -> their similarity, from 0 (nothing in common) to 1 (equal)."""


class KLTerm(NamedTuple):
    """The full-vocabulary KL that an objective adds to each token's loss."""

    coef: float
    direction: KLDirection


class Teacher(NamedTuple):
    """The model with the demonstration in its prompt, which scores every rollout."""

    template: str
    """The last user message of its prompt, with {problem} and {demonstration}."""
    is_reference: bool
    """Whether it has the weights of the frozen reference; otherwise those of the policy at the last refresh."""


class RatioRule(NamedTuple):
    """How an importance ratio is computed: clip(exp(power * difference of log-probabilities), clip_low, clip_high)."""

    level: Literal["sequence", "token", "off"]
    """sequence: one ratio from the means over each response; token: one ratio per token; off: the ratio is 1."""
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
    """Discounted (solve rate, number of samples) of earlier refreshes; None for a problem that was never sampled."""

    deduplicate: Deduplicate

    similarity: Similarity | None

    borrowed: float | None = None
    """Another problem's solvability, which replaces this problem's own (--weighting-placebo); adaptive rasft only."""

    guidance: float | None = None
    """``Guidance.confidence``; None without evidence; adaptive rasft only."""


@dataclass(frozen=True, kw_only=True)
class SampleWeights:
    """The weight A of each sequence that one problem contributes to training."""

    demonstration: float | None = UNSAMPLED_WEIGHT
    """Weight of the demonstration; None if it is not trained on."""

    rollouts: dict[int, float]
    """Index into the group -> weight, for the rollouts that are trained on."""

    is_proportional: bool = False
    """Whether a sequence's loss is proportional to its weight, so that one of weight 0 need not be computed."""

    wrong_needs_correct: bool = False
    """Whether rollouts of negative weight are left out if no rollout of positive weight is short enough to be trained on."""

    is_per_problem: bool = False
    """Whether the rollouts share the sum of their weights by tokens, scaled to the length of the demonstration, and only the
    tokens of demonstrations count in the denominator of the loss (--weighting-normalization problem)."""


@dataclass(kw_only=True)
class Objective(FlagSection):
    """An objective. The fields of a subclass are its flags; ``families.OBJECTIVES`` lists the subclasses.

    The defaults of the methods are those of an objective that trains on demonstrations and needs neither a reference nor
    old log-probabilities.
    """

    name: ClassVar[str]
    """The value of --objective."""

    trains_on: ClassVar[Literal["demonstrations", "rollouts", "both"]] = "demonstrations"

    trains_on_wrong_rollouts: ClassVar[bool] = False
    """Whether wrong rollouts are trained on too. Capacity planning counts the tokens of a step with it."""

    needs_verdicts: ClassVar[bool] = True
    """Whether rollouts are graded and filtered. Without verdicts a row needs neither an answer nor tests."""

    def uses_rollouts(self) -> bool:
        """Whether this objective needs rollouts."""
        return self.trains_on != "demonstrations"

    def needs_reference_logprobs(self) -> bool:
        """Whether each response token's log-probability under the frozen reference is needed."""
        return False

    def needs_old_logprobs(self) -> bool:
        """Whether each response token's log-probability under the policy at the last refresh is needed."""
        return False

    def teacher(self) -> Teacher | None:
        """The teacher under which each response token's log-probability is needed; None for an objective without one."""
        return None

    def kl_term(self) -> KLTerm | None:
        """The full-vocabulary KL to the reference; None for an objective without this term."""
        return None

    def needs_reference_distribution(self) -> bool:
        """Whether the reference's full next-token distribution is needed: a reference forward pass in every step."""
        return self.kl_term() is not None

    def scores_under_reference(self) -> bool:
        """Whether a refresh scores responses under the frozen reference, after the plain prompt or after the teacher's."""
        teacher = self.teacher()
        return self.needs_reference_logprobs() or (teacher is not None and teacher.is_reference)

    def needs_reference(self) -> bool:
        """Whether the frozen reference is needed for anything."""
        return self.scores_under_reference() or self.needs_reference_distribution()

    def remarks(self) -> list[str]:
        """Console lines about choices of this objective that its sources make differently."""
        return []

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """The weights of the demonstration and of the rollouts of one problem."""
        return SampleWeights(rollouts={})

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """The loss of each token: a pure function of tensors, built from the methods of ``PackedTokens``."""
        raise NotImplementedError
