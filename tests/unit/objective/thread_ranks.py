"""Ranks that are threads of the test's process. They start in milliseconds, and mutmut's changes of a function reach them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT_S = 600
"""A rank waits this long for the others; they never come if one of them has failed."""


def on_threads[T](function: Callable[[int, Any], T], size: int) -> list[T]:
    """Returns ``function(rank, group)`` of each rank. Inside it the collectives of ``group`` join the threads."""
    barrier = Barrier(size, timeout=_TIMEOUT_S)
    sent: dict[int, Tensor] = {}

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        sent[group] = tensor.clone()
        barrier.wait()
        parts = torch.stack([sent[rank] for rank in range(size)])
        barrier.wait()  # before a rank sends again
        tensor.copy_({dist.ReduceOp.MAX: parts.amax, dist.ReduceOp.SUM: parts.sum}[op](0))

    def run(rank: int) -> T:
        try:
            return function(rank, rank)  # the group of a rank is its number
        except BaseException:
            barrier.abort()
            raise

    with (
        mock.patch.object(dist, "get_rank", lambda group: group),
        mock.patch.object(dist, "get_world_size", dict.fromkeys(range(size), size).__getitem__),
        mock.patch.object(dist, "all_reduce", all_reduce),
        ThreadPoolExecutor(size) as pool,
    ):
        return list(pool.map(run, range(size)))
