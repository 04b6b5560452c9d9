"""Writes a safetensors file tensor by tensor, without keeping tensors in memory."""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_rasft.weights.gathering import TensorPlan
from megatron_rasft.weights.stored_tensors import DTYPES

_DTYPE_NAMES = {**{dtype: name for name, dtype in DTYPES.items()}, torch.float8_e4m3fn: "F8_E4M3"}


class _Span(NamedTuple):
    """The piece of the file in which a tensor lies, in bytes after the header."""

    start: int
    end: int
    block: tuple[str, ...]
    """The tensors that lie in the piece."""
    is_alternating: bool


def alternate(parts: Sequence[Tensor]) -> Tensor:
    """Returns the transposed matrices with alternating columns, or vectors with alternating elements."""
    return torch.stack([part.t() for part in parts], -1).flatten(-2)


class ShardWriter:
    """Writes one safetensors file tensor by tensor, without keeping tensors in memory.

    The header is written first, from the planned sizes.
    """

    def __init__(self, path: Path, plans: Sequence[TensorPlan]) -> None:
        # wide types come first, so that every tensor is aligned to its element size
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._spans: dict[str, _Span] = {}
        self._waiting: dict[str, Tensor] = {}
        position = 0
        for plan in sorted(plans, key=lambda plan: -plan.dtype.itemsize):
            end = position + plan.num_bytes
            header[plan.name] = {
                "dtype": _DTYPE_NAMES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [position, end],
            }
            size = plan.num_bytes // len(plan.blocks)
            is_alternating = plan.joined is not None and plan.joined.is_alternating
            for block in plan.blocks:
                self._spans |= dict.fromkeys(block, _Span(position, position + size, block, is_alternating))
                position += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.num_bytes = position
        self._data_start = 8 + len(encoded)
        self._file: BinaryIO = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a CPU tensor, or a part of a planned tensor, at its offset. The last tensor also flushes the file to the disk and closes it.

        Parts whose columns alternate are kept until all of their piece are there.
        """
        span = self._spans.pop(name)
        if span.is_alternating:
            self._waiting[name] = tensor
            if not all(part in self._waiting for part in span.block):
                return
            tensor = alternate([self._waiting.pop(part) for part in span.block])
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert raw.numel() == span.end - span.start, (
            f"{name} has {raw.numel()} bytes instead of the planned {span.end - span.start}"
        )
        self._file.seek(self._data_start + span.start)
        self._file.write(memoryview(raw.numpy()))
        if not self._spans:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        self._file.close()


def split_plans(plans: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Splits the tensors into files of at most ``max_shard_bytes``; a larger tensor gets its own file."""
    shards: list[list[TensorPlan]] = []
    num_free = 0
    for plan in plans:
        if not shards or plan.num_bytes > num_free:
            shards.append([])
            num_free = max_shard_bytes
        shards[-1].append(plan)
        num_free -= plan.num_bytes
    return shards
