"""Blockwise FP8: each 128 x 128 block of a weight gets one scale, as in DeepSeek-V3's and Qwen3's FP8 folders."""

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns that share a scale."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] weight; blocks at the edge are smaller."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


@torch.no_grad()
def quantize_blocks(weight: Tensor, quantized: Tensor, scales: Tensor) -> None:
    """Write ``weight`` as ``quantized * scales`` per block; the largest value of a block becomes 448.

    One row of blocks at a time is held in fp32. A block of zeros gets the scale 1.

    Args:
        weight: [rows, columns], any floating type.
        quantized: [rows, columns] float8_e4m3fn, filled in place.
        scales: [ceil(rows / 128), ceil(columns / 128)] fp32, filled in place: what the server multiplies by.
    """
    rows, columns = weight.shape
    padded = scales.shape[1] * BLOCK
    for block_row, start in enumerate(range(0, rows, BLOCK)):
        part = weight[start : start + BLOCK].float()
        if padded != columns:
            part = torch.nn.functional.pad(part, (0, padded - columns))
        blocks = part.view(part.shape[0], -1, BLOCK)  # [128, blocks, 128]
        scale = blocks.abs().amax(dim=(0, 2)) / LARGEST  # [blocks]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scales[block_row] = scale
        # the division may round to a hair above the largest value, which float8_e4m3fn has no infinity for
        scaled = (blocks / scale[:, None]).clamp_(-LARGEST, LARGEST).view(part.shape)
        quantized[start : start + BLOCK].copy_(scaled[:, :columns].to(torch.float8_e4m3fn))
