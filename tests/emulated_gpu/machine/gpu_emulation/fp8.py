"""FP8 with one scale per tensor (delayed and tensorwise recipes) in plain torch. Values are rounded like on a GPU.

Products of the rounded operands are computed in fp32. The effects of a recipe's scales are therefore emulated, but not the summation
of FP8 tensor cores.
"""

import enum
from typing import Any

import torch
from torch import Tensor

from gpu_emulation import kernels

KERNELS = (
    "bgrad_quantize",
    "create_empty_quantized_tensor",
    "dequantize",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "generic_gemm",
    "quantize",
    "rmsnorm_fwd",
)


class FP8FwdTensors(enum.IntEnum):
    """Indices of a module's quantizers in the forward pass, numbered as in transformer_engine_torch."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """Indices of a module's quantizers in the backward pass."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


_FORMATS = {7: (torch.float8_e4m3fn, 448.0), 8: (torch.float8_e5m2, 57344.0)}
"""FP8 DType -> torch's type and its largest value."""


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Quantizes a tensor with the quantizer's scale and records the largest value (delayed), or with its own scale (tensorwise)."""
    kernels.CALLS["fp8_quantize"] += 1
    dtype, largest = _FORMATS[int(quantizer.dtype)]
    values = tensor.detach().float()
    amax = values.abs().max()
    if hasattr(quantizer, "scale"):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(())
    else:
        if quantizer.with_amax_reduction:  # ranks that gather their parts of a tensor share its scale
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = largest / amax if amax > 0 else torch.ones(())
    data = (values * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    inverse = (1 / scale).reshape(1)
    if output is None:
        made = quantizer.create_tensor_from_data(data, fake_dtype=tensor.dtype, internal=quantizer.internal)
        made._scale_inv = inverse
    else:
        assert noop is None
        made = output
        made._data.copy_(data)
        made._scale_inv.copy_(inverse)
    if quantizer.columnwise_usage:
        made._transpose = fp8_transpose(data, quantizer.dtype)
    made._transpose_invalid = not quantizer.columnwise_usage
    return made


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """Returns an FP8 tensor without values, to which an all-gather writes."""
    data = torch.zeros(shape, dtype=torch.uint8)
    made = quantizer.create_tensor_from_data(data, fake_dtype=dtype, internal=quantizer.internal)
    made._scale_inv = torch.ones(1)
    made._transpose, made._transpose_invalid = None, True
    return made


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """The values that an FP8 tensor represents."""
    stored, _ = _FORMATS[int(tensor._fp8_dtype)]
    return (tensor._data.view(stored).float() * tensor._scale_inv).to(kernels.TORCH_DTYPES[int(dtype)])


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """Moves the last dimension to the front, as Hopper's FP8 GEMM requires for one operand."""
    return data.movedim(-1, 0).contiguous()


def bgrad_quantize(grad: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Returns the gradient of the bias, and the quantized gradient."""
    return grad.reshape(-1, grad.shape[-1]).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: int
) -> None:
    """Updates the scales of the delayed recipe from the largest recorded values. A tensor without any keeps its scale."""
    kernels.CALLS["fp8_scale_update"] += 1
    _, largest = _FORMATS[int(dtype)]
    start = 0
    for history, scale in zip(histories, scales, strict=True):
        size = scale.numel()
        history[0] = reduced[start : start + size]
        start += size
        amax = history.max(0).values if algorithm == "max" else history[0].clone()
        updated = largest / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & updated.isfinite(), updated, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


def _plain(operand: Any) -> Tensor:
    return operand.dequantize() if hasattr(operand, "_fp8_dtype") else operand


def generic_gemm(a: Any, transposes_a: bool, b: Any, transposes_b: bool, *args: Any, **kwargs: Any) -> Any:
    """The GEMM of the values that FP8 operands represent."""
    if hasattr(a, "_fp8_dtype"):
        kernels.CALLS["fp8_gemm"] += 1
    return kernels.generic_gemm(_plain(a), transposes_a, _plain(b), transposes_b, *args, **kwargs)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, *args: Any
) -> tuple[Any, None, Tensor]:
    """Computes the norm, and quantizes its result if there is a quantizer."""
    if quantizer is None:
        return kernels.rmsnorm_fwd(x, weight, eps, out, None, *args)
    assert out is None
    normed, _, scale = kernels.rmsnorm_fwd(x, weight, eps, None, None, *args)
    return quantize(normed, quantizer), None, scale
