"""SFT and DFT with the full-vocabulary KL to the frozen reference at each response token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_rasft.flags import NonNegativeFloat
from megatron_rasft.objective.declaration import KLTerm, Objective
from megatron_rasft.objective.families.likelihood import Dft, Sft
from megatron_rasft.types import KLDirection

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms


@dataclass(kw_only=True)
class KLRegularised(Objective):
    """The KL to the frozen reference over the whole vocabulary."""

    default_kl: ClassVar[KLTerm]

    objective_kl_coef: NonNegativeFloat | None = None
    """Weight of the KL. 0 turns it off. Unset: 0.1 for sft_kl, 0.05 for asft."""

    objective_kl_direction: KLDirection | None = None
    """forward is KL(reference, policy), reverse is KL(policy, reference). Unset: forward for sft_kl, reverse for asft. The
    released ASFT code corresponds to forward with coefficient 0.1."""

    def kl_term(self) -> KLTerm:
        return KLTerm(
            coef=self.default_kl.coef if self.objective_kl_coef is None else self.objective_kl_coef,
            direction=self.objective_kl_direction or self.default_kl.direction,
        )


@dataclass(kw_only=True)
class SftKl(KLRegularised):
    """SFT plus the full-vocabulary KL to the frozen reference."""

    name = "sft_kl"
    default_kl = KLTerm(coef=0.1, direction="forward")

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A log p + coef A KL."""
        return tokens.with_distribution_kl(Sft().token_terms(tokens), self.kl_term().coef)


@dataclass(kw_only=True)
class Asft(KLRegularised):
    """DFT plus the full-vocabulary KL to the frozen reference."""

    name = "asft"
    default_kl = KLTerm(coef=0.05, direction="reverse")

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """-A p log p + coef A KL, where the first p is detached."""
        return tokens.with_distribution_kl(Dft().token_terms(tokens), self.kl_term().coef)
