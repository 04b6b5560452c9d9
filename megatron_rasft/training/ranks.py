"""Work that one rank does for all: the result, or the failure, reaches every rank."""

import os
import pickle
import sys
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rasft.errors import FailedElsewhere

_PATIENCE = timedelta(days=1)
"""Verifying a window, waiting for a server, or for the slowest replica's samples, may take longer than the
--distributed-timeout-minutes of a step."""

_GRACE = timedelta(seconds=5)
"""For the first rank of a node, to say an error that others of it have met as well."""

_patient: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: None, lambda: None)
"""Weak references to the default group and the patient gloo group of the same ranks: a group that outlives
destroy_process_group may abort the process when it exits, as its threads are still there."""


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank of the world.

    Runs one broadcast on a gloo group of its own, which waits for hours. If ``work`` raises, rank 0 raises that and
    the others raise FailedElsewhere, so no rank is left waiting.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
            box = [None, f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(box, src=0, group=_patient_group())
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise FailedElsewhere(box[1])
    return box[0]


def kept_by_rank_zero[T](
    work: Callable[[], T], elsewhere: T, share: Callable[[Callable[[], None]], None] = on_rank_zero
) -> T:
    """``on_rank_zero`` (or ``share``, which does alike) for a result that nobody else needs.

    The other ranks get ``elsewhere``, or the failure.
    """
    result = elsewhere

    def run() -> None:
        nonlocal result
        result = work()

    share(run)
    return result


def gather_to_rank_zero[T](value: T | None) -> list[T]:
    """On rank 0 the values of the ranks that have one, in rank order; on the others [].

    A collective of the world on the patient gloo group. Each value travels alone and nothing is padded: rank 0 holds
    their sum, the other ranks nothing. Arrays are compact on the way, lists of numbers are not.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [] if value is None else [value]
    group = _patient_group()
    packed = torch.empty(0, dtype=torch.uint8) if value is None else _packed(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([packed.numel()]), group=group)
    if dist.get_rank() != 0:
        if packed.numel():
            dist.send(packed, 0, group=group)
        return []
    values = [] if value is None else [value]
    for rank in range(1, dist.get_world_size()):
        if size := int(sizes[rank]):
            part = torch.empty(size, dtype=torch.uint8)
            dist.recv(part, rank, group=group)
            values.append(_unpacked(part))
    return values


def hand_out[T](work: Callable[[], Sequence[T]], replicas: Sequence[Sequence[int]]) -> T:
    """Give each replica its own value, which rank 0 makes; a failure of ``work`` reaches every rank.

    A collective of the world on the patient gloo group. A value goes to the first rank of its replica and from there to
    the others, each of which passes it on: rank 0 sends one copy a replica, however many ranks that has.

    Args:
        work: called on rank 0; gives the values, one a replica.
        replicas: the ranks of each replica, the same everywhere. Together they are the world; rank 0 comes first.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()[0]
    own: list[T] = []
    parts: list[torch.Tensor] = []

    def pack() -> list[int]:
        values = work()
        own.append(values[0])
        # Rank 0 packs its own value only for others of its replica.
        parts.extend(
            _packed(v) if i or len(replicas[0]) > 1 else torch.empty(0) for i, v in enumerate(values)
        )
        return [part.numel() for part in parts]

    sizes = on_rank_zero(pack)
    group, me = _patient_group(), dist.get_rank()
    number = next(i for i, ranks in enumerate(replicas) if me in ranks)
    sends: list[Any] = []
    if me == 0:
        value = parts[0]
        others = zip(parts[1:], replicas[1:], strict=True)
        sends = [dist.isend(part, ranks[0], group=group) for part, ranks in others]
    else:
        value = torch.empty(sizes[number], dtype=torch.uint8)
        if me == replicas[number][0]:
            dist.recv(value, 0, group=group)
    _pass_on(value, replicas[number], group)
    for send in sends:
        send.wait()
    return own[0] if me == 0 else _unpacked(value)


def _packed(value: Any) -> torch.Tensor:
    """[bytes] uint8: a pickle and beside it the arrays' memory, which is copied once."""
    buffers: list[Any] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: list[Any] = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
    head = np.array([len(parts), *map(len, parts)], np.int64)
    packed = np.empty(head.nbytes + sum(map(_aligned, head[1:].tolist())), np.uint8)
    end = 0
    for part in (head.view(np.uint8), *parts):
        packed[end : end + len(part)] = part
        end += _aligned(len(part))
    return torch.from_numpy(packed)


def _unpacked(packed: torch.Tensor) -> Any:
    """The inverse of ``_packed``; arrays are views of ``packed``."""
    memory = memoryview(packed.numpy())
    num_parts = int(np.frombuffer(memory[:8], np.int64)[0])
    lengths = np.frombuffer(memory[8 : 8 * (1 + num_parts)], np.int64).tolist()
    parts: list[memoryview] = []
    end = 8 * (1 + num_parts)
    for length in lengths:
        parts.append(memory[end : end + length])
        end += _aligned(length)
    return pickle.loads(parts[0], buffers=parts[1:])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


def _pass_on(value: torch.Tensor, ranks: Sequence[int], group: Any) -> None:
    """Bring the first rank's value to the others; those that have it double with every round."""
    place, num_done = list(ranks).index(dist.get_rank()), 1
    while num_done < len(ranks):
        if place < num_done and place + num_done < len(ranks):
            dist.send(value, ranks[place + num_done], group=group)
        elif num_done <= place < 2 * num_done:
            dist.recv(value, ranks[place - num_done], group=group)
        num_done *= 2


def _patient_group() -> Any:
    """Made at the first call, which is a collective of the world."""
    global _patient
    world, group = dist.group.WORLD, _patient[1]()
    if group is None or _patient[0]() is not world:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _patient = (weakref.ref(world), weakref.ref(group))
    return group


def gather_to_all[T](value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; one all-gather on the default group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def report_failure(error: BaseException) -> int:
    """Say on stderr what ended this process, in one place of each node that met it.

    Returns:
        The exit code: 2 for what the user gave, 1 for what the world did.
    """
    if not isinstance(error, FailedElsewhere) and speaks_for_node(str(error)):
        # a rank other than 0 says where to look
        rank = int(os.environ.get("RANK", "0"))
        print("error: " + (f"rank {rank}: " if rank else "") + str(error), file=sys.stderr, flush=True)
    return 2 if isinstance(error, ValueError) else 1


def speaks_for_node(message: str) -> bool:
    """Whether this process prints this error: the first rank of a node does, and one that is alone with it.

    Most errors are met by every rank alike, so the others wait until the first one has left its mark in the store
    that the ranks met in; if it does not come, they speak. Before the ranks have met, only the first rank does.
    """
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0"
    mark = f"rasft/said/{node}/{message}"
    is_first = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0
    if not dist.is_initialized():
        return is_first
    store = dist.distributed_c10d._get_default_store()
    try:
        if is_first:
            store.set(mark, "1")
        else:
            store.wait([mark], _GRACE)
    except dist.DistNetworkError:
        # the process that keeps the store has ended, and does not do so without a word
        return is_first
    except RuntimeError:  # it did not come in time
        return True
    return is_first
