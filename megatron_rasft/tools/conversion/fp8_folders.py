"""Folders of a model in FP8 blocks (--fp8): which tensors are quantized, and how config.json says so."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_rasft.weights.fp8_blocks import (
    BLOCK,
    KEPT_LAYERS,
    is_linear_layer,
    quantize_blocks,
    scale_shape,
)

_ENGINES_KEEP = ("embed_tokens", "lm_head")
"""The layers of ``KEPT_LAYERS`` that every engine keeps by itself."""


def unquantized_type(stored: torch.dtype) -> torch.dtype:
    """Type of tensors that are not quantized: at most 16 bits, because SGLang would turn float32 into float16."""
    return torch.bfloat16 if stored.itemsize > 2 else stored


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """Returns the entry quantization_config of config.json for a model in FP8, as transformers, SGLang and vLLM read it.

    A model without routers and gated delta nets needs no exceptions, because every engine keeps embedding and output unquantized
    by itself. The list of another model contains lm_head too.

    Args:
        names: the Hugging Face names of all tensors.
    """
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    kept = [m for m in modules if m.rpartition(".")[2] in set(KEPT_LAYERS).difference(_ENGINES_KEEP)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        **({"modules_to_not_convert": [*kept, "lm_head"]} if kept else {}),
    }


def check_whole_blocks(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a model that engines would not load in FP8, because their kernels need complete blocks.

    Args:
        shapes: Hugging Face name -> shape of every tensor.

    Raises:
        ValueError: a side of a weight is not a multiple of 128; the message names the first such weight.
    """
    for name, shape in shapes.items():
        if is_linear_layer(name, shape) and any(size % BLOCK for size in shape):
            raise ValueError(
                f"{name} is {shape[0]} x {shape[1]}: serving engines read FP8 only in complete blocks of {BLOCK} x {BLOCK}. "
                "Leave --fp8 out, and serve this model in bfloat16."
            )


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns new tensors with the values and scales of a weight; see ``quantize_blocks``."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    quantize_blocks(weight, values, scales)
    return values, scales
