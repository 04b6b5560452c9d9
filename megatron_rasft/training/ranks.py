"""Work that one rank does for all: the result, or the failure, reaches every rank."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class FailedElsewhere(Exception):
    """Raised on the ranks that only heard of a failure: rank 0 has the message."""


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank of the world.

    Runs one broadcast on the default group. If ``work`` raises, rank 0 raises that and the others
    raise FailedElsewhere, so no rank is left waiting.
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
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise FailedElsewhere(box[1])
    return box[0]


def gather_to_all[T](value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; one all-gather on the default group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
