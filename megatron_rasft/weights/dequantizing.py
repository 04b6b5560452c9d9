"""Dequantizes stored weights to bfloat16: FP8 values with scales, and MXFP4 blocks."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.quantization import Quantization

PLAIN = torch.bfloat16
"""Type of dequantized weights. It represents every FP8 and MXFP4 value. The product with a scale is rounded once."""

QUANTIZED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}
"""Name of a type in safetensors files -> the torch type, for values and scales of quantized weights."""

_SCALES = ("_scale_inv", "_scale")
"""Suffixes of the name of a weight's FP8 scales. Despite the first name, weight = value * scale."""

_UNUSED = (".activation_scale", ".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
"""Suffixes of scales of activations and of the cache, which a model in bfloat16 does not need."""

_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
_MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4_BLOCK = 32
_MXFP4_BIAS = 127
_ROWS_AT_ONCE = 128


class Stored(Protocol):
    """Shape and type of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class QuantizedWeight(NamedTuple):
    """The stored tensors of a quantized weight."""

    values: str
    """Name of the tensor with the values."""
    scales: str
    """Name of the tensor with the scales."""
    shape: tuple[int, ...]
    """Shape of the dequantized weight."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale in FP8; None: MXFP4."""


ReadStored = Callable[[str, int, int, int | None], Tensor]
"""Reads a stored tensor, or its range start:stop along a dimension: (name, dim, start, stop)."""


def find_quantized(stored: Mapping[str, Stored], quantization: Quantization) -> dict[str, QuantizedWeight]:
    """Finds the quantized weights of a folder.

    Args:
        stored: name -> tensor, all tensors of the files.

    Returns:
        Name of a weight -> its stored tensors.

    Raises:
        ModelFolderError: scales are missing, or have a shape that is not known.
    """
    if quantization.is_mxfp4:
        blocks = [name for name in stored if name.endswith(_BLOCKS)]
        return {name.removesuffix(_BLOCKS): _mxfp4_weight(name, stored) for name in blocks}
    values = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    return {name: _fp8_weight(name, stored, quantization) for name in values}


def unused_scales(stored: Mapping[str, Stored]) -> list[str]:
    """Returns the names of tensors that only a model with quantized activations or a quantized cache needs."""
    return [name for name in stored if name.endswith(_UNUSED)]


def _fp8_weight(name: str, stored: Mapping[str, Stored], quantization: Quantization) -> QuantizedWeight:
    shape = stored[name].shape
    scales = next((name + suffix for suffix in _SCALES if name + suffix in stored), None)
    if scales is None:
        raise ModelFolderError(f"tensor {name} is stored as F8_E4M3, but there is no {name}{_SCALES[0]}")
    if len(shape) != 2:
        raise ModelFolderError(
            f"tensor {name} is stored as F8_E4M3 with shape {list(shape)}; supported are matrices"
        )
    rows, columns = shape
    blocks = [(rows, columns), (1, columns), *([quantization.block] if quantization.block else [])]
    grid = _two_dimensions(stored[scales].shape)
    for block in blocks:
        if grid == tuple(-(-size // of) for size, of in zip(shape, block, strict=True)):
            return QuantizedWeight(name, scales, shape, block)
    raise ModelFolderError(
        f"{scales} has shape {list(stored[scales].shape)}, which fits neither the weight's shape {list(shape)} nor blocks of "
        f"{quantization.block}"
    )


def _two_dimensions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of scales as rows and columns. One scale may have no dimension, and scales of rows only one."""
    return (*shape, *(1,) * (2 - len(shape)))


def _mxfp4_weight(blocks: str, stored: Mapping[str, Stored]) -> QuantizedWeight:
    """Describes a weight [experts, rows, columns], stored as [experts, columns, blocks of a column, 16]."""
    name = blocks.removesuffix(_BLOCKS)
    shape, scales = stored[blocks].shape, name + _BLOCK_SCALES
    if scales not in stored:
        raise ModelFolderError(f"tensor {blocks} is stored in MXFP4, but there is no {scales}")
    is_packed = len(shape) == 4 and shape[3] == _MXFP4_BLOCK // 2 and stored[scales].shape == shape[:3]
    if not is_packed or any(stored[n].dtype != torch.uint8 for n in (blocks, scales)):
        raise ModelFolderError(
            f"{blocks} has shape {list(shape)} and {scales} {list(stored[scales].shape)}; supported are [experts, columns, blocks, 16] "
            "and [experts, columns, blocks] of type U8"
        )
    return QuantizedWeight(blocks, scales, (shape[0], shape[2] * _MXFP4_BLOCK, shape[1]), None)


def read_dequantized(
    weight: QuantizedWeight, read: ReadStored, dim: int, start: int, stop: int | None
) -> Tensor:
    """Reads a weight, or its range ``start:stop`` along ``dim``, in bfloat16."""
    assert weight.block is not None, "the experts of an MXFP4 folder are read one by one"
    scales = read(weight.scales, 0, 0, None)
    grid = scales.float().reshape(_two_dimensions(tuple(scales.shape)))
    first = (start, 0) if dim == 0 else (0, start)
    return dequantize(read(weight.values, dim, start, stop), grid, weight.block, first)


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int], first: tuple[int, int]) -> Tensor:
    """Multiplies FP8 values with their scales in fp32, and rounds the products to bfloat16. Holds 128 rows in fp32 at a time.

    Args:
        values: [rows, columns] float8_e4m3fn, a part of a weight.
        scales: [rows of blocks, columns of blocks] fp32, of the whole weight.
        block: rows and columns that share a scale.
        first: row and column of the weight at which ``values`` begins.
    """
    made = torch.empty(values.shape, dtype=PLAIN)
    row_of, column_of = (
        torch.arange(begin, begin + size) // width
        for begin, size, width in zip(first, values.shape, block, strict=True)
    )
    parts = (tensor.split(_ROWS_AT_ONCE) for tensor in (values, made, row_of))
    for part, part_made, part_rows in zip(*parts, strict=True):
        factors = scales[part_rows]
        factors = factors if scales.shape[1] == 1 else factors[:, column_of]
        part_made.copy_(part.float() * factors)
    return made


def dequantize_mxfp4(packed: Tensor, exponents: Tensor) -> Tensor:
    """Returns the values of MXFP4 blocks (OCP Microscaling Formats 1.0: 4-bit values e2m1, and an 8-bit exponent for each 32).

    The lower half of a byte comes first.

    Args:
        packed: [rows, blocks of a row, 16] uint8, of two values a byte.
        exponents: [rows, blocks of a row] uint8, with bias 127.

    Returns:
        [rows, 32 * blocks] bfloat16.
    """
    table = torch.tensor([*_MXFP4_VALUES, *(-value for value in _MXFP4_VALUES)])
    halves = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)  # [rows, blocks, 32]
    values = torch.ldexp(table[halves.int()], exponents.int()[..., None] - _MXFP4_BIAS)
    return values.flatten(1).to(PLAIN)
