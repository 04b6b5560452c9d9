"""The gradient of the output layer's weight, summed in fp32, with and without Megatron's gradient accumulation fusion.

With the fusion, Megatron's linear layers add weight gradients to ``main_grad`` with Apex's extension
``fused_weight_gradient_mlp_cuda``. Megatron refuses the fusion if that module cannot be imported
(megatron/core/tensor_parallel/layers.py). Transformer Engine's GEMM can do the same addition, so ``register`` provides a
module of that name.
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
"""Name under which megatron.core.tensor_parallel.layers imports Apex's extension."""


def register() -> None:
    """Provides the module of the fused weight gradient, unless Apex's can be imported. Call before importing Megatron."""
    try:
        importlib.import_module(_MODULE)
        return
    except ImportError:  # not installed, or built for another version of torch
        pass
    module = types.ModuleType(_MODULE)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = add_product  # type: ignore[attr-defined]
    sys.modules[_MODULE] = module


def add_product(hidden: Tensor, output_grad: Tensor, main_grad: Tensor) -> None:
    """Adds output_grad.T @ hidden to ``main_grad`` in its dtype. Replaces Apex's function of the same signature.

    Args:
        hidden: [t, h] input of the layer.
        output_grad: [t, o] gradient of the layer's output.
        main_grad: [o, h].
    """
    write_product(hidden, output_grad, main_grad, accumulate=True)


def write_product(hidden: Tensor, output_grad: Tensor, into: Tensor, *, accumulate: bool) -> None:
    """Writes output_grad.T @ hidden to ``into``, or adds it, summed in the dtype of ``into``."""
    beta = 1 if accumulate else 0
    gemm = transformer_engine_gemm() if hidden.is_cuda else None
    if gemm is not None:
        gemm(
            hidden, output_grad, out_dtype=into.dtype, layout="NT", out=into, grad=True, accumulate=accumulate
        )
    elif into.dtype == hidden.dtype:
        into.addmm_(output_grad.t(), hidden, beta=beta)
    elif hidden.device.type == "cpu":
        # torch has no CPU kernel that multiplies BF16 matrices into an fp32 sum.
        into.addmm_(output_grad.t().to(into.dtype), hidden.to(into.dtype), beta=beta)
    else:
        torch.addmm(into, output_grad.t(), hidden, out_dtype=into.dtype, beta=beta, out=into)


def transformer_engine_gemm() -> Callable[..., Any] | None:
    if sys.modules.get("transformer_engine") is None:  # not installed, or disabled by cpu_backend
        return None
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    return general_gemm


@dataclass(kw_only=True)
class MegatronOutputWeight:
    """Megatron's output layer as an ``objective.fused_logprobs.OutputWeight``.

    With the fusion it does the same as LinearWithGradAccumulationAndAsyncCommunication in
    megatron/core/tensor_parallel/layers.py: it adds the gradient to ``weight.main_grad`` and sets
    ``weight.grad_added_to_main_grad`` for the data-parallel hook. Autograd gets a tensor that is never read, because the
    hook requires ``weight.grad`` to be set.
    """

    weight: Tensor
    """[v/tp, h]: this rank's rows of the output layer's weight."""
    tp_group: ProcessGroup | None
    sums_hidden_grad: bool
    is_fused: bool
    """Whether gradient accumulation fusion is on. It takes effect only if ``main_grad`` is fp32."""
    _sum: Tensor | None = field(default=None, init=False)
    """[v/tp, h] sum of the gradients so far, if the fusion takes no effect; fp32, or fp64 for an fp64 weight."""

    def add_gradient(self, logits_grad: Tensor, hidden: Tensor, *, is_whole: bool) -> None:
        """Adds the gradient of one chunk of tokens.

        Args:
            logits_grad: [t, v/tp].
            hidden: [t, h].
            is_whole: whether the chunk is the complete micro-batch.
        """
        main_grad = self._main_grad()
        if main_grad is not None:
            sys.modules[_MODULE].wgrad_gemm_accum_fp32(hidden, logits_grad, main_grad)
            return
        if is_whole:
            # A single product is summed in fp32 inside the kernel and rounded once, so it needs no fp32 buffer.
            self._sum = logits_grad.t() @ hidden
            return
        is_first = self._sum is None
        if self._sum is None:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            self._sum = torch.empty_like(self.weight, dtype=dtype, requires_grad=False)
        write_product(hidden, logits_grad, self._sum, accumulate=not is_first)

    def finish_gradient(self) -> Tensor | None:
        """Returns the gradient for autograd [v/tp, h] in the weight's dtype, and starts over.

        Returns None if the gradient is in ``main_grad`` and autograd needs no tensor, or if there was no chunk.
        """
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
            # The embedding shares this weight and returns a gradient in the same backward pass, which the hook adds.
            return None
        return torch.empty_like(weight, requires_grad=False)
