"""Triton kernels for log-probabilities: two passes over the logits, computed in fp32 for logits of any dtype.

``logit_statistics`` reads the logits once and returns a few numbers per token. ``logits_to_gradient_`` overwrites the logits
with their gradient. Both are torch operators, so that a dispatch mode can count their memory traffic (benchmarks/logprobs.py),
also on the meta device. With TRITON_INTERPRET=1 they run on CPU tensors.

The project has its own kernels because none of the existing libraries has a KL divergence over a sharded vocabulary. Transformer
Engine's cross-entropy and cut-cross-entropy support a sharded vocabulary but no KL, Liger-Kernel has a KL but no sharding,
quack has neither.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rasft.types import KLDirection

NO_REFERENCE, FORWARD_KL, REVERSE_KL = 0, 1, 2
KL_KINDS: dict[KLDirection | None, int] = {None: NO_REFERENCE, "forward": FORWARD_KL, "reverse": REVERSE_KL}
"""Direction of the KL -> the argument ``kind`` of the operators."""

_TILE = 4096
"""Number of logits that one program holds at a time: two vector loads of BF16 for each thread of its eight warps. A tile is a
part of one token's row, or several rows of a small vocabulary."""


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    ref_logits,
    ref_row_stride,
    labels,
    out,
    num_tokens,
    width,
    num_valid,
    first_id,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # 64 bits: row * row_stride exceeds 2**31 at 16,384 tokens of a 152k vocabulary.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_token = rows < num_tokens
    logits += rows * row_stride
    ref_logits += rows * ref_row_stride
    # Finite, because the first block may hold only -inf, and -inf - (-inf) is NaN.
    row_max = tl.full([ROWS], -3.0e38, tl.float32)
    ref_max = tl.full([ROWS], -3.0e38, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    ref_sum = tl.zeros([ROWS], tl.float32)
    gap_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_valid, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_valid = (columns < num_valid)[None, :]
        # Loads are masked by the width, not by the vocabulary: the width is a multiple of 16, so they stay vector loads.
        mask = is_token[:, None] & (columns < width)[None, :]
        x = tl.load(logits[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        x_valid = tl.where(is_valid, x, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x_valid, axis=1))
        x_exp = tl.exp(x_valid - new_max[:, None])
        x_scale = tl.exp(row_max - new_max)
        row_sum = row_sum * x_scale + tl.sum(x_exp, axis=1)
        row_max = new_max
        if KIND != 0:
            y = tl.load(ref_logits[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            y_valid = tl.where(is_valid, y, float("-inf"))
            new_ref_max = tl.maximum(ref_max, tl.max(y_valid, axis=1))
            y_exp = tl.exp(y_valid - new_ref_max[:, None])
            y_scale = tl.exp(ref_max - new_ref_max)
            ref_sum = ref_sum * y_scale + tl.sum(y_exp, axis=1)
            ref_max = new_ref_max
            if KIND == 1:
                gap_sum = gap_sum * y_scale + tl.sum(tl.where(is_valid, y_exp * (y - x), 0.0), axis=1)
            else:
                gap_sum = gap_sum * x_scale + tl.sum(tl.where(is_valid, x_exp * (x - y), 0.0), axis=1)
    label = tl.load(labels + rows, mask=is_token, other=-1) - first_id
    is_local = is_token & (label >= 0) & (label < num_valid)
    label_logit = tl.load(logits + label, mask=is_local, other=0.0).to(tl.float32)
    tl.store(out + rows, row_max, mask=is_token)
    tl.store(out + num_tokens + rows, row_sum, mask=is_token)
    tl.store(out + 2 * num_tokens + rows, label_logit, mask=is_token)
    if KIND != 0:
        tl.store(out + 3 * num_tokens + rows, ref_max, mask=is_token)
        tl.store(out + 4 * num_tokens + rows, ref_sum, mask=is_token)
        tl.store(out + 5 * num_tokens + rows, gap_sum, mask=is_token)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    ref_logits,
    ref_row_stride,
    labels,
    terms,
    num_tokens,
    width,
    num_valid,
    first_id,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_token = rows < num_tokens
    logits += rows * row_stride
    ref_logits += rows * ref_row_stride
    label = tl.load(labels + rows, mask=is_token, other=-1) - first_id
    grad = tl.load(terms + rows, mask=is_token, other=0.0)
    log_normaliser = tl.load(terms + num_tokens + rows, mask=is_token, other=0.0)
    if KIND != 0:
        kl_grad = tl.load(terms + 2 * num_tokens + rows, mask=is_token, other=0.0)
        kl_term = tl.load(terms + 3 * num_tokens + rows, mask=is_token, other=0.0)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (columns < width)[None, :]
        x = tl.load(logits[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        probability = tl.exp(x - log_normaliser[:, None])
        # d logprob / d logit_j = [j is the label] - p_j
        gradient = -grad[:, None] * probability
        gradient += tl.where(columns[None, :] == label[:, None], grad[:, None], 0.0)
        if KIND != 0:
            y = tl.load(ref_logits[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if KIND == 1:
                # d KL(ref || policy) / d logit_j = p_j - ref_j
                gradient += kl_grad[:, None] * (probability - tl.exp(y - kl_term[:, None]))
            else:
                # d KL(policy || ref) / d logit_j = p_j (x_j - y_j - mean of x - y under p)
                gradient += kl_grad[:, None] * probability * (x - y - kl_term[:, None])
        gradient = tl.where((columns < num_valid)[None, :], gradient, 0.0)
        tl.store(logits[:, None] + columns[None, :], gradient.to(logits.dtype.element_ty), mask=mask)


_library = torch.library.Library("megatron_rasft", "DEF")
_library.define(
    "logit_statistics(Tensor logits, Tensor labels, Tensor? ref_logits, int first_id, int num_valid, int kind) -> Tensor"
)
_library.define(
    "logits_to_gradient_(Tensor(a!) logits, Tensor labels, Tensor? ref_logits, Tensor terms, int first_id, int num_valid, "
    "int kind) -> ()"
)


def logit_statistics(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, first_id: int, num_valid: int, kind: int
) -> Tensor:
    """Reads the shard of this rank once and returns each token's maximum, sum of exponentials and label logit.

    Args:
        logits: [t, v/tp] of the policy, with contiguous columns; BF16, FP16 or FP32.
        labels: [t] int64 global ids.
        ref_logits: [t, v/tp] of the reference; None without a KL.
        first_id: global id of the first column.
        num_valid: columns that are not padding.
        kind: a value of ``KL_KINDS``.

    Returns:
        [3, t] fp32: the maximum (-3e38 for a shard of padding only), the sum of exponentials relative to the maximum, and the
        label's logit (0 if another rank has it). With a KL [6, t]: also the reference's maximum and sum, and the sum over the
        columns of e * gap. Here e is the exponential of the KL's first distribution, relative to its maximum, and gap is its logit
        minus the logit of the second distribution.
    """
    return torch.ops.megatron_rasft.logit_statistics(logits, labels, ref_logits, first_id, num_valid, kind)


def logits_to_gradient_(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    terms: Tensor,
    first_id: int,
    num_valid: int,
    kind: int,
) -> None:
    """Overwrites ``logits`` with the gradient of the loss with respect to them; 0 in padded columns.

    Args:
        terms: [2, t] fp32: the loss's gradient in the log-probability, and the log-normaliser. With a KL [4, t]: also the loss's
            gradient in the KL, and a term of the KL. For forward this is the reference's log-normaliser, for reverse the
            policy's mean of its own logit minus the reference's. The other arguments are those of ``logit_statistics``.
    """
    torch.ops.megatron_rasft.logits_to_gradient_(logits, labels, ref_logits, terms, first_id, num_valid, kind)


@torch.library.impl(_library, "logit_statistics", "Meta")
def _statistics_shape(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, first_id: int, num_valid: int, kind: int
) -> Tensor:
    return logits.new_empty((3 if kind == NO_REFERENCE else 6, logits.shape[0]), dtype=torch.float32)


@torch.library.impl(_library, "logits_to_gradient_", "Meta")
def _no_result(*_: Any) -> None:
    return None


@torch.library.impl(_library, "logit_statistics", "CompositeExplicitAutograd")
def _launch_statistics(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, first_id: int, num_valid: int, kind: int
) -> Tensor:
    out = _statistics_shape(logits, labels, ref_logits, first_id, num_valid, kind)
    launch(_statistics_kernel, logits, labels, ref_logits, out, first_id, num_valid, kind)
    return out


@torch.library.impl(_library, "logits_to_gradient_", "CompositeExplicitAutograd")
def _launch_gradient(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    terms: Tensor,
    first_id: int,
    num_valid: int,
    kind: int,
) -> None:
    launch(_gradient_kernel, logits, labels, ref_logits, terms, first_id, num_valid, kind)


def launch(
    kernel: Any,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    per_token: Tensor,
    first_id: int,
    num_valid: int,
    kind: int,
) -> None:
    """Launches one program per tile of rows."""
    num_tokens, width = logits.shape
    other = logits if ref_logits is None else ref_logits
    assert logits.stride(1) == other.stride(1) == 1 and other.shape == logits.shape
    assert labels.is_contiguous() and per_token.is_contiguous()
    assert (kind == NO_REFERENCE) == (ref_logits is None)
    if num_tokens == 0:
        return
    columns = min(_TILE, triton.next_power_of_2(width))
    rows = _TILE // columns
    kernel[(triton.cdiv(num_tokens, rows),)](
        logits,
        logits.stride(0),
        other,
        other.stride(0),
        labels,
        per_token,
        num_tokens,
        width,
        num_valid,
        first_id,
        KIND=kind,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
