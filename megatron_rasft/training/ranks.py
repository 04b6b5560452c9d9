"""Work that one rank does for all: the result, or the failure, reaches every rank."""

import os
import pickle
import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

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

    A collective of the world on the patient gloo group. Each value travels alone, pickled, and nothing is padded:
    rank 0 holds their sum, the other ranks nothing. Arrays are compact on the way, lists of numbers are not.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [] if value is None else [value]
    group = _patient_group()
    packed = b"" if value is None else pickle.dumps(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(packed)]), group=group)
    if dist.get_rank() != 0:
        if packed:
            dist.send(torch.frombuffer(bytearray(packed), dtype=torch.uint8), 0, group=group)
        return []
    values = [] if value is None else [value]
    for rank in range(1, dist.get_world_size()):
        if size := int(sizes[rank]):
            part = torch.empty(size, dtype=torch.uint8)
            dist.recv(part, rank, group=group)
            values.append(pickle.loads(part.numpy()))
    return values


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
