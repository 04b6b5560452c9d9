"""The parts of the objectives' losses, as masked sums over packed tokens.

Nothing here divides by a token count. The caller adds up ``LossSums`` over micro-batches and over the data- and context-parallel
ranks and divides once, so the way in which a batch is split cannot change its gradient.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.objective.declaration import Objective, RatioRule

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this magnitude before exponentiation, so that one outlier cannot overflow."""


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """The contribution of one micro-batch to the loss, on one context-parallel rank."""

    loss_sum: Tensor
    """Scalar with autograd graph: sum of the token losses. Divide by the global sum of ``denominator``."""

    denominator: Tensor
    """Scalar int64: number of response tokens; for profit, of response tokens above its threshold (may be 0, even globally). Tokens
    of sequences that are not counted (``PackedTokens.are_counted``) are left out."""

    metrics: dict[str, Tensor]
    """Metric name without the package -> [sum, count], fp32, detached. Sum over micro-batches, data- and context-parallel
    ranks, then divide. The names depend on the flags only."""


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """The loss of each token. Values outside the mask are ignored."""

    loss: Tensor
    """[t] with autograd graph."""

    counted: Tensor
    """[t] bool: the tokens that are trained on, and that the denominator counts. The loss of all others is dropped."""

    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """The tokens of one micro-batch, or this context-parallel rank's share of them.

    All tokens of a sequence are in one micro-batch; only context parallelism splits a sequence. Values where the mask is 0 are
    never read and may be anything. The objectives build their losses from the methods.
    """

    logprobs: Tensor
    """[t] float, nats: log p of each label under the policy, with its graph."""

    loss_mask: Tensor
    """[t] bool or 0/1: 1 on response tokens."""

    segment_ids: Tensor
    """[t] int64 in [0, num_segments): the sequence of each token; any number for padding. The same numbering on every rank of
    ``cp_group``."""

    num_segments: int
    """Sequences in this micro-batch (n), the same on every rank of ``cp_group``."""

    weights: Tensor
    """[n] float: A of each sequence; multiplies the loss of all its tokens in every objective."""

    are_counted: Tensor | None = None
    """[n] bool: whether each sequence's tokens count in the denominator; None if all do."""

    ref_logprobs: Tensor | None = None
    """[t] float, nats: log p of each label under the frozen reference."""

    old_logprobs: Tensor | None = None
    """[t] float, nats: log p of each label under the policy at the last refresh."""

    teacher_logprobs: Tensor | None = None
    """[t] float, nats: log p of each label under the teacher."""

    kl: Tensor | None = None
    """[t] float, nats: full-vocabulary KL between policy and reference, with its graph."""

    cp_group: ProcessGroup | None = None
    """Group over which each sequence's tokens are divided; None if every sequence is complete on this rank."""

    def __post_init__(self) -> None:
        for name in ("loss_mask", "segment_ids", "ref_logprobs", "old_logprobs", "teacher_logprobs", "kl"):
            values = getattr(self, name)
            assert values is None or values.shape == self.logprobs.shape, (
                f"{name} has shape {tuple(values.shape)}, logprobs {tuple(self.logprobs.shape)}"
            )
        assert self.weights.shape == (self.num_segments,), (
            f"weights has shape {tuple(self.weights.shape)} for {self.num_segments} sequences"
        )

    def masked(self) -> "PackedTokens":
        """Returns a copy with zeros wherever the mask is 0, so that a NaN there reaches neither the loss nor a gradient."""
        mask = self.loss_mask.bool()

        def masked(values: Tensor) -> Tensor:
            return torch.where(mask, values, values.new_zeros(()))

        def constant(values: Tensor | None) -> Tensor | None:
            return None if values is None else masked(values).detach()

        return replace(
            self,
            logprobs=masked(self.logprobs),
            loss_mask=mask,
            weights=self.weights.detach(),
            ref_logprobs=constant(self.ref_logprobs),
            old_logprobs=constant(self.old_logprobs),
            teacher_logprobs=constant(self.teacher_logprobs),
            kl=None if self.kl is None else masked(self.kl),
        )

    def token_weights(self) -> Tensor:
        """A of each token's sequence. [n] -> [t]"""
        return self.weights[self.segment_ids].to(self.logprobs.dtype)

    def probabilities(self) -> Tensor:
        """Detached p of each label. [t]"""
        return self.logprobs.detach().exp()

    def sum_and_count(self, values: Tensor) -> Tensor:
        """[2] fp32: sum of ``values`` [t] over the response tokens, and their number."""
        return _sum_and_count(values, self.loss_mask)

    def weighted_ce(self, weight: Tensor, metrics: dict[str, Tensor] | None = None) -> TokenTerms:
        """The loss weight * (-log p) with a detached ``weight`` [t]; the gradient in log p is exactly -weight."""
        weight_mean = {"weight_mean": self.sum_and_count(weight)}
        return TokenTerms(
            loss=weight * -self.logprobs, counted=self.loss_mask, metrics=weight_mean | (metrics or {})
        )

    def with_distribution_kl(self, terms: TokenTerms, coef: float) -> TokenTerms:
        """``terms`` with coef * A * KL added to the loss of each token."""
        kl = _given(self.kl, "kl")
        metrics = {"kl_nats": self.sum_and_count(kl.detach())}
        loss = terms.loss + coef * self.token_weights() * kl
        return replace(terms, loss=loss, metrics=terms.metrics | metrics)

    def teacher_distance(self) -> TokenTerms:
        """A (l - t)^2 / 2 per token, with l under the policy and the constant t under the teacher.

        Its gradient in l is A (l - t). On tokens that the policy samples, the mean of (l - t) grad l is the gradient of the reverse KL
        of the policy to the teacher at that position, because the mean of grad l is 0.
        """
        distance = self.logprobs - _given(self.teacher_logprobs, "teacher_logprobs")
        metrics = {"teacher_kl_nats": self.sum_and_count(distance.detach())}
        loss = self.token_weights() * distance.square() / 2
        return TokenTerms(loss=loss, counted=self.loss_mask, metrics=metrics)

    def clipped_surrogate(
        self, clip_low: float, clip_high: float, dual_clip: float | None = None
    ) -> TokenTerms:
        """-min(q A, clip(q) A) per token, where q is the ratio of policy to old policy.

        Args:
            dual_clip: largest q of a token with a negative advantage (arXiv 1912.09729); None for no such limit.
        """
        advantage = self.token_weights()
        ratio = _clamp(self.logprobs - _given(self.old_logprobs, "old_logprobs")).exp()
        unclipped, clipped = ratio * advantage, ratio.clamp(clip_low, clip_high) * advantage
        is_clipped = clipped < unclipped
        metrics = {
            "policy_ratio_mean": self.sum_and_count(ratio.detach()),
            "clip_frac": self.sum_and_count(is_clipped),
        }
        value = torch.where(is_clipped, clipped, unclipped)
        if dual_clip is not None:
            is_limited = (advantage < 0) & (value < dual_clip * advantage)
            metrics["dual_clip_frac"] = self.sum_and_count(is_limited)
            value = torch.where(is_limited, dual_clip * advantage, value)
        return TokenTerms(loss=-value, counted=self.loss_mask, metrics=metrics)

    def reference_kl_estimate(self, cap: float | None = None) -> Tensor:
        """[t] Estimate of KL(policy || reference) from the sampled token: never negative, unbiased on the policy's own samples.

        Args:
            cap: largest estimate, nats. A token above it has no gradient from this term. None for no such limit.
        """
        log_ratio = _clamp(_given(self.ref_logprobs, "ref_logprobs") - self.logprobs)
        estimate = log_ratio.exp() - log_ratio - 1.0
        return estimate if cap is None else estimate.clamp(max=cap)

    def reference_ratio(self, rule: RatioRule) -> tuple[Tensor, dict[str, Tensor]]:
        """Detached clipped ratio of policy and reference for each token [t], and its metrics.

        At sequence level this runs one all-reduce of [2, n] on ``cp_group``. It takes the mean of the differences instead of the
        difference of the means. Both are equal, but the first is exactly 0 if policy and reference agree, in any order of adding.
        """
        if rule.level == "off":
            return torch.ones_like(self.logprobs), {}
        gap = _given(self.ref_logprobs, "ref_logprobs") - self.logprobs.detach()
        if rule.direction == "policy_over_ref":
            gap = -gap
        if rule.level == "token":
            ratio, is_clipped = _clipped_exp(gap, rule)
            return ratio, _ratio_metrics(ratio, is_clipped, self.loss_mask)
        mean_gap, num_tokens = self._segment_means(gap)
        ratio, is_clipped = _clipped_exp(mean_gap.to(gap.dtype), rule)
        metrics = _ratio_metrics(ratio, is_clipped, num_tokens > 0)
        # Every context-parallel rank has the ratios of all sequences, and the metrics are summed over these ranks.
        cp_size = 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
        return ratio[self.segment_ids], {name: metric / cp_size for name, metric in metrics.items()}

    def _segment_means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of ``values`` (0 where masked) over each sequence's response tokens, and their number. fp64, both [n]."""
        # fp64, so that the order of adding tokens and ranks does not change the ratio, which is rounded to fp32.
        sums = torch.zeros(2, self.num_segments, dtype=torch.float64, device=values.device)
        sums.index_add_(1, self.segment_ids, torch.stack([values.double(), self.loss_mask.double()]))
        if self.cp_group is not None:
            dist.all_reduce(sums, group=self.cp_group)
        return sums[0] / sums[1].clamp(min=1.0), sums[1]


def token_loss_sums(tokens: PackedTokens, objective: Objective) -> LossSums:
    """Loss and metrics of one micro-batch.

    Runs one all-reduce of [2, n] on ``cp_group`` if the objective has a sequence-level ratio, otherwise none. ``ref_logprobs``,
    ``old_logprobs`` and ``kl`` must be set if the objective needs them.
    """
    tokens = tokens.masked()
    terms = objective.token_terms(tokens)
    zero = terms.loss.new_zeros(())
    metrics = {
        "ce_nats": tokens.sum_and_count(-tokens.logprobs.detach()),
        "p_mean": tokens.sum_and_count(tokens.probabilities()),
    }
    if objective.needs_reference_logprobs() and tokens.ref_logprobs is not None:
        metrics["ref_logprob_gap_nats"] = tokens.sum_and_count(tokens.logprobs.detach() - tokens.ref_logprobs)
    counted = terms.counted
    if tokens.are_counted is not None:
        counted = counted & tokens.are_counted[tokens.segment_ids]
    return LossSums(
        loss_sum=torch.where(terms.counted, terms.loss, zero).sum(),
        denominator=counted.sum(),
        metrics=metrics | terms.metrics,
    )


def _clipped_exp(gap: Tensor, rule: RatioRule) -> tuple[Tensor, Tensor]:
    """Returns clip(exp(power * gap)), and for each value whether the clip changed it."""
    raw = _clamp(rule.power * gap).exp()
    ratio = raw.clamp(rule.clip_low, rule.clip_high)
    return ratio, ratio != raw


def _ratio_metrics(ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "ratio_mean": _sum_and_count(ratio, mask),
        "ratio_clip_frac": _sum_and_count(is_clipped, mask),
    }


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """[2] fp32: sum of ``values`` where ``mask`` is set, and the number of these values."""
    values = values.float()
    return torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum().float()])


def _given(values: Tensor | None, name: str) -> Tensor:
    assert values is not None, f"the objective needs {name}, which the micro-batch lacks"
    return values
