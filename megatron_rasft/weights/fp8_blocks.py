"""FP8 weights in blocks, as serving engines read them: e4m3 values and one scale for each 128 x 128 block."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 128

SCALE_SUFFIX = "_scale_inv"
"""A weight's scales have its name with this after it; value = e4m3 * scale, whatever the name says."""

_KEPT_LAYERS = ("embed_tokens", "lm_head", "gate")
"""Embedding, output and router (gate_proj is another layer): engines compute with these as they are."""

_ROWS_OF_BLOCKS = {"cpu": 1, "cuda": 8}
"""Rounded at once: a CPU's cache holds one row, and a GPU would wait for its launches (one row each: 5 s for 70B, calculated)."""

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def is_linear_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether serving engines take a Hugging Face tensor in FP8: the matrices of the layers, but not a router."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and len(shape) == 2 and module.rpartition(".")[2] not in _KEPT_LAYERS


def unquantized_type(stored: torch.dtype) -> torch.dtype:
    """Type of what is not quantized: 16 bits, as serving engines compute; given float32, SGLang would take float16."""
    return torch.bfloat16 if stored.itemsize > 2 else stored


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """The entry quantization_config of config.json for a model in FP8; transformers, SGLang and vLLM read it.

    Without routers it names no exceptions: all engines know embedding and output by themselves.

    Args:
        names: of every tensor, Hugging Face's.
    """
    routers = [name.removesuffix(".weight") for name in names if name.endswith(".gate.weight")]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        **({"modules_to_not_convert": [*routers, "lm_head"]} if routers else {}),
    }


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] weight; the last blocks may be cut off."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def check_whole_blocks(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model that engines would not load in FP8: their kernels take whole blocks.

    Args:
        shapes: of every tensor, by Hugging Face name.

    Raises:
        ValueError: names the first weight with a side that is no multiple of 128.
    """
    for name, shape in shapes.items():
        if is_linear_layer(name, shape) and any(size % BLOCK for size in shape):
            raise ValueError(
                f"{name} is {shape[0]} x {shape[1]}: serving engines take FP8 only in whole blocks of {BLOCK} x {BLOCK}. "
                "Leave --fp8 out, and serve this model in bfloat16."
            )


@torch.no_grad()
def quantize_blocks(weight: Tensor, values: Tensor, scales: Tensor) -> None:
    """Round a weight to e4m3 with a scale for each block, its largest magnitude at the largest e4m3.

    A few rows of blocks at a time are held in fp32.

    Args:
        weight: [rows, columns], any float type.
        values: [rows, columns] float8_e4m3fn, filled in.
        scales: [rows / 128, columns / 128] fp32, rounded up, filled in; a block of zeros gets 1.
    """
    columns = weight.shape[1]
    num_rows = BLOCK * _ROWS_OF_BLOCKS[weight.device.type]
    for part, part_values, part_scales in zip(
        weight.split(num_rows),
        values.split(num_rows),
        scales.split(num_rows // BLOCK),
        strict=True,
    ):
        rows = part.shape[0]
        padded = torch.nn.functional.pad(part.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.view(-1, BLOCK, scales.shape[1], BLOCK)
        scale = blocks.abs().amax((1, 3)) / _LARGEST
        part_scales.copy_(torch.where(scale > 0, scale, 1.0))
        # rounding may lead a hair beyond the largest value, and the type has no infinity
        scaled = (blocks / part_scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST).view(padded.shape)
        part_values.copy_(scaled[:rows, :columns])


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of a weight, newly made; see ``quantize_blocks``."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    quantize_blocks(weight, values, scales)
    return values, scales


def dequantize_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """[o, i] fp32: what an engine computes with."""
    rows, columns = values.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread
