"""The tensors of a folder's files, and of what they consist: quantized weights, and the experts of a layer in one tensor."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.dequantizing import (
    PLAIN,
    QUANTIZED_DTYPES,
    QuantizedWeight,
    find_quantized,
    unused_scales,
)
from megatron_rasft.weights.families import JoinedTensor
from megatron_rasft.weights.quantization import CONFIG_KEY, Quantization

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Name of a type in safetensors files -> the torch type, for the types that can be loaded."""


class Within(NamedTuple):
    """Location of a tensor in a tensor with all experts of a layer."""

    name: str
    expert: int
    first: int
    """First row of the part, or its first column if columns alternate."""
    step: int
    """Columns from one column of the part to its next one; 0 if columns do not alternate."""


class StoredTensor(NamedTuple):
    """Location, shape and type of a stored tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Offset of the tensor's first byte in the file."""
    within: Within | None = None
    """The location in the tensor of which this is a part; None if it is a tensor of its own in the file."""

    def split(self, name: str, joined: JoinedTensor) -> dict[str, "StoredTensor"]:
        """Returns the parts of a tensor with all experts of a layer."""
        if self.shape != joined.shape:
            raise wrong_shape(name, self.shape, joined.shape)
        per_expert = len(joined.parts) // self.shape[0]
        if joined.is_alternating:
            return self._split_columns(name, joined, per_expert)
        shape = (self.shape[1] // per_expert, *self.shape[2:])
        num_bytes = math.prod(shape) * self.dtype.itemsize
        return {
            part: self._replace(
                shape=shape,
                start=self.start + i * num_bytes,
                within=Within(name, i // per_expert, i % per_expert * shape[0], 0),
            )
            for i, part in enumerate(joined.parts)
        }

    def _split_columns(self, name: str, joined: JoinedTensor, step: int) -> dict[str, "StoredTensor"]:
        shape = (self.shape[-1] // step, *self.shape[1:-1])
        return {
            part: self._replace(shape=shape, within=Within(name, i // step, i % step, step))
            for i, part in enumerate(joined.parts)
        }


def unsupported_type(name: str, dtype: str) -> ModelFolderError:
    return ModelFolderError(
        f"tensor {name} is stored as {dtype}; supported are {', '.join(DTYPES)}, and weights that are quantized as "
        f"{CONFIG_KEY} in config.json says"
    )


def take_quantized(
    stored: dict[str, StoredTensor], quantization: Quantization | None
) -> tuple[dict[str, QuantizedWeight], dict[str, StoredTensor]]:
    """Replaces the values and scales of quantized weights in ``stored`` by the weights.

    Returns:
        The quantized weights by name, and the stored tensors that they are read from.
    """
    weights: dict[str, QuantizedWeight] = {}
    if quantization is not None:
        weights = find_quantized(stored, quantization)
        for name in unused_scales(stored):
            del stored[name]
    sources = {name: stored[name] for weight in weights.values() for name in weight[:2]}
    for name in sources:
        del stored[name]
    for name, weight in weights.items():
        stored[name] = sources[weight.values]._replace(shape=weight.shape, dtype=PLAIN)
    refuse_quantized(stored)
    return weights, sources


def refuse_quantized(stored: dict[str, StoredTensor]) -> None:
    """Refuses tensors of a type that only quantized weights have."""
    names = {dtype: name for name, dtype in QUANTIZED_DTYPES.items()}
    for name, tensor in stored.items():
        if tensor.dtype in names:
            raise unsupported_type(name, names[tensor.dtype])


def split_joined(stored: dict[str, StoredTensor], joined: dict[str, JoinedTensor]) -> dict[str, StoredTensor]:
    """Replaces tensors with all experts of a layer by their parts."""
    split: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        parts = tensor.split(name, joined[name]) if name in joined else {name: tensor}
        if twice := next((part for part in parts if part in split), None):
            raise ModelFolderError(
                f"{twice} is stored twice, in tensors of one and of all experts; delete one"
            )
        split |= parts
    return split


def wrong_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> ModelFolderError:
    return ModelFolderError(f"tensor {name} has shape {list(found)}, config.json implies {list(expected)}")
