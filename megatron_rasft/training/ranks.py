"""Work that one rank does for all: the result, or the failure, reaches every rank."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PATIENCE = timedelta(days=1)
"""For rank 0: verifying a window, or waiting for a server, may take longer than the --distributed-timeout-minutes of a step."""

_patient: tuple[Any, Any] = (None, None)
"""The default group, and the gloo group of the same ranks that waits for rank 0."""


class FailedElsewhere(Exception):
    """Raised on the ranks that only heard of a failure: rank 0 has the message."""


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


def _patient_group() -> Any:
    """Made at the first call, which is a collective of the world."""
    global _patient
    world = dist.group.WORLD
    if _patient[0] is not world:
        _patient = (world, dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _patient[1]


def gather_to_all[T](value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; one all-gather on the default group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def speaks_for_node() -> bool:
    """Whether this process prints its own errors: one a node, since most are met by every rank of it alike.

    Asks torchrun's environment, as torch.distributed may not be up yet.
    """
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0


def rank_prefix() -> str:
    """What an error of this process begins with: a rank other than 0 is on another node, where to look."""
    rank = int(os.environ.get("RANK", "0"))
    return f"rank {rank}: " if rank else ""
