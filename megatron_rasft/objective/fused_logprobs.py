"""Log-probabilities and KL from hidden states with fused kernels, at the cost of a fused cross-entropy.

One autograd function covers all chunks of tokens. The forward pass reads each logit once. The backward pass reads it once more and
overwrites it with its gradient. Besides the matrix products this is 6 bytes of memory traffic per BF16 logit, 10 with a KL. The
backward pass runs a single collective, the sum of the hidden states' gradient, and adds up the weight's gradient in fp32.
``megatron_rasft.objective.logprobs`` computes the same values in plain torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.objective.logit_kernels import (
    FORWARD_KL,
    KL_KINDS,
    NO_REFERENCE,
    logit_statistics,
    logits_to_gradient_,
)
from megatron_rasft.objective.logprobs import all_reduce, shard_bounds
from megatron_rasft.types import KLDirection


class OutputWeight(Protocol):
    """The weight of the vocabulary projection, and the destination of its gradient."""

    weight: Tensor
    """[v/tp, h] this rank's shard of the weight."""

    tp_group: ProcessGroup | None
    """Group over which the vocabulary is split."""

    sums_hidden_grad: bool
    """Whether the hidden states' gradient must be summed over ``tp_group``. False under sequence parallelism, because the backward
    pass of the gather sums it."""

    def add_gradient(self, logits_grad: Tensor, hidden: Tensor, *, is_whole: bool) -> None:
        """Adds ``logits_grad.T @ hidden`` of one chunk, [c, v/tp] and [c, h], in fp32.

        Args:
            is_whole: whether this is the only chunk.
        """
        ...

    def finish_gradient(self) -> Tensor | None:
        """Returns the gradient that autograd receives for the weight, after the last chunk, and resets the sum."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReferenceLogits:
    """The reference distribution of a KL, which gets no gradient."""

    hidden: Tensor
    """[t, h_ref] the reference's hidden states for the same tokens."""

    weight: Tensor
    """[v/tp, h_ref] the reference's projection to the same vocabulary shard."""

    direction: KLDirection
    """``forward`` is KL(reference || policy), ``reverse`` is KL(policy || reference)."""


def fused_logprobs(
    hidden: Tensor,
    output: OutputWeight,
    labels: Tensor,
    vocab_size: int,
    chunk_tokens: int,
    reference: ReferenceLogits | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label, and the exact KL to a reference.

    Runs two all-reduces on ``output.tp_group`` in the forward pass (maxima; sums) and at most one per chunk in the backward
    pass (the hidden states' gradient). Every rank of the group must call this with the same number of tokens.

    Args:
        hidden: [t, h] inputs of the projection, complete on every rank (already gathered under sequence parallelism).
        output: the projection.
        labels: [t] int64 global token ids, already shifted. An id outside [0, vocab_size) gives NaN and no gradient
            through a loss that leaves the token out with ``torch.where``.
        vocab_size: true vocabulary size; entries beyond it are padding and have probability 0.
        chunk_tokens: number of tokens whose logits exist at a time; 0 for all. The logits of several chunks are recomputed in
            the backward pass. The logits of a single chunk are kept for the backward pass, which can then run only once.
        reference: the reference distribution of the KL; None without a KL.

    Returns:
        logprobs [t] fp32, nats, the same on every rank of the group; KL [t], or None without a reference.
    """
    logprobs, kl = _FusedLogprobs.apply(
        hidden, output.weight, output, labels.contiguous(), vocab_size, chunk_tokens or len(labels), reference
    )
    return logprobs, kl


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """The inputs of one call, and their parts for each chunk of tokens."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    reference: ReferenceLogits | None
    size: int
    first_id: int
    num_valid: int

    @property
    def kind(self) -> int:
        return KL_KINDS[None if self.reference is None else self.reference.direction]

    @property
    def is_one(self) -> bool:
        return len(self.labels) <= self.size

    def slices(self) -> Iterator[slice]:
        # without tokens there is one empty chunk
        for start in range(0, max(len(self.labels), 1), max(self.size, 1)):
            yield slice(start, start + self.size)

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Logits [c, v/tp] of the policy, and of the reference if there is a KL, otherwise None."""
        ref = self.reference
        ref_logits = None if ref is None else ref.hidden[chunk] @ ref.weight.t()
        return self.hidden[chunk] @ self.weight.t(), ref_logits

    def statistics(self, chunk: slice, logits: Tensor, ref_logits: Tensor | None) -> Tensor:
        return logit_statistics(
            logits, self.labels[chunk], ref_logits, self.first_id, self.num_valid, self.kind
        )

    def to_gradient_(self, chunk: slice, logits: Tensor, ref_logits: Tensor | None, terms: Tensor) -> None:
        terms = terms[:, chunk].contiguous()
        logits_to_gradient_(
            logits, self.labels[chunk], ref_logits, terms, self.first_id, self.num_valid, self.kind
        )


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        output: OutputWeight,
        labels: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        reference: ReferenceLogits | None,
    ) -> tuple[Tensor, Tensor | None]:
        first_id, num_valid = shard_bounds(weight.shape[0], output.tp_group, vocab_size)
        chunks = _Chunks(
            hidden=hidden,
            weight=weight,
            labels=labels,
            reference=reference,
            size=chunk_tokens,
            first_id=first_id,
            num_valid=num_valid,
        )
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.kept = None
        parts = []
        for chunk in chunks.slices():
            logits, ref_logits = chunks.logits(chunk)
            parts.append(chunks.statistics(chunk, logits, ref_logits))
            if needs_grad and chunks.is_one:
                ctx.kept = logits, ref_logits
            del logits, ref_logits  # freed here, so that only one chunk's logits exist at a time
        statistics = torch.cat(parts, dim=1)
        logprobs, kl, log_normaliser, kl_term = _combine(statistics, chunks.kind, output.tp_group)
        is_known = (labels >= 0) & (labels < vocab_size)
        ctx.chunks, ctx.output = chunks, output
        ctx.log_normaliser, ctx.kl_term = log_normaliser, kl_term
        return torch.where(is_known, logprobs, float("nan")), kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        chunks, output = ctx.chunks, ctx.output
        hidden_grad, weight_grad = None, None
        if ctx.needs_input_grad[0]:
            hidden_grad = torch.empty_like(chunks.hidden, memory_format=torch.contiguous_format)
        pending = []
        terms = _terms(ctx, grads)
        for chunk in chunks.slices():
            logits_grad, ref_logits = _kept_or_recomputed(ctx, chunk)
            chunks.to_gradient_(chunk, logits_grad, ref_logits, terms)
            del ref_logits
            if hidden_grad is not None:
                torch.mm(logits_grad, chunks.weight, out=hidden_grad[chunk])
                if output.sums_hidden_grad:
                    # Started before the product of the weight's gradient, so that the two overlap.
                    pending.append(dist.all_reduce(hidden_grad[chunk], group=output.tp_group, async_op=True))
            if ctx.needs_input_grad[1]:
                output.add_gradient(logits_grad, chunks.hidden[chunk], is_whole=chunks.is_one)
            del logits_grad
        for work in pending:
            work.wait()
        if ctx.needs_input_grad[1]:
            weight_grad = output.finish_gradient()
        return hidden_grad, weight_grad, None, None, None, None, None


def _kept_or_recomputed(ctx: Any, chunk: slice) -> tuple[Tensor, Tensor | None]:
    if not ctx.chunks.is_one:
        return ctx.chunks.logits(chunk)
    kept, ctx.kept = ctx.kept, None
    assert kept is not None, (
        "the backward pass has overwritten the logits with their gradient, so it cannot run again"
    )
    return kept


def _terms(ctx: Any, grads: tuple[Tensor | None, ...]) -> Tensor:
    """Returns the argument ``terms`` of ``logits_to_gradient_``, [2 or 4, t]."""
    rows = [grads[0], ctx.log_normaliser]
    if ctx.chunks.kind != NO_REFERENCE:
        rows += [grads[1], ctx.kl_term]
    return torch.stack(rows)


def _combine(
    statistics: Tensor, kind: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Combines the statistics of all shards.

    Returns:
        Log-probabilities, KL, log-normaliser, and the KL's term of the gradient, each [t].
    """
    local_max = statistics[0::3][: 1 if kind == NO_REFERENCE else 2]  # [1 or 2, t]
    global_max = all_reduce(local_max.clone(), dist.ReduceOp.MAX, tp_group)
    scale = (local_max - global_max).exp()
    sums = [statistics[1] * scale[0], statistics[2]]
    if kind != NO_REFERENCE:
        weighted_by = scale[1] if kind == FORWARD_KL else scale[0]
        sums += [statistics[4] * scale[1], statistics[5] * weighted_by]
    total = all_reduce(torch.stack(sums), dist.ReduceOp.SUM, tp_group)
    log_sum = total[0].log()
    logprobs = total[1] - global_max[0] - log_sum
    if kind == NO_REFERENCE:
        return logprobs, None, global_max[0] + log_sum, None
    max_gap = global_max[0] - global_max[1]
    # The logarithm of the quotient is exactly 0 for equal sums and precise near 0. The difference of logarithms is not.
    if kind == FORWARD_KL:
        kl = total[3] / total[2] + max_gap + (total[0] / total[2]).log()
        return logprobs, kl, global_max[0] + log_sum, global_max[1] + total[2].log()
    mean_gap = total[3] / total[0]
    kl = mean_gap - max_gap - (total[0] / total[2]).log()
    return logprobs, kl, global_max[0] + log_sum, mean_gap
