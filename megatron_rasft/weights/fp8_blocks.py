"""FP8 weights in blocks, as serving engines read them: e4m3 values and one scale for each 128 x 128 block."""

import torch
from torch import Tensor

BLOCK = 128

QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""The entry quantization_config of config.json that says so; transformers, SGLang and vLLM read it."""

SCALE_SUFFIX = "_scale_inv"
"""A weight's scales have its name with this after it; value = e4m3 * scale, whatever the name says."""

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ROWS_AT_ONCE = 8 * BLOCK
"""Bounds the fp32 copy."""


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Blocks of a [rows, columns] weight along either dimension; the last ones may be cut off."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


@torch.no_grad()
def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to e4m3 with a scale per block, its largest magnitude at the largest e4m3.

    Args:
        weight: [o, i], any float type.

    Returns:
        [o, i] float8_e4m3fn, and [o / 128, i / 128] fp32 scales, rounded up; a block of zeros has scale 1.
    """
    rows, columns = weight.shape
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape(rows, columns), dtype=torch.float32, device=weight.device)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = weight[start : start + _ROWS_AT_ONCE].float()
        height, width = scale_shape(*part.shape)
        padded = torch.nn.functional.pad(
            part, (0, width * BLOCK - columns, 0, height * BLOCK - part.shape[0])
        )
        blocks = padded.view(height, BLOCK, width, BLOCK)
        largest = blocks.abs().amax((1, 3))  # [height, width]
        scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
        blocks = (blocks / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
        rounded = blocks.view(padded.shape)[: part.shape[0], :columns]
        values[start : start + part.shape[0]] = rounded.to(torch.float8_e4m3fn)
        scales[start // BLOCK : start // BLOCK + height] = scale
    return values, scales


def dequantize_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """[o, i] fp32: what an engine computes with."""
    rows, columns = values.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread
