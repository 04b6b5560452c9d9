"""Log-probabilities and KL from logits sharded over the vocabulary, a chunk of tokens at a time.

Everything is computed in fp32 (fp64 if the logits are fp64). The backward pass recomputes the softmax from the logits, which
are saved in their own dtype, and one log-normaliser per token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_rasft.types import KLDirection

Projection = Callable[[Tensor], Tensor]
"""A function: hidden states [c, h] -> this rank's shard of the logits, [c, v/tp]."""


def vocab_parallel_logprobs(
    logits: Tensor, labels: Tensor, tp_group: ProcessGroup | None, vocab_size: int
) -> Tensor:
    """Log-probability of each label under logits sharded over the vocabulary.

    Runs two all-reduces on ``tp_group`` in the forward pass (the maximum; the sum of exponentials and the label's logit) and
    none in the backward pass. Each rank gets the gradient of its own shard, in the dtype of ``logits``.

    Args:
        logits: [..., v/tp] this rank's shard; rank r holds the ids r * v/tp and up.
        labels: [...] int64 global token ids, already shifted. An id outside [0, vocab_size) gives NaN and no
            gradient through a loss that leaves the token out with ``torch.where``.
        tp_group: group over which the vocabulary is split; None if the vocabulary is not split.
        vocab_size: true vocabulary size; entries beyond it are padding and have probability 0.

    Returns:
        [...] fp32 (fp64 for fp64 logits), nats, the same on every rank of ``tp_group``.
    """
    return _VocabParallelLogprobs.apply(logits, labels, tp_group, vocab_size)


def vocab_parallel_kl(
    policy_logits: Tensor,
    ref_logits: Tensor,
    tp_group: ProcessGroup | None,
    vocab_size: int,
    direction: KLDirection,
) -> Tensor:
    """Exact KL divergence over the whole vocabulary at each position, differentiable in the policy only.

    Runs three all-reduces on ``tp_group`` in the forward pass (both maxima; both sums; the divergence) and none in the backward
    pass.

    Args:
        policy_logits: [..., v/tp] this rank's shard of the policy's logits.
        ref_logits: [..., v/tp] the same shard of the reference's logits; treated as a constant.
        tp_group: group over which the vocabulary is split; None if the vocabulary is not split.
        vocab_size: true vocabulary size; entries beyond it are padding and are left out.
        direction: ``forward`` is KL(reference || policy), ``reverse`` is KL(policy || reference).

    Returns:
        [...] fp32 (fp64 for fp64 logits), nats, the same on every rank of ``tp_group``.
    """
    return _VocabParallelKL.apply(policy_logits, ref_logits.detach(), tp_group, vocab_size, direction)


def chunked_logprobs(
    hidden: Tensor,
    project: Projection,
    labels: Tensor,
    tp_group: ProcessGroup | None,
    vocab_size: int,
    chunk_tokens: int,
) -> Tensor:
    """Log-probability of each label from hidden states. The logits of ``chunk_tokens`` tokens exist at a time.

    Every rank of ``tp_group`` must call this with the same number of tokens. If a gradient is needed and there is more than one
    chunk, the backward pass recomputes the logits of each chunk, including the collectives.

    Args:
        hidden: [t, h] inputs of the vocabulary projection, complete on every rank of ``tp_group`` (already gathered under sequence
            parallelism).
        project: the projection. It must be deterministic, and its backward pass must sum the gradient of its input over
            ``tp_group``.
        labels: [t] int64 global token ids, see ``vocab_parallel_logprobs``.
        tp_group: group over which the vocabulary is split; None if the vocabulary is not split.
        vocab_size: true size of the vocabulary.
        chunk_tokens: tokens per projection; 0 for all at once.

    Returns:
        [t] fp32, nats.
    """

    def chunk_logprobs(hidden: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_logprobs(project(hidden), labels, tp_group, vocab_size)

    chunks = _chunk(chunk_tokens, hidden, labels)
    return torch.cat([_recomputed(chunk_logprobs, len(chunks), *chunk) for chunk in chunks])


def chunked_logprobs_and_kl(
    hidden: Tensor,
    project: Projection,
    ref_hidden: Tensor,
    ref_project: Projection,
    labels: Tensor,
    tp_group: ProcessGroup | None,
    vocab_size: int,
    chunk_tokens: int,
    direction: KLDirection,
) -> tuple[Tensor, Tensor]:
    """``chunked_logprobs`` and the exact KL to a reference, from one projection of the policy.

    Args:
        ref_hidden: [t, h_ref] the reference's hidden states for the same tokens; they get no gradient.
        ref_project: the reference's projection to the same vocabulary shard.
        direction: see ``vocab_parallel_kl``. The other arguments are those of ``chunked_logprobs``.

    Returns:
        logprobs [t] and KL [t], fp32, nats.
    """

    def chunk_terms(hidden: Tensor, ref_hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ref_logits = ref_project(ref_hidden)
        logits = project(hidden)
        return (
            vocab_parallel_logprobs(logits, labels, tp_group, vocab_size),
            vocab_parallel_kl(logits, ref_logits, tp_group, vocab_size, direction),
        )

    chunks = _chunk(chunk_tokens, hidden, ref_hidden.detach(), labels)
    terms = [_recomputed(chunk_terms, len(chunks), *chunk) for chunk in chunks]
    return torch.cat([logprobs for logprobs, _ in terms]), torch.cat([kl for _, kl in terms])


def _chunk(chunk_tokens: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits tensors of equal first dimension into chunks of tokens; one chunk if ``chunk_tokens`` is 0."""
    if chunk_tokens == 0:
        return [tensors]
    return list(zip(*(tensor.split(chunk_tokens) for tensor in tensors), strict=True))


def _recomputed(function: Callable[..., Any], num_chunks: int, *inputs: Tensor) -> Any:
    """Calls ``function``. With several chunks only its inputs are kept, and the backward pass calls it again."""
    if num_chunks == 1 or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def shard_bounds(width: int, tp_group: ProcessGroup | None, vocab_size: int) -> tuple[int, int]:
    """The first token id of this rank, and the number of its ``width`` columns that are not padding."""
    rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    assert vocab_size <= width * size, (
        f"vocabulary of {vocab_size} does not fit {size} shards of {width} logits"
    )
    return rank * width, min(max(vocab_size - rank * width, 0), width)


def all_reduce(tensor: Tensor, op: Any, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is not None and dist.get_world_size(tp_group) > 1:
        dist.all_reduce(tensor, op=op, group=tp_group)
    return tensor


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _row_max(valid_logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Maximum of each row, [..., w] -> [...]; minus infinity on a rank whose shard is all padding."""
    if valid_logits.shape[-1] == 0:
        return valid_logits.new_full(valid_logits.shape[:-1], float("-inf"), dtype=dtype)
    return valid_logits.amax(dim=-1).to(dtype)


def _minus(logits: Tensor, per_row: Tensor) -> Tensor:
    """Returns ``logits - per_row`` as a new tensor in the dtype of ``per_row``. The caller may change it in place."""
    return torch.sub(logits, per_row.unsqueeze(-1))


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, labels: Tensor, tp_group: ProcessGroup | None, vocab_size: int
    ) -> Tensor:
        start, num_valid = shard_bounds(logits.shape[-1], tp_group, vocab_size)
        valid_logits = logits[..., :num_valid]  # a view
        local_labels = labels - start
        is_local = (local_labels >= 0) & (local_labels < num_valid)
        local_labels = local_labels.masked_fill(~is_local, 0)

        row_max = all_reduce(_row_max(valid_logits, _compute_dtype(logits)), dist.ReduceOp.MAX, tp_group)
        label_logit = logits.gather(-1, local_labels.unsqueeze(-1)).squeeze(-1) - row_max
        sums = torch.stack(
            [
                _minus(valid_logits, row_max).exp_().sum(dim=-1),
                torch.where(is_local, label_logit, 0.0),
            ]
        )
        sum_exp, label_logit = all_reduce(sums, dist.ReduceOp.SUM, tp_group)
        log_sum_exp = sum_exp.log()

        ctx.num_valid = num_valid
        ctx.save_for_backward(logits, local_labels, is_local, row_max + log_sum_exp)
        is_known = (labels >= 0) & (labels < vocab_size)
        return torch.where(is_known, label_logit - log_sum_exp, float("nan"))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grad_outputs
        logits, local_labels, is_local, log_normaliser = ctx.saved_tensors
        grad = grad.to(log_normaliser.dtype)
        # d logprob / d logit_j = [j is the label] - softmax_j
        grad_valid = _minus(logits[..., : ctx.num_valid], log_normaliser).exp_().mul_(-grad.unsqueeze(-1))
        if ctx.num_valid > 0:
            grad_valid.scatter_add_(
                -1, local_labels.unsqueeze(-1), torch.where(is_local, grad, 0.0).unsqueeze(-1)
            )
        return _pad_columns(grad_valid, logits), None, None, None


class _VocabParallelKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        policy_logits: Tensor,
        ref_logits: Tensor,
        tp_group: ProcessGroup | None,
        vocab_size: int,
        direction: KLDirection,
    ) -> Tensor:
        assert policy_logits.shape == ref_logits.shape, "policy and reference shards differ in shape"
        dtype = torch.promote_types(_compute_dtype(policy_logits), ref_logits.dtype)
        _, num_valid = shard_bounds(policy_logits.shape[-1], tp_group, vocab_size)
        policy, ref = policy_logits[..., :num_valid], ref_logits[..., :num_valid]  # views

        row_max = torch.stack([_row_max(policy, dtype), _row_max(ref, dtype)])
        row_max = all_reduce(row_max, dist.ReduceOp.MAX, tp_group)
        sum_exp = torch.stack(
            [
                _minus(logits, maximum).exp_().sum(dim=-1)
                for logits, maximum in zip((policy, ref), row_max, strict=True)
            ]
        )
        sum_exp = all_reduce(sum_exp, dist.ReduceOp.SUM, tp_group)
        log_normalisers = row_max + sum_exp.log()

        policy_logprobs = _minus(policy, log_normalisers[0])
        ref_logprobs = _minus(ref, log_normalisers[1])
        if direction == "forward":
            terms = policy_logprobs.neg_().add_(ref_logprobs).mul_(ref_logprobs.exp_())
        else:
            terms = ref_logprobs.neg_().add_(policy_logprobs).mul_(policy_logprobs.exp_())
        kl = all_reduce(terms.sum(dim=-1), dist.ReduceOp.SUM, tp_group)

        ctx.num_valid = num_valid
        ctx.direction = direction
        ctx.save_for_backward(policy_logits, ref_logits, log_normalisers, kl)
        return kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grad_outputs
        policy_logits, ref_logits, log_normalisers, kl = ctx.saved_tensors
        policy = _minus(policy_logits[..., : ctx.num_valid], log_normalisers[0])
        ref = _minus(ref_logits[..., : ctx.num_valid], log_normalisers[1])
        if ctx.direction == "forward":
            # d KL(ref || policy) / d logit_j = policy_j - ref_j
            grad_valid = policy.exp_().sub_(ref.exp_())
        else:
            # d KL(policy || ref) / d logit_j = policy_j (log policy_j - log ref_j - KL)
            grad_valid = ref.neg_().add_(policy).sub_(kl.unsqueeze(-1)).mul_(policy.exp_())
        grad_valid.mul_(grad.to(kl.dtype).unsqueeze(-1))
        return _pad_columns(grad_valid, policy_logits), None, None, None, None


def _pad_columns(grad_valid: Tensor, logits: Tensor) -> Tensor:
    """Gradient in the shape and dtype of ``logits``, zero in the padded columns."""
    if grad_valid.shape == logits.shape:
        return grad_valid.to(logits.dtype)
    grad = torch.zeros_like(logits)
    grad[..., : grad_valid.shape[-1]] = grad_valid
    return grad
