"""The losses: RASFT and its baselines, as masked sums over packed tokens.

An objective is a function of (``PackedTokens``, ``ObjectiveConfig``) that returns ``TokenTerms``;
``OBJECTIVES`` names them. Nothing here divides by a token count: the caller sums ``LossSums`` over
micro-batches and over the data- and context-parallel ranks and divides once, so how a batch is split cannot
change its gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.config.objective import ObjectiveConfig, ObjectiveName, RatioRule

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this before exponentiation, so that one outlier cannot overflow."""


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """The tokens of one micro-batch, or this context-parallel rank's share of them.

    A sequence lies whole in one micro-batch; only context parallelism splits it. Values where the mask is 0
    are never read, and may be anything.
    """

    logprobs: Tensor
    """[t] float, nats: log p of each label under the policy, with its graph."""

    loss_mask: Tensor
    """[t] bool or 0/1: 1 on response tokens."""

    segment_ids: Tensor
    """[t] int64 in [0, num_segments): the sequence of each token; padding may name any. The same numbering on
    every rank of ``cp_group``."""

    num_segments: int
    """Sequences in this micro-batch (n), the same on every rank of ``cp_group``."""

    weights: Tensor
    """[n] float: A of each sequence; multiplies all its tokens' loss in every objective."""

    ref_logprobs: Tensor | None = None
    """[t] float, nats: log p of each label under the frozen reference."""

    old_logprobs: Tensor | None = None
    """[t] float, nats: log p of each label under the policy of the outer step (psft) or of the rollout
    (grpo)."""

    kl: Tensor | None = None
    """[t] float, nats: full-vocabulary KL between policy and reference, with its graph."""

    cp_group: ProcessGroup | None = None
    """Group that shares each sequence's tokens; None if the tokens here are all."""

    def __post_init__(self) -> None:
        for name in ("loss_mask", "segment_ids", "ref_logprobs", "old_logprobs", "kl"):
            values = getattr(self, name)
            assert values is None or values.shape == self.logprobs.shape, (
                f"{name} has shape {tuple(values.shape)}, logprobs {tuple(self.logprobs.shape)}"
            )
        assert self.weights.shape == (self.num_segments,), (
            f"weights has shape {tuple(self.weights.shape)} for {self.num_segments} sequences"
        )


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """What one micro-batch adds to the loss, on one context-parallel rank."""

    loss_sum: Tensor
    """Scalar with graph: sum of the token losses. Divide by the global sum of ``denominator``."""

    denominator: Tensor
    """Scalar int64: response tokens here; for profit, those that passed its threshold (may be 0, also
    globally)."""

    metrics: dict[str, Tensor]
    """Name without its room -> [sum, count], fp32, detached: sum over micro-batches, data- and
    context-parallel ranks, then divide. The names depend on the options only."""


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """What an objective says about each token; values outside the mask are ignored."""

    loss: Tensor
    """[t] with graph."""

    counted: Tensor
    """[t] bool: the tokens in the denominator; the loss of all others is dropped."""

    metrics: dict[str, Tensor] = field(default_factory=dict)


def token_loss_sums(tokens: PackedTokens, config: ObjectiveConfig) -> LossSums:
    """Loss and metrics of one micro-batch under ``config.objective``.

    Runs one all-reduce of [2, n] on ``cp_group`` where the objective has a sequence-level ratio, none
    otherwise. Needs ``ref_logprobs``, ``old_logprobs`` and ``kl`` exactly where ``config.needs_*`` says so.
    """
    tokens = _without_masked_values(tokens)
    terms = OBJECTIVES[config.objective](tokens, config)
    zero = terms.loss.new_zeros(())
    logprobs, mask = tokens.logprobs.detach(), tokens.loss_mask
    metrics = {
        "ce_nats": _sum_and_count(-logprobs, mask),
        "p_mean": _sum_and_count(logprobs.exp(), mask),
    }
    if config.needs_reference_logprobs() and tokens.ref_logprobs is not None:
        gap = logprobs - tokens.ref_logprobs
        metrics["ref_logprob_gap_nats"] = _sum_and_count(gap, mask)
    return LossSums(
        loss_sum=torch.where(terms.counted, terms.loss, zero).sum(),
        denominator=terms.counted.sum(),
        metrics=metrics | terms.metrics,
    )


def rasft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """-log p, weighted by the clipped drift ratio, A and p itself (the DFT factor), all detached."""
    ratio, metrics = _reference_ratio(tokens, config.ratio_rule())
    weight = ratio * _token_weights(tokens)
    if config.objective_dft_factor:
        weight = weight * _probabilities(tokens)
    return _weighted_ce(tokens, weight, metrics)


def sft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """-log p."""
    return _weighted_ce(tokens, _token_weights(tokens))


def dft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """-p log p with the first p detached (arXiv 2508.05629)."""
    return _weighted_ce(tokens, _token_weights(tokens) * _probabilities(tokens))


def sft_kl(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """SFT plus the full-vocabulary KL to the reference at each response token."""
    return _with_distribution_kl(tokens, config, sft(tokens, config))


def asft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """DFT plus the full-vocabulary KL to the reference at each response token."""
    return _with_distribution_kl(tokens, config, dft(tokens, config))


def profit(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """SFT on the tokens that the policy finds likely enough (arXiv 2601.09195), divided by their number."""
    is_kept = tokens.loss_mask & (_probabilities(tokens) > config.objective_profit_threshold)
    metrics = {"kept_frac": _sum_and_count(is_kept, tokens.loss_mask)}
    terms = _weighted_ce(tokens, _token_weights(tokens), metrics)
    return TokenTerms(loss=terms.loss, counted=is_kept, metrics=terms.metrics)


def iw_sft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """SFT weighted by the clipped, detached ratio of policy to reference (arXiv 2507.12856)."""
    ratio, metrics = _reference_ratio(tokens, config.iw_rule())
    return _weighted_ce(tokens, ratio * _token_weights(tokens), metrics)


def psft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """Clipped surrogate with the policy of the outer step and A as advantage (arXiv 2508.17784)."""
    return _clipped_surrogate(tokens, config.objective_psft_clip_low, config.objective_psft_clip_high)


def gft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """-A c log p, c = 1 on tokens above the threshold and the detached p on the others (arXiv 2604.14258)."""
    probabilities = _probabilities(tokens)
    is_likely = probabilities > config.objective_gft_threshold
    metrics = {"full_gradient_frac": _sum_and_count(is_likely, tokens.loss_mask)}
    factor = torch.where(is_likely, 1.0, probabilities)
    return _weighted_ce(tokens, _token_weights(tokens) * factor, metrics)


def raft(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """DFT or SFT; that the tokens are verified self-rollouts is the batch's doing."""
    return (dft if config.objective_raft_loss == "dft" else sft)(tokens, config)


def grpo(tokens: PackedTokens, config: ObjectiveConfig) -> TokenTerms:
    """Clipped surrogate with the group advantage A, plus a KL estimate to the reference (arXiv
    2402.03300)."""
    terms = _clipped_surrogate(tokens, 1.0 - config.objective_grpo_clip_low, 1.0 + config.grpo_clip_high())
    beta = config.grpo_beta()
    if beta == 0.0:
        return terms
    log_ratio = _clamp(_given(tokens.ref_logprobs, "ref_logprobs", "grpo with beta > 0") - tokens.logprobs)
    kl = log_ratio.exp() - log_ratio - 1.0  # never negative, unbiased under samples of the policy
    metrics = {"kl_nats": _sum_and_count(kl.detach(), tokens.loss_mask)}
    return TokenTerms(loss=terms.loss + beta * kl, counted=terms.counted, metrics=terms.metrics | metrics)


OBJECTIVES: dict[str, Callable[[PackedTokens, ObjectiveConfig], TokenTerms]] = {
    "rasft": rasft,
    "sft": sft,
    "sft_kl": sft_kl,
    "dft": dft,
    "asft": asft,
    "profit": profit,
    "iw_sft": iw_sft,
    "psft": psft,
    "gft": gft,
    "raft": raft,
    "grpo": grpo,
}
assert OBJECTIVES.keys() == set(get_args(ObjectiveName)), "every --objective has its loss in OBJECTIVES"


def _without_masked_values(tokens: PackedTokens) -> PackedTokens:
    """Zeros wherever the mask is 0, so that a NaN there reaches neither the loss nor a gradient."""
    mask = tokens.loss_mask.bool()

    def masked(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(mask, values, values.new_zeros(()))

    logprobs = masked(tokens.logprobs)
    assert logprobs is not None
    ref_logprobs, old_logprobs = masked(tokens.ref_logprobs), masked(tokens.old_logprobs)
    return PackedTokens(
        logprobs=logprobs,
        loss_mask=mask,
        segment_ids=tokens.segment_ids,
        num_segments=tokens.num_segments,
        weights=tokens.weights.detach(),
        ref_logprobs=None if ref_logprobs is None else ref_logprobs.detach(),
        old_logprobs=None if old_logprobs is None else old_logprobs.detach(),
        kl=masked(tokens.kl),
        cp_group=tokens.cp_group,
    )


def _token_weights(tokens: PackedTokens) -> Tensor:
    """A of each token's sequence. [n] -> [t]"""
    return tokens.weights[tokens.segment_ids].to(tokens.logprobs.dtype)


def _probabilities(tokens: PackedTokens) -> Tensor:
    """Detached p of each label. [t]"""
    return tokens.logprobs.detach().exp()


def _weighted_ce(
    tokens: PackedTokens, weight: Tensor, metrics: dict[str, Tensor] | None = None
) -> TokenTerms:
    """The loss weight * (-log p); the gradient in log p is exactly -weight."""
    weight_mean = {"weight_mean": _sum_and_count(weight, tokens.loss_mask)}
    return TokenTerms(
        loss=weight * -tokens.logprobs, counted=tokens.loss_mask, metrics=weight_mean | (metrics or {})
    )


def _with_distribution_kl(tokens: PackedTokens, config: ObjectiveConfig, terms: TokenTerms) -> TokenTerms:
    kl = _given(tokens.kl, "kl", config.objective)
    metrics = {"kl_nats": _sum_and_count(kl.detach(), tokens.loss_mask)}
    loss = terms.loss + config.kl_term().coef * _token_weights(tokens) * kl
    return TokenTerms(loss=loss, counted=terms.counted, metrics=terms.metrics | metrics)


def _clipped_surrogate(tokens: PackedTokens, clip_low: float, clip_high: float) -> TokenTerms:
    """-min(q A, clip(q) A) per token, q = policy over old policy."""
    advantage = _token_weights(tokens)
    ratio = _clamp(tokens.logprobs - _given(tokens.old_logprobs, "old_logprobs", "psft and grpo")).exp()
    unclipped, clipped = ratio * advantage, ratio.clamp(clip_low, clip_high) * advantage
    metrics = {
        "policy_ratio_mean": _sum_and_count(ratio.detach(), tokens.loss_mask),
        "clip_frac": _sum_and_count(clipped < unclipped, tokens.loss_mask),
    }
    # where, not minimum: inside the bounds the two are equal, and minimum would halve the gradient's path
    loss = -torch.where(clipped < unclipped, clipped, unclipped)
    return TokenTerms(loss=loss, counted=tokens.loss_mask, metrics=metrics)


def _reference_ratio(tokens: PackedTokens, rule: RatioRule) -> tuple[Tensor, dict[str, Tensor]]:
    """Detached clipped ratio of policy and reference for each token [t], and its metrics.

    At sequence level the mean of the differences is taken, not the difference of the means: the same number,
    but exactly 0 where policy and reference agree, in whatever order a device adds.
    """
    if rule.level == "off":
        return torch.ones_like(tokens.logprobs), {}
    gap = (
        _given(tokens.ref_logprobs, "ref_logprobs", "an objective with a reference ratio")
        - tokens.logprobs.detach()
    )
    if rule.direction == "policy_over_ref":
        gap = -gap
    if rule.level == "token":
        ratio, is_clipped = _clipped_exp(gap, rule)
        return ratio, _ratio_metrics(ratio, is_clipped, tokens.loss_mask)
    mean_gap, num_tokens = _segment_means(tokens, gap)
    ratio, is_clipped = _clipped_exp(mean_gap.to(gap.dtype), rule)
    metrics = _ratio_metrics(ratio, is_clipped, num_tokens > 0)
    cp_size = 1 if tokens.cp_group is None else dist.get_world_size(tokens.cp_group)
    # every context-parallel rank reports every sequence
    return ratio[tokens.segment_ids], {name: metric / cp_size for name, metric in metrics.items()}


def _clipped_exp(gap: Tensor, rule: RatioRule) -> tuple[Tensor, Tensor]:
    """clip(exp(power * gap)), and where the clip acted."""
    raw = _clamp(rule.power * gap).exp()
    ratio = raw.clamp(rule.clip_low, rule.clip_high)
    return ratio, ratio != raw


def _ratio_metrics(ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "ratio_mean": _sum_and_count(ratio, mask),
        "ratio_clip_frac": _sum_and_count(is_clipped, mask),
    }


def _segment_means(tokens: PackedTokens, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of ``values`` (0 where masked) over each sequence's response tokens, and their number. fp64, both
    [n]."""
    sums = torch.zeros(2, tokens.num_segments, dtype=torch.float64, device=values.device)
    sums.index_add_(1, tokens.segment_ids, torch.stack([values.double(), tokens.loss_mask.double()]))
    if tokens.cp_group is not None:
        dist.all_reduce(sums, group=tokens.cp_group)
    return sums[0] / sums[1].clamp(min=1.0), sums[1]


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """[2] fp32: sum of ``values`` where ``mask`` is set, and how many those are."""
    values = values.float()
    return torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum().float()])


def _given(values: Tensor | None, name: str, user: str) -> Tensor:
    assert values is not None, f"{user} needs {name}: fill it where ObjectiveConfig.needs_* says so"
    return values
