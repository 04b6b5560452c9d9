"""Transformer Engine's kernels for BF16 and FP32 in plain torch. Each computes in fp32, like on a GPU."""

import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor

KERNELS = (
    "rmsnorm_fwd",
    "rmsnorm_bwd",
    "generic_gemm",
    "fused_rope_forward",
    "fused_rope_backward",
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
)

CALLS: Counter[str] = Counter()
"""Kernel -> number of calls in this process."""


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    margin: int,
    centered: bool,
) -> tuple[Tensor, None, Tensor]:
    """Returns the output, None for the mean, and the reciprocal root mean square of each row. A centered weight is stored as its
    difference from 1."""
    assert quantizer is None
    CALLS["rmsnorm_fwd"] += 1
    rows = x.float()
    scale = torch.rsqrt(rows.pow(2).mean(-1) + eps)
    y = (rows * scale.unsqueeze(-1) * (weight.float() + centered)).to(x.dtype)
    return (y if out is None else out.copy_(y)), None, scale


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the weight."""
    CALLS["rmsnorm_bwd"] += 1
    scale = scale.reshape(*x.shape[:-1], 1)
    normed = x.float() * scale
    grad = dy.reshape(x.shape).float()
    through = grad * (weight.float() + centered)
    dx = scale * (through - normed * (through * normed).mean(-1, keepdim=True))
    dw = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype)


def generic_gemm(
    a: Tensor,
    transposes_a: bool,
    b: Tensor,
    transposes_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    is_grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulates: bool,
    split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Computes op(B) @ op(A), which is A @ B in cuBLAS's column-major order; with ``is_grad`` also the gradient of the bias."""
    assert quantizer is None and comm_overlap is None and not gelu
    CALLS["gemm"] += 1
    rows = b.reshape(-1, b.shape[-1])
    left = rows.t() if transposes_b else rows
    right = a.reshape(-1, a.shape[-1])
    right = right.t() if transposes_a else right
    product = alpha * (left.float() @ right.float())
    grad_bias = None
    if bias is not None and is_grad:
        grad_bias = rows.float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if out is not None:
        target = out.view(product.shape)
        if accumulates:
            target.add_(product.to(out.dtype))
        else:
            target.copy_(product)
        return out, grad_bias, None, None
    result = product.to(TORCH_DTYPES[int(out_dtype)] if out_dtype is not None else a.dtype)
    if not transposes_b:
        result = result.view(*b.shape[:-1], result.shape[-1])
    return result, grad_bias, None, None


TORCH_DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def _rotated(t: Tensor, freqs: Tensor) -> Tensor:
    """Rotates t [s, ..., d] by the angles freqs [s, 1, 1, d']. Elements after d' stay unchanged."""
    angles = freqs.reshape(freqs.shape[0], *([1] * (t.dim() - 2)), freqs.shape[-1]).float()
    width = angles.shape[-1]
    turned, rest = t[..., :width].float(), t[..., width:]
    first, second = turned.chunk(2, -1)
    result = turned * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((result.to(t.dtype), rest), -1)


def _angles(t: Tensor, freqs: Tensor, cu_seqlens: Tensor | None, cp_size: int, cp_rank: int) -> Tensor:
    """The angles of each token of t. In a packed batch positions start at 0 in each sequence."""
    if cu_seqlens is None:
        return freqs[: t.shape[0]]
    bounds = cu_seqlens.tolist()
    parts = []
    for begin, end in itertools.pairwise(bounds):
        length = end - begin
        chunk = length // (2 * cp_size)
        if cp_size == 1:
            parts.append(freqs[:length])
        else:
            last = 2 * cp_size - 1 - cp_rank
            parts += [
                freqs[cp_rank * chunk : (cp_rank + 1) * chunk],
                freqs[last * chunk : (last + 1) * chunk],
            ]
    return torch.cat(parts)


def fused_rope_forward(
    t: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Rotates t: [s, b, n, d], or packed [t, n, d]."""
    assert not interleaved and start_positions is None
    CALLS["rope_thd" if cu_seqlens is not None else "rope_sbhd"] += 1
    return _rotated(t, _angles(t, freqs, cu_seqlens, cp_size, cp_rank))


def fused_rope_backward(
    grad: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Rotates the gradient by the negative angles."""
    return _rotated(grad, -_angles(grad, freqs, cu_seqlens, cp_size, cp_rank))


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    is_adamw: int,
    corrects_bias: int,
    weight_decay: float,
) -> None:
    """Adam on lists of gradients, parameters, first and second moments. An optional fifth list has fp32 main parameters."""
    CALLS["adam"] += 1
    correction1 = 1 - beta1**step if corrects_bias else 1.0
    correction2 = 1 - beta2**step if corrects_bias else 1.0
    for grad, param, mean, square, *master in zip(*tensors, strict=True):
        weights = master[0] if master else param
        grad = grad.float()
        if not is_adamw:
            grad = grad + weight_decay * weights
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (mean / correction1) / ((square / correction2).sqrt() + eps)
        if is_adamw:
            update = update + weight_decay * weights
        weights.sub_(lr * update)
        if master:
            param.copy_(weights)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the norm of all tensors together [1], and the norm of each tensor."""
    CALLS["l2norm"] += 1
    norms = torch.stack([t.float().norm() for t in tensors[0]]) if tensors[0] else torch.zeros(1)
    return norms.norm().reshape(1), norms


def multi_tensor_scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """Writes the first list times ``scale`` to the second list."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


multi_tensor_scale_tensor = multi_tensor_scale
