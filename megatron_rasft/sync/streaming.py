"""One pipeline stage's tensors on their way: gathered into a bucket while the bucket before it is being sent."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.sync.buckets import Arena, Bucket, MemoryPlan, Planned
from megatron_rasft.sync.groups import GroupFailure
from megatron_rasft.sync.weight_checks import Evidence, Witness
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.weights.fp8_blocks import SCALE_SUFFIX, quantize_blocks


class PlanTensors(Protocol):
    """What this stage will give: ``weights.plan_tensors`` with everything but ``dtypes`` bound."""

    def __call__(self, *, dtypes: dict[str, torch.dtype] | None = None) -> Sequence[Planned]: ...


class GatherTensors(Protocol):
    """Gives it, whole on the source: ``weights.gather_tensors`` with everything but these bound."""

    def __call__(
        self, *, dtypes: dict[str, torch.dtype], out: Callable[[str], Tensor | None]
    ) -> Iterator[tuple[str, Tensor | None]]: ...


Send = Callable[[Bucket, Tensor], None]
"""Has every server load a bucket ([num_bytes] uint8), or raises GroupFailure."""


@dataclass
class Outcome:
    """What the sources brought about."""

    failed: dict[str, str] = field(default_factory=dict)
    """Servers at fault, and why."""
    reason: str = ""
    """Set where the transfer failed, whether or not a server is known to be at fault."""
    refusal: str = ""
    """Set where no server can be at fault: an address, a port or memory of the trainer's own."""
    evidence: Evidence = field(default_factory=Evidence)
    num_bytes: int = 0
    num_buckets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def merge(self, other: "Outcome") -> None:
        self.failed.update(other.failed)
        self.reason = self.reason or other.reason
        self.refusal = self.refusal or other.refusal
        self.evidence.merge(other.evidence)
        self.num_bytes += other.num_bytes
        self.num_buckets += other.num_buckets
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def note(self, failure: Exception) -> None:
        """Keep the first failure; a GroupFailure names its servers."""
        self.reason = self.reason or str(failure)
        if isinstance(failure, GroupFailure):
            self.failed.update(failure.servers)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of the block to ``seconds[phase]``."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began


class StageStream:
    """Draws a stage's tensors from all ranks that have a part of them and sends them from the first.

    Args:
        plan, gather: the stage's tensors.
        givers: those ranks, a group on the CPU; None where there is only this one.
        device: where the parameters are.
        served: what the servers want.
        bucket_bytes: as flagged.
        is_shared: servers map the buckets, in the place of receiving them.
    """

    def __init__(
        self,
        plan: PlanTensors,
        gather: GatherTensors,
        *,
        givers: ProcessGroup | None,
        device: torch.device,
        served: WireFormat,
        bucket_bytes: int,
        is_shared: bool = False,
    ) -> None:
        self._gather = gather
        self._givers = givers if givers is not None and givers.size() > 1 else None
        self._device = device
        self._served = served
        self._is_shared = is_shared
        self._arena: Arena | None = None
        own = plan()
        self._dtypes = dict.fromkeys((tensor.name for tensor in own), served.dtype)
        is_copied = self._givers is not None or any(tensor.dtype != served.dtype for tensor in own)
        self.memory = MemoryPlan.make(
            plan(dtypes=self._dtypes), served, bucket_bytes, int(is_copied) + int(served.is_block_fp8)
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the stage, in the trainer's order."""
        buckets = self.memory.buckets
        sent = {slot.tensor.name: slot.tensor.shape for bucket in buckets for slot in bucket.slots}
        return {name: sent[name] for bucket in buckets for name in bucket.sources}

    @property
    def is_source(self) -> bool:
        return self._givers is None or self._givers.rank() == 0

    def agree(self, is_well: bool) -> bool:
        """The source's word on all ranks; one broadcast on the group of the givers."""
        if self._givers is None:
            return is_well
        word = torch.tensor([is_well], dtype=torch.int32)
        dist.broadcast(word, group=self._givers, group_src=0)
        return bool(word.item())

    @property
    def num_resting(self) -> int:
        """Bytes that stay between two runs."""
        return 0 if self._arena is None else self.memory.arena_bytes

    def take_arena(self) -> Arena:
        """The memory that ``run`` needs on the source: on a CPU that of the last run, whose pages need not come in again."""
        arena, self._arena = self._arena, None
        return arena or Arena(self.memory.arena_bytes, self._device, self._is_shared)

    def run(self, outcome: Outcome, witness: Witness | None, arena: Arena | None, send: Send | None) -> None:
        """Take every bucket through; ends early on all ranks when one cannot be sent.

        Args:
            outcome: is filled in.
            witness: looks at each bucket; on the source only.
            arena: from ``take_arena``; on the source only.
            send: sends a bucket ([num_bytes] uint8), or raises GroupFailure; runs in a thread of its own.
                None: nothing is sent, on any rank.
        """
        if not self.is_source:
            tensors = self._gather(dtypes=self._dtypes, out=lambda name: None)
            for bucket in self.memory.buckets:
                for _ in bucket.sources:
                    next(tensors)
                if send is not None and not self.agree(True):
                    break
            return
        assert arena is not None
        views: dict[str, Tensor] = {}
        memory: Tensor | None = None
        tensors = self._gather(dtypes=self._dtypes, out=views.get)
        with ThreadPoolExecutor(1, "sync-send", initializer=self._use_device) as pool:
            sending: Future[None] | None = None
            for bucket in self.memory.buckets:
                place = arena.place(bucket.num_bytes)
                if place is None:
                    self._finish(sending, outcome)
                    sending = None
                    arena.sent(None)
                    place = arena.place(bucket.num_bytes)
                    assert place is not None, "the arena holds the largest bucket"
                views.clear()
                memory = None  # what is shared is given back bucket by bucket
                memory = arena.memory(place)
                with timed(outcome.seconds, "gather"):
                    self._fill(bucket, memory, tensors, views)
                if witness is not None:
                    with timed(outcome.seconds, "hash"):
                        witness.look(bucket, memory)
                self._finish(sending, outcome)
                sending = None
                if send is not None:
                    if not self.agree(not outcome.reason):
                        break
                    sending = pool.submit(self._send, send, bucket, memory, outcome)
                    arena.sent(place)
            self._finish(sending, outcome)
        # after a failure a send that was given up may still read it
        if arena.can_rest and not outcome.reason:
            arena.rest()
            self._arena = arena

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # per thread

    def _fill(
        self,
        bucket: Bucket,
        memory: Tensor,
        tensors: Iterator[tuple[str, Tensor | None]],
        views: dict[str, Tensor],
    ) -> None:
        """Draw a bucket's tensors into its memory; those that are sent as they are are gathered right there."""
        places = bucket.views(memory)
        views.update({n: v for n, v in places.items() if n in self._dtypes and v.dtype == self._served.dtype})
        for expected in bucket.sources:
            name, tensor = next(tensors)
            assert name == expected and tensor is not None, (
                f"{name} was gathered where {expected} was planned"
            )
            if name not in views:
                quantize_blocks(tensor, places[name], places[name + SCALE_SUFFIX])
            elif tensor.data_ptr() != views[name].data_ptr():
                views[name].copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # another thread sends it

    def _send(self, send: Send, bucket: Bucket, memory: Tensor, outcome: Outcome) -> None:
        with timed(outcome.seconds, "send"):
            send(bucket, memory)
        outcome.num_bytes += bucket.num_bytes
        outcome.num_buckets += 1

    def _finish(self, sending: Future[Any] | None, outcome: Outcome) -> None:
        if sending is None:
            return
        with timed(outcome.seconds, "wait"):
            error = sending.exception()
        if isinstance(error, GroupFailure):
            outcome.note(error)
        elif error is not None:
            raise error
