"""Options of the loss. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

ObjectiveName = Literal[
    "rasft", "sft", "sft_kl", "dft", "asft", "profit", "iw_sft", "psft", "gft", "raft", "grpo"
]
RatioLevel = Literal["sequence", "token", "off"]
RatioDirection = Literal["ref_over_policy", "policy_over_ref"]
KLDirection = Literal["forward", "reverse"]
LogprobKernels = Literal["auto", "fused", "plain"]

LOGITS_BYTES = 3 << 30
"""Logits that the fused kernels keep at a time where --objective-logprob-chunk-tokens is unset, and as many of the reference
under a full-vocabulary KL: all of a micro-batch of 8,192 tokens up to a vocabulary of 196,000 a rank, so that none is
computed twice."""

PLAIN_CHUNK_TOKENS = 1024
"""Tokens whose logits the plain operators keep at a time where --objective-logprob-chunk-tokens is unset."""


def fused_chunk_tokens(num_tokens: int, bytes_per_token: int) -> int:
    """Tokens whose logits are kept at a time: equal parts of at most ``LOGITS_BYTES``; 0 for all at once."""
    num_chunks = -(-num_tokens * bytes_per_token // LOGITS_BYTES)
    return 0 if num_chunks <= 1 else -(-num_tokens // num_chunks)


class KLTerm(NamedTuple):
    """Coefficient and direction of the full-vocabulary KL term of an objective."""

    coef: float
    direction: KLDirection


_DEFAULT_KL_TERMS: dict[str, KLTerm] = {
    "sft_kl": KLTerm(0.1, "forward"),
    "asft": KLTerm(0.05, "reverse"),
}


class RatioRule(NamedTuple):
    """How an importance ratio is formed: clip(exp(power * (difference of mean logprobs)), low, high)."""

    level: RatioLevel
    direction: RatioDirection
    power: float
    clip_low: float
    clip_high: float


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised: RASFT, or one of the baselines it is compared with."""

    objective: ObjectiveName = "rasft"
    """The loss. rasft, gft, grpo and raft train on self-rollouts, the others on demonstrations only;
    each is a masked sum over response tokens, divided once by their number in the global batch."""

    objective_ratio: RatioLevel = "sequence"
    """rasft: the drift ratio is one number per sequence (of mean logprobs), one per token, or off (1)."""

    objective_ratio_direction: RatioDirection = "ref_over_policy"
    """rasft: which model is the numerator of the ratio. The method uses the frozen reference over the
    policy."""

    objective_ratio_power: float = 1.0
    """rasft: exponent of the ratio before clipping, > 0."""

    objective_ratio_clip_low: float = 0.4
    """rasft: smallest ratio, >= 0 and not above --objective-ratio-clip-high."""

    objective_ratio_clip_high: float = 1.2
    """rasft: largest ratio, > 0."""

    objective_dft_factor: bool = True
    """rasft: multiply each token's weight by its own detached probability (the DFT factor)."""

    objective_kl_coef: float | None = None
    """sft_kl, asft: weight of the full-vocabulary KL to the reference, >= 0. Unset: 0.1 for sft_kl, 0.05 for
    asft."""

    objective_kl_direction: KLDirection | None = None
    """sft_kl, asft: forward is KL(reference, policy), reverse is KL(policy, reference). Unset: forward for
    sft_kl, reverse for asft. The released ASFT code corresponds to forward with coefficient 0.1."""

    objective_profit_threshold: float = 0.1
    """profit: only tokens whose probability is above this are trained on, in [0, 1)."""

    objective_iw_level: Literal["sequence", "token"] = "sequence"
    """iw_sft: importance weight per sequence (of mean logprobs) or per token."""

    objective_iw_power: float | None = None
    """iw_sft: exponent of the ratio before clipping, > 0. Unset: 2 per sequence, 1 per token."""

    objective_iw_clip_low: float | None = None
    """iw_sft: smallest weight, >= 0. Unset: 0 per sequence, 0.2 per token."""

    objective_iw_clip_high: float | None = None
    """iw_sft: largest weight, > 0. Unset: 16 per sequence, 1.8 per token."""

    objective_psft_clip_low: float = 0.8
    """psft: lower bound of the policy ratio itself (not an epsilon), in [0, 1]."""

    objective_psft_clip_high: float = 1.28
    """psft: upper bound of the policy ratio itself, >= 1; above it a token has no gradient."""

    objective_gft_threshold: float = 0.1
    """gft: tokens above this probability get the full gradient, the others the DFT factor. In [0, 1]."""

    objective_grpo_clip_low: float = 0.2
    """grpo: epsilon below 1 of the ratio to the policy at the window's start, in [0, 1]. Rollouts of --rollout-lag 1 or of
    a replay are older than that policy; the ratio does not correct for it."""

    objective_grpo_clip_high: float | None = None
    """grpo: epsilon above 1 of the policy ratio, >= 0. Unset: 0.2, or 0.28 with --objective-grpo-dapo."""

    objective_grpo_beta: float | None = None
    """grpo: weight of the per-token KL estimate to the reference, >= 0; 0 needs no reference. Unset: 0.001,
    or 0 with --objective-grpo-dapo."""

    objective_grpo_dapo: bool = False
    """grpo: the DAPO variant: larger upper clip, no KL, and groups all right or all wrong are left out. Each can be set
    apart: --objective-grpo-clip-high, --objective-grpo-beta, --no-weighting-skip-degenerate."""

    objective_raft_loss: Literal["dft", "sft"] = "dft"
    """raft: loss on the verified self-rollouts."""

    objective_logprob_chunk_tokens: int | None = None
    """Tokens per vocabulary projection: logits exist for this many tokens at a time and are recomputed in the
    backward pass. Smaller saves memory; 0 projects all at once, which saves the recomputation. Unset: as many as 3 GiB of
    logits hold on a GPU, 1024 on a CPU."""

    objective_logprob_kernels: LogprobKernels = "auto"
    """What computes log-probabilities and KL from the logits: fused (Triton kernels, 6 to 10 bytes of memory traffic a
    logit), plain (torch operators, 48 and more), or auto: fused on a GPU, plain on a CPU."""

    def __post_init__(self) -> None:
        self._check_ratio()
        self._check_policy_ratios()
        _require_at_least("--objective-kl-coef", self.objective_kl_coef, 0.0)
        if not 0.0 <= self.objective_profit_threshold < 1.0:
            raise ValueError(
                f"--objective-profit-threshold must be in [0, 1), got {self.objective_profit_threshold}: it "
                "is a token probability, and no token lies above 1. The published value is 0.1."
            )
        if not 0.0 <= self.objective_gft_threshold <= 1.0:
            raise ValueError(
                f"--objective-gft-threshold must be in [0, 1], got {self.objective_gft_threshold}: it is a "
                "token probability. Use 0 for plain cross-entropy, 1 for the DFT factor everywhere."
            )
        if self.objective_logprob_chunk_tokens is not None and self.objective_logprob_chunk_tokens < 0:
            raise ValueError(
                "--objective-logprob-chunk-tokens must be >= 0, got "
                f"{self.objective_logprob_chunk_tokens}. Use 0 to project all tokens at once."
            )

    def _check_ratio(self) -> None:
        _require_range(
            "--objective-ratio-clip-low",
            self.objective_ratio_clip_low,
            "--objective-ratio-clip-high",
            self.objective_ratio_clip_high,
        )
        iw = self.iw_rule()
        _require_range("--objective-iw-clip-low", iw.clip_low, "--objective-iw-clip-high", iw.clip_high)
        for flag, power in (
            ("--objective-ratio-power", self.objective_ratio_power),
            ("--objective-iw-power", iw.power),
        ):
            if power <= 0:
                raise ValueError(
                    f"{flag} must be > 0, got {power}. To invert the ratio use --objective-ratio-direction; "
                    "to leave it out use --objective-ratio off."
                )

    def _check_policy_ratios(self) -> None:
        if not 0.0 <= self.objective_psft_clip_low <= 1.0 <= self.objective_psft_clip_high:
            raise ValueError(
                "--objective-psft-clip-low must be in [0, 1] and --objective-psft-clip-high >= 1, got "
                f"{self.objective_psft_clip_low} and {self.objective_psft_clip_high}: they bound the ratio "
                "itself, which is 1 at the start. For an epsilon of 0.2 give 0.8 and 1.2."
            )
        if not 0.0 <= self.objective_grpo_clip_low <= 1.0:
            raise ValueError(
                f"--objective-grpo-clip-low must be in [0, 1], got {self.objective_grpo_clip_low}: it is an "
                "epsilon below 1. For a lower bound of 0.8 give 0.2."
            )
        _require_at_least("--objective-grpo-clip-high", self.objective_grpo_clip_high, 0.0)
        _require_at_least("--objective-grpo-beta", self.objective_grpo_beta, 0.0)

    def needs_reference_logprobs(self) -> bool:
        """Whether each response token's logprob under the frozen reference must be given."""
        match self.objective:
            case "rasft":
                return self.objective_ratio != "off"
            case "iw_sft":
                return True
            case "grpo":
                return self.grpo_beta() > 0
            case _:
                return False

    def needs_old_logprobs(self) -> bool:
        """Whether each response token's logprob under the policy of the outer step (or rollout) must be
        given."""
        return self.objective in ("psft", "grpo")

    def needs_reference_distribution(self) -> bool:
        """Whether the reference's full next-token distribution is needed: a reference forward in each
        step."""
        return self.objective in _DEFAULT_KL_TERMS

    def needs_reference(self) -> bool:
        """Whether the frozen reference is needed at all."""
        return self.needs_reference_logprobs() or self.needs_reference_distribution()

    def uses_rollouts(self) -> bool:
        """Whether the policy's own responses are trained on."""
        return self.objective in ("rasft", "gft", "grpo", "raft")

    def kl_term(self) -> KLTerm:
        """Coefficient and direction of the full-vocabulary KL, the objective's defaults filled in."""
        default = _DEFAULT_KL_TERMS[self.objective]
        return KLTerm(
            default.coef if self.objective_kl_coef is None else self.objective_kl_coef,
            self.objective_kl_direction or default.direction,
        )

    def ratio_rule(self) -> RatioRule:
        """The drift ratio of rasft."""
        return RatioRule(
            self.objective_ratio,
            self.objective_ratio_direction,
            self.objective_ratio_power,
            self.objective_ratio_clip_low,
            self.objective_ratio_clip_high,
        )

    def iw_rule(self) -> RatioRule:
        """The importance weight of iw_sft, the level's defaults filled in."""
        power, low, high = (2.0, 0.0, 16.0) if self.objective_iw_level == "sequence" else (1.0, 0.2, 1.8)
        return RatioRule(
            self.objective_iw_level,
            "policy_over_ref",
            power if self.objective_iw_power is None else self.objective_iw_power,
            low if self.objective_iw_clip_low is None else self.objective_iw_clip_low,
            high if self.objective_iw_clip_high is None else self.objective_iw_clip_high,
        )

    def grpo_clip_high(self) -> float:
        """Epsilon above 1, the preset's default filled in."""
        if self.objective_grpo_clip_high is not None:
            return self.objective_grpo_clip_high
        return 0.28 if self.objective_grpo_dapo else 0.2

    def grpo_beta(self) -> float:
        """Weight of the KL estimate, the preset's default filled in."""
        if self.objective_grpo_beta is not None:
            return self.objective_grpo_beta
        return 0.0 if self.objective_grpo_dapo else 0.001


def _require_range(low_flag: str, low: float, high_flag: str, high: float) -> None:
    if not 0.0 <= low <= high or high == 0.0:
        raise ValueError(
            f"{low_flag} must be >= 0 and at most {high_flag}, which must be > 0; got {low} and {high}. "
            "Give both in ascending order."
        )


def _require_at_least(flag: str, value: float | None, minimum: float) -> None:
    if value is not None and not value >= minimum:
        raise ValueError(f"{flag} must be >= {minimum:g}, got {value}. Use 0 to switch the term off.")
