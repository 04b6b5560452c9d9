"""FP8 weights in blocks, as serving engines read them: e4m3 values, and one scale per 128 x 128 block."""

import torch
from torch import Tensor

BLOCK = 128

SCALE_SUFFIX = "_scale_inv"
"""Suffix of the name of a weight's scales. Despite the name, weight = e4m3 value * scale."""

KEPT_LAYERS = (
    "embed_tokens",
    "lm_head",
    "gate",
    "shared_expert_gate",
    "in_proj_a",
    "in_proj_b",
    "in_proj_ba",
)
"""The layers that engines keep in 16 bits: embedding, output, router (but not gate_proj), the gate of a shared expert, and the
projections of a gated delta net that have one row per head."""

_ROWS_OF_BLOCKS = {"cpu": 1, "cuda": 8}
"""Device type -> number of rows of blocks that are rounded at once. A CPU's cache holds one row of blocks. A GPU rounds
several, because launching kernels row by row would take 5 s for a 70B model (calculated)."""

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def is_linear_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether serving engines read a Hugging Face tensor in FP8: all matrices of the layers except routers."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and len(shape) == 2 and module.rpartition(".")[2] not in KEPT_LAYERS


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] weight. The last block of a row or column may be incomplete."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


@torch.no_grad()
def quantize_blocks(weight: Tensor, values: Tensor, scales: Tensor) -> None:
    """Rounds a weight to e4m3 with one scale per block, chosen so that the block's largest magnitude becomes the largest e4m3.

    Holds a few rows of blocks in fp32 at a time.

    Args:
        weight: [rows, columns], any float type.
        values: [rows, columns] float8_e4m3fn, written.
        scales: [rows / 128, columns / 128] (rounded up) fp32, written; a block of zeros gets scale 1.
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
        # Rounding can slightly exceed the largest value. e4m3fn has no infinity, so the result would be NaN
        scaled = (blocks / part_scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST).view(padded.shape)
        part_values.copy_(scaled[:rows, :columns])
