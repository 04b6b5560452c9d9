"""Which tensors are sent together, and the memory they are put together in."""

import math
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_rasft.sync.wire_format import WireFormat, WireTensor, fused_name

_ALIGNMENT = 16
"""Bytes; a view as any type needs its start on a multiple of the element size."""

_FIRST_BUCKET_BYTES = 64 * 2**20
"""Until the first bucket is full nothing is sent, so it is small, and each after it up to twice the one before. Smaller
still would not pay: a request costs a server some 10 ms."""


class Planned(Protocol):
    """A tensor that the trainer will give (``weights.gathering.TensorPlan``)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Slot(NamedTuple):
    """A tensor's place in its bucket."""

    tensor: WireTensor
    start: int
    """Bytes from the start of the bucket."""
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel in one broadcast, end to end without gaps."""

    sources: tuple[str, ...]
    """Hugging Face tensors that are drawn for it, in the trainer's order."""
    slots: tuple[Slot, ...]
    """What they become, in the order sent: wide types first, so that each is aligned to its elements."""
    num_bytes: int
    gathered_bytes: int
    """Bytes of the largest parameter that is gathered for it, which is held beside the bucket for a moment."""

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Each tensor's part of ``memory`` ([num_bytes] uint8), as that tensor."""
        return {
            wire.name: memory[start:stop].view(wire.dtype).view(wire.shape)
            for wire, start, stop in self.slots
        }


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def related_sets(tensors: Iterable[Planned]) -> list[list[Planned]]:
    """Tensors that belong together: those the server fuses (q, k, v; gate, up), else each by itself."""
    sets: list[list[Planned]] = []
    for tensor in tensors:
        if sets and fused_name(sets[-1][0].name) == fused_name(tensor.name):
            sets[-1].append(tensor)
        else:
            sets.append([tensor])
    return sets


def plan_buckets(tensors: Sequence[Planned], served: WireFormat, limit: int) -> list[Bucket]:
    """Cut the tensors, in their order, into buckets of at most ``limit`` bytes, the first ones of less.

    A related set is never split; one larger than the limit goes alone.
    """
    buckets: list[Bucket] = []
    pending: list[list[Planned]] = []
    room = allowed = min(limit, _FIRST_BUCKET_BYTES)
    for related in related_sets(tensors):
        size = sum(
            _num_bytes(w.shape, w.dtype) for t in related for w in served.wire_tensors(t.name, t.shape)
        )
        if pending and size > room:
            buckets.append(_bucket(pending, served))
            pending = []
            room = allowed = min(limit, 2 * allowed)
        pending.append(related)
        room -= size
    return [*buckets, _bucket(pending, served)] if pending else buckets


def _bucket(sets: list[list[Planned]], served: WireFormat) -> Bucket:
    sources = [tensor for related in sets for tensor in related]
    wired = [wire for tensor in sources for wire in served.wire_tensors(tensor.name, tensor.shape)]
    slots, position = [], 0
    for wire in sorted(wired, key=lambda w: -w.dtype.itemsize):
        stop = position + _num_bytes(wire.shape, wire.dtype)
        slots.append(Slot(wire, position, stop))
        position = stop
    gathered = max(sum(_num_bytes(t.shape, t.dtype) for t in related) for related in sets)
    return Bucket(tuple(t.name for t in sources), tuple(slots), position, gathered)


@dataclass(frozen=True)
class MemoryPlan:
    """How much memory a sync takes on the rank that sends, and the buckets that fit in it."""

    buckets: list[Bucket]
    arena_bytes: int
    """Held from the first bucket to the last."""
    gathered_bytes: int
    """Held beside it while the largest parameter is put together."""

    @property
    def peak_bytes(self) -> int:
        return self.arena_bytes + self.gathered_bytes

    @classmethod
    def make(
        cls, tensors: Sequence[Planned], served: WireFormat, bucket_bytes: int, copies: int
    ) -> "MemoryPlan":
        """Buckets such that arena and gathering stay within two ``bucket_bytes``, where the tensors allow it.

        The arena holds the bucket being sent and the one being filled; where two do not fit, the second
        waits for the first.

        Args:
            copies: how often a parameter is held while it is gathered: 0 where it is sent as it is.
        """
        largest = max((b.gathered_bytes for b in plan_buckets(tensors, served, 0)), default=0) * copies
        alone = max((b.num_bytes for b in plan_buckets(tensors, served, 0)), default=0)
        arena = max(2 * bucket_bytes - largest, alone)
        buckets = plan_buckets(tensors, served, min(bucket_bytes, arena // 2))
        # no larger than two neighbours need: a small model takes little
        sizes = [bucket.num_bytes for bucket in buckets]
        needed = max([*sizes, *(a + b for a, b in pairwise(sizes))], default=0) + 2 * _ALIGNMENT
        return cls(buckets, min(arena, needed), largest)


class Arena:
    """Memory for two buckets at a time: one grows from its start, the next from its end, in turn.

    Args:
        is_shared: other processes map the buckets. Each is then memory of its own, which torch does not give out again before
            all of them have let it go.
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
        """Where a bucket fits beside the one in flight; None if it must wait for that one."""
        if self._sent is None or self._sent[0] >= num_bytes:
            return 0, num_bytes
        start = (self._num_bytes - num_bytes) // _ALIGNMENT * _ALIGNMENT
        return (start, start + num_bytes) if start >= self._sent[1] else None

    def memory(self, place: tuple[int, int]) -> Tensor:
        """[num_bytes] uint8."""
        if self._memory is not None:
            return self._memory[place[0] : place[1]]
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # of buckets that all readers have let go
        return torch.empty(place[1] - place[0], dtype=torch.uint8, device=self._device)

    def sent(self, place: tuple[int, int] | None) -> None:
        """This part is in flight from now on; None: nothing is."""
        self._sent = place

    @property
    def can_rest(self) -> bool:
        """Whether it can be kept without taking memory from others."""
        return self._pages is not None

    def rest(self) -> None:
        """Nothing in it is needed until the next sync: where memory gets scarce, the system may take it meanwhile."""
        assert self._pages is not None
        self._sent = None
        with suppress(AttributeError, OSError):  # another system than Linux
            self._pages.madvise(mmap.MADV_FREE)


def _new_pages(num_bytes: int) -> mmap.mmap:
    """Memory of the CPU, in huge pages where there are any: small ones take longer to come in than what is copied into them."""
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # another system, or one without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
