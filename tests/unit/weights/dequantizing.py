"""The weights that FP8 blocks represent."""

from torch import Tensor

from megatron_rasft.weights.fp8_blocks import BLOCK


def dequantize_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """Returns the [rows, columns] fp32 weight that the values and scales represent."""
    rows, columns = values.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread
