"""Buckets: which tensors are sent together, and the memory in which a bucket is assembled."""

import math
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rasft.sync.wire_format import WireFormat, WireTensor, fused_name
from megatron_rasft.weights.gathering import TensorPlan

_ALIGNMENT = 16
"""Buckets start at multiples of this many bytes. It is a multiple of every element size, as a view of the bucket needs."""

_FIRST_BUCKET_BYTES = 64 * 2**20
"""Size of the first bucket. It is small, because nothing is sent until it is full; each later bucket is up to twice as large.
A smaller first bucket would not save time, because a request costs a server about 10 ms."""


class Slot(NamedTuple):
    """A tensor's place in its bucket."""

    tensor: WireTensor
    start: int
    """Offset of the first byte in the bucket."""
    stop: int
    """Offset after the last byte."""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are sent in one broadcast, end to end without gaps."""

    hf_names: tuple[str, ...]
    """Hugging Face tensors that are gathered for this bucket, in the trainer's order."""
    slots: tuple[Slot, ...]
    """The converted tensors in sending order: wide types first, so that each starts at a multiple of its element size."""
    num_bytes: int
    gathered_bytes: int
    """Bytes of the largest related set of tensors in the bucket, which takes additional memory while it is gathered."""

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Returns name -> the tensor's part of ``memory`` ([num_bytes] uint8), viewed with its type and shape."""
        return {
            wire.name: memory[start:stop].view(wire.dtype).view(wire.shape)
            for wire, start, stop in self.slots
        }


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def related_sets(tensors: Iterable[TensorPlan]) -> list[list[TensorPlan]]:
    """Returns the tensors in sets that must be in one bucket, because the server fuses q, k, v and gate, up.

    Tensors that lie between two of a set belong to the set too, because the trainer's order is kept.
    """
    sets: list[list[TensorPlan]] = []
    place: dict[str, int] = {}
    for tensor in tensors:
        first = place.setdefault(fused_name(tensor.name), len(sets))
        sets[first:] = [[*chain.from_iterable(sets[first:]), tensor]]
    return sets


def plan_buckets(tensors: Sequence[TensorPlan], wire_format: WireFormat, limit: int) -> list[Bucket]:
    """Returns buckets of at most ``limit`` bytes, the first ones smaller, that hold the tensors in their order.

    A related set is never split. A set larger than the limit gets a bucket of its own.
    """
    buckets: list[Bucket] = []
    pending: list[list[TensorPlan]] = []
    left = allowed = min(limit, _FIRST_BUCKET_BYTES)
    for related in related_sets(tensors):
        size = sum(
            _num_bytes(w.shape, w.dtype) for t in related for w in wire_format.wire_tensors(t.name, t.shape)
        )
        if pending and size > left:
            buckets.append(_bucket(pending, wire_format))
            pending = []
            left = allowed = min(limit, 2 * allowed)
        pending.append(related)
        left -= size
    return [*buckets, _bucket(pending, wire_format)] if pending else buckets


def _bucket(sets: list[list[TensorPlan]], wire_format: WireFormat) -> Bucket:
    tensors = [tensor for related in sets for tensor in related]
    wired = [wire for tensor in tensors for wire in wire_format.wire_tensors(tensor.name, tensor.shape)]
    slots, position = [], 0
    for wire in sorted(wired, key=lambda w: -w.dtype.itemsize):
        stop = position + _num_bytes(wire.shape, wire.dtype)
        slots.append(Slot(wire, position, stop))
        position = stop
    gathered = max(sum(_num_bytes(t.shape, t.dtype) for t in related) for related in sets)
    return Bucket(tuple(t.name for t in tensors), tuple(slots), position, gathered)


@dataclass(frozen=True)
class MemoryPlan:
    """The buckets of a sync, and the memory that they take on the sender."""

    buckets: list[Bucket]
    arena_bytes: int
    """Bytes allocated for the buckets during the whole sync."""
    gathered_bytes: int
    """Bytes allocated in addition while the largest related set is gathered."""

    @property
    def peak_bytes(self) -> int:
        return self.arena_bytes + self.gathered_bytes

    @classmethod
    def make(
        cls, tensors: Sequence[TensorPlan], wire_format: WireFormat, bucket_bytes: int, copies: int
    ) -> "MemoryPlan":
        """Plans buckets so that arena and gathering together stay within two ``bucket_bytes``, if the tensors allow it.

        The arena holds the bucket that is being sent and the one that is being filled. If two do not fit, the second waits
        until the first is sent.

        Args:
            copies: number of additional copies of a tensor while it is gathered; 0 if it is gathered in place.
        """
        largest = max((b.gathered_bytes for b in plan_buckets(tensors, wire_format, 0)), default=0) * copies
        alone = max((b.num_bytes for b in plan_buckets(tensors, wire_format, 0)), default=0)
        arena = max(2 * bucket_bytes - largest, alone)
        buckets = plan_buckets(tensors, wire_format, min(bucket_bytes, arena // 2))
        # A small model needs less: the largest two neighbours, each with up to one alignment of padding.
        sizes = [bucket.num_bytes for bucket in buckets]
        needed = max([*sizes, *(a + b for a, b in pairwise(sizes))], default=0) + 2 * _ALIGNMENT
        return cls(buckets, min(arena, needed), largest)


class Arena:
    """Memory for two buckets at a time. Buckets are placed alternately at its start and at its end.

    Args:
        is_shared: whether other processes map the buckets. Each bucket then gets an allocation of its own, which torch does not
            reuse before every process has closed it.
    """

    def __init__(self, num_bytes: int, device: torch.device, is_shared: bool = False) -> None:
        self._num_bytes = num_bytes
        self._device = device
        self._sent: tuple[int, int] | None = None
        self._pages: mmap.mmap | None = None
        self._memory: Tensor | None = None
        if is_shared:
            return
        if device.type == "cpu":
            self._pages = _new_pages(num_bytes)
            self._memory = torch.frombuffer(self._pages, dtype=torch.uint8)[:num_bytes]
        else:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def place(self, num_bytes: int) -> tuple[int, int] | None:
        """Returns start and stop of a free region for a bucket; None if the bucket being sent must be finished first."""
        if self._sent is None or self._sent[0] >= num_bytes:
            return 0, num_bytes
        start = (self._num_bytes - num_bytes) // _ALIGNMENT * _ALIGNMENT
        return (start, start + num_bytes) if start >= self._sent[1] else None

    def memory(self, place: tuple[int, int]) -> Tensor:
        """Returns the memory of a region, [num_bytes] uint8."""
        if self._memory is not None:
            return self._memory[place[0] : place[1]]
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # frees buckets that all readers have closed
        return torch.empty(place[1] - place[0], dtype=torch.uint8, device=self._device)

    def sent(self, place: tuple[int, int] | None) -> None:
        """Marks a region as being sent; None if no region is being sent."""
        self._sent = place

    @property
    def is_reusable(self) -> bool:
        """Whether the arena can be kept until the next sync without taking memory from other uses."""
        return self._pages is not None

    def park(self) -> None:
        """Allows the system to take the pages until the next sync if memory gets scarce. Their content is lost then."""
        assert self._pages is not None
        self._sent = None
        with suppress(AttributeError, OSError):  # not on Linux
            self._pages.madvise(mmap.MADV_FREE)


def _new_pages(num_bytes: int) -> mmap.mmap:
    """Returns CPU memory, in huge pages if the system has them: mapping small pages takes longer than filling them."""
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # the system is not Linux, or has no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
