"""Maximum likelihood: SFT and DFT on demonstrations, and RAFT, which applies either to the policy's own correct rollouts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rasft.objective.declaration import Objective, SampledProblem, SampleWeights
from megatron_rasft.objective.groups import distinct_positives

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms


@dataclass(kw_only=True)
class Sft(Objective):
    """Supervised fine-tuning on the demonstrations."""

    name = "sft"

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A log p."""
        return tokens.weighted_ce(tokens.token_weights())


@dataclass(kw_only=True)
class Dft(Objective):
    """Dynamic fine-tuning on the demonstrations (arXiv 2508.05629)."""

    name = "dft"

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A p log p, where the first p is detached."""
        return tokens.weighted_ce(tokens.token_weights() * tokens.probabilities())


@dataclass(kw_only=True)
class Raft(Objective):
    """Rejection sampling: the correct rollouts, each with weight 1."""

    name = "raft"
    trains_on = "rollouts"

    objective_raft_loss: Literal["dft", "sft"] = "dft"
    """Loss on the correct rollouts."""

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """The distinct correct rollouts. A problem without correct rollouts contributes nothing."""
        positives = (
            [] if problem.group is None else distinct_positives(problem.group.rollouts, problem.deduplicate)
        )
        return SampleWeights(demonstration=None, rollouts=dict.fromkeys(positives, 1.0))

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """The loss of DFT or of SFT. ``weigh`` has selected the correct rollouts."""
        return (Dft() if self.objective_raft_loss == "dft" else Sft()).token_terms(tokens)
