"""The gradient of the output layer's weight, summed in fp32, under Megatron's gradient accumulation fusion or without it.

Megatron adds the weight gradients of its own linear layers to ``main_grad`` with apex's extension
``fused_weight_gradient_mlp_cuda`` and refuses the fusion where that does not import. Transformer Engine's GEMM does the
same, so ``register`` puts a module of that name in its place.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_MODULE = "fused_weight_gradient_mlp_cuda"
"""The name under which megatron.core.tensor_parallel.layers imports apex's extension."""


def register() -> None:
    """Make Megatron find the fused weight gradient; call before Megatron is imported. A real apex is left in place."""
    try:
        importlib.import_module(_MODULE)
        return
    except ImportError:  # absent, or built for another torch
        pass
    module = types.ModuleType(_MODULE)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = _add_product  # type: ignore[attr-defined]
    sys.modules[_MODULE] = module


def _add_product(hidden: Tensor, output_grad: Tensor, main_grad: Tensor) -> None:
    """``main_grad += output_grad.T @ hidden``, [t, o] and [t, h], in the dtype of ``main_grad``: apex's function."""
    _write_product(hidden, output_grad, main_grad, accumulate=True)


def _write_product(hidden: Tensor, output_grad: Tensor, into: Tensor, *, accumulate: bool) -> None:
    """``into (+)= output_grad.T @ hidden``, summed in the dtype of ``into``."""
    beta = 1 if accumulate else 0
    gemm = _transformer_engine_gemm() if hidden.is_cuda else None
    if gemm is not None:
        gemm(
            hidden, output_grad, out_dtype=into.dtype, layout="NT", out=into, grad=True, accumulate=accumulate
        )
    elif into.dtype == hidden.dtype:
        into.addmm_(output_grad.t(), hidden, beta=beta)
    elif hidden.device.type == "cpu":
        # A CPU has no product of BF16 tensors with an fp32 sum.
        into.addmm_(output_grad.t().to(into.dtype), hidden.to(into.dtype), beta=beta)
    else:
        torch.addmm(into, output_grad.t(), hidden, out_dtype=into.dtype, beta=beta, out=into)


def _transformer_engine_gemm() -> Callable[..., Any] | None:
    if sys.modules.get("transformer_engine") is None:  # absent, or switched off by cpu_backend
        return None
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    return general_gemm


@dataclass(kw_only=True)
class MegatronOutputWeight:
    """``objective.fused_logprobs.OutputWeight`` of Megatron's output layer.

    It keeps the contract of megatron.core.tensor_parallel.layers: with the fusion the gradient is added to
    ``weight.main_grad``, ``grad_added_to_main_grad`` says so to the data-parallel hook, and autograd gets a tensor that is
    never read, because the hook asks for one.
    """

    weight: Tensor
    """[v/tp, h]"""
    tp_group: ProcessGroup | None
    sums_hidden_grad: bool
    is_fused: bool
    """Gradient accumulation fusion is on. It is left aside where ``main_grad`` is not fp32."""
    _sum: Tensor | None = field(default=None, init=False)
    """[v/tp, h] fp32 (fp64 of an fp64 weight): the gradient so far, without the fusion."""

    def add_gradient(self, logits_grad: Tensor, hidden: Tensor, *, is_whole: bool) -> None:
        main_grad = self._main_grad()
        if main_grad is not None:
            sys.modules[_MODULE].wgrad_gemm_accum_fp32(hidden, logits_grad, main_grad)
            return
        if is_whole:
            # One product sums in fp32 inside and rounds once.
            self._sum = logits_grad.t() @ hidden
            return
        is_first = self._sum is None
        if self._sum is None:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            self._sum = torch.empty_like(self.weight, dtype=dtype, requires_grad=False)
        _write_product(hidden, logits_grad, self._sum, accumulate=not is_first)

    def finish_gradient(self) -> Tensor | None:
        if self._main_grad() is not None:
            return self._stand_in()
        summed, self._sum = self._sum, None
        return None if summed is None else summed.to(self.weight.dtype)

    def _main_grad(self) -> Tensor | None:
        main_grad = getattr(self.weight, "main_grad", None) if self.is_fused else None
        return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None

    def _stand_in(self) -> Tensor | None:
        weight: Any = self.weight
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        if getattr(weight, "zero_out_wgrad", False):
            # Tied on one stage: the embedding gives a gradient in the same pass, which the hook adds.
            return None
        return torch.empty_like(weight, requires_grad=False)
