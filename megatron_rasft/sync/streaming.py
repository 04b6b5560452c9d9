"""Streams one pipeline stage's tensors: the next bucket is gathered while the previous bucket is being sent."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.sync.buckets import Arena, Bucket, MemoryPlan
from megatron_rasft.sync.groups import GroupFailure
from megatron_rasft.sync.weight_checks import Evidence, EvidenceCollector
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.weights.fp8_blocks import SCALE_SUFFIX, quantize_blocks
from megatron_rasft.weights.gathering import ModelTensors

Send = Callable[[Bucket, Tensor], None]
"""Makes every server load a bucket ([num_bytes] uint8), or raises GroupFailure."""


@dataclass
class Outcome:
    """The result of the transfer of one or more stages."""

    failed: dict[str, str] = field(default_factory=dict)
    """Server at fault -> reason."""
    reason: str = ""
    """Why the transfer failed, also if no server is known to be at fault; empty if it succeeded."""
    refusal: str = ""
    """Whether the fault is the trainer's own: its address, port or memory."""
    evidence: Evidence = field(default_factory=Evidence)
    num_bytes: int = 0
    num_buckets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase of the transfer -> seconds."""

    def merge(self, other: "Outcome") -> None:
        """Adds another stage's outcome to this one."""
        self.failed.update(other.failed)
        self.reason = self.reason or other.reason
        self.refusal = self.refusal or other.refusal
        self.evidence.merge(other.evidence)
        self.num_bytes += other.num_bytes
        self.num_buckets += other.num_buckets
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def note(self, failure: Exception) -> None:
        """Keeps the reason of the first failure, and the servers that a GroupFailure names."""
        self.reason = self.reason or str(failure)
        if isinstance(failure, GroupFailure):
            self.failed.update(failure.servers)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the duration of the block to ``seconds[phase]``."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began


class StageStream:
    """Gathers a stage's tensors from all ranks that hold parts of them, and sends them from the first of these ranks.

    Args:
        tensors: the stage's tensors.
        ranks: gloo group of the gathering ranks; None if this rank is the only one.
        device: the device of the parameters.
        wire_format: the format in which the servers need the tensors.
        bucket_bytes: --sync-bucket-mib in bytes.
        is_shared: whether servers map the buckets instead of receiving copies.
    """

    def __init__(
        self,
        tensors: ModelTensors,
        *,
        ranks: ProcessGroup | None,
        device: torch.device,
        wire_format: WireFormat,
        bucket_bytes: int,
        is_shared: bool = False,
    ) -> None:
        self.wire_format = wire_format
        self._gather = tensors.gather
        self._ranks = ranks if ranks is not None and ranks.size() > 1 else None
        self._device = device
        self._is_shared = is_shared
        self._arena: Arena | None = None
        own = tensors.plan()
        self._dtypes = {tensor.name: wire_format.type_of(tensor.name) for tensor in own}
        is_copied = self._ranks is not None or any(t.dtype != self._dtypes[t.name] for t in own)
        num_copies = int(is_copied) + int(wire_format.is_block_fp8)
        self.memory = MemoryPlan.make(
            tensors.plan(dtypes=self._dtypes), wire_format, bucket_bytes, num_copies
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every tensor of the stage, in the trainer's order."""
        buckets = self.memory.buckets
        sent = {slot.tensor.name: slot.tensor.shape for bucket in buckets for slot in bucket.slots}
        return {name: sent[name] for bucket in buckets for name in bucket.hf_names}

    @property
    def is_sender(self) -> bool:
        """Whether this rank sends the tensors."""
        return self._ranks is None or self._ranks.rank() == 0

    def agree(self, goes_on: bool) -> bool:
        """Returns the sender's value on all ranks of the stage. Runs one broadcast on their group."""
        if self._ranks is None:
            return goes_on
        value = torch.tensor([goes_on], dtype=torch.int32)
        dist.broadcast(value, group=self._ranks, group_src=0)
        return bool(value.item())

    @property
    def num_kept_bytes(self) -> int:
        """Size in bytes of the arena that is kept between two runs."""
        return 0 if self._arena is None else self.memory.arena_bytes

    def take_arena(self) -> Arena:
        """Returns the memory that ``run`` needs on the sender.

        On a CPU this is the last run's memory, so that the system need not map its pages again.
        """
        arena, self._arena = self._arena, None
        return arena or Arena(self.memory.arena_bytes, self._device, self._is_shared)

    def run(
        self, outcome: Outcome, collector: EvidenceCollector | None, arena: Arena | None, send: Send | None
    ) -> None:
        """Gathers and sends every bucket. Ends early on all ranks if a bucket cannot be sent.

        Args:
            outcome: the outcome to fill in.
            collector: receives each bucket; on the sender only.
            arena: from ``take_arena``; on the sender only.
            send: sends a bucket, called in a separate thread; None on every rank sends nothing.
        """
        if not self.is_sender:
            self._gather_for_sender(has_send=send is not None)
            return
        assert arena is not None
        views: dict[str, Tensor] = {}
        memory: Tensor | None = None
        tensors = self._gather(dtypes=self._dtypes, out=views.get)
        with ThreadPoolExecutor(1, "sync-send", initializer=self._use_device) as pool:
            sending: Future[None] | None = None
            for bucket in self.memory.buckets:
                place = arena.place(bucket.num_bytes)
                if place is None:  # no space beside the bucket that is being sent
                    self._finish(sending, outcome)
                    sending = None
                    arena.sent(None)
                    place = arena.place(bucket.num_bytes)
                    assert place is not None, "the arena holds the largest bucket"
                views.clear()
                memory = None  # frees the last bucket first: if buckets are shared, each has its own memory
                memory = arena.memory(place)
                with timed(outcome.seconds, "gather"):
                    self._fill(bucket, memory, tensors, views)
                if collector is not None:
                    with timed(outcome.seconds, "hash"):
                        collector.add(bucket, memory)
                self._finish(sending, outcome)
                sending = None
                if send is not None:
                    if not self.agree(not outcome.reason):
                        break
                    sending = pool.submit(self._send, send, bucket, memory, outcome)
                    arena.sent(place)
            self._finish(sending, outcome)
        # after a failure, an abandoned broadcast may still read the memory
        if arena.is_reusable and not outcome.reason:
            arena.park()
            self._arena = arena

    def _gather_for_sender(self, has_send: bool) -> None:
        """Gathers every bucket together with the sender. Runs on the ranks that do not send."""
        tensors = self._gather(dtypes=self._dtypes, out=lambda name: None)
        for bucket in self.memory.buckets:
            for _ in bucket.hf_names:
                next(tensors)
            if has_send and not self.agree(True):
                break

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a property of each thread

    def _fill(
        self,
        bucket: Bucket,
        memory: Tensor,
        tensors: Iterator[tuple[str, Tensor | None]],
        views: dict[str, Tensor],
    ) -> None:
        """Gathers a bucket's tensors into its memory. Tensors that need no conversion are gathered in place, without a copy."""
        places = bucket.views(memory)
        views.update({n: v for n, v in places.items() if v.dtype == self._dtypes.get(n)})
        for expected in bucket.hf_names:
            name, tensor = next(tensors)
            assert name == expected and tensor is not None, (
                f"{name} was gathered where {expected} was planned"
            )
            if name not in views:
                quantize_blocks(tensor, places[name], places[name + SCALE_SUFFIX])
            elif tensor.data_ptr() != views[name].data_ptr():
                views[name].copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the sending thread uses another stream

    def _send(self, send: Send, bucket: Bucket, memory: Tensor, outcome: Outcome) -> None:
        with timed(outcome.seconds, "send"):
            send(bucket, memory)
        outcome.num_bytes += bucket.num_bytes
        outcome.num_buckets += 1

    def _finish(self, sending: Future[Any] | None, outcome: Outcome) -> None:
        """Waits until a bucket is sent, and records its failure."""
        if sending is None:
            return
        with timed(outcome.seconds, "wait"):
            error = sending.exception()
        if isinstance(error, GroupFailure):
            outcome.note(error)
        elif error is not None:
            raise error
