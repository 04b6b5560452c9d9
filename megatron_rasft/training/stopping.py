"""Ends a run before its last step: on a signal, or after a given time.

All ranks must stop at the same point, so the run checks at fixed points, where the ranks agree by a collective.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.ranks import gather_to_all, on_rank_zero


class Stopped(Exception):
    """Ends the run. It is raised on every rank at the same place, except by ``StopRequest.check_here``."""


class StopRequest:
    """Checks for --exit-signal (SIGTERM) and --exit-duration-in-mins.

    Args:
        has_signal: called without arguments; returns whether this process has received the signal.
        duration_min: minutes after ``began`` at which the run ends; None for no limit.
        began: ``time.time()`` when the program started.
        device: device of the tensor that the ranks exchange.
    """

    def __init__(
        self,
        has_signal: Callable[[], bool],
        duration_min: int | None = None,
        began: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._has_signal = has_signal
        self._duration_min = duration_min
        self._began = began
        self._device = device

    def _reason_here(self) -> str:
        if self._has_signal():
            return "a signal"
        if self._duration_min and time.time() - self._began > 60 * self._duration_min:
            return f"--exit-duration-in-mins {self._duration_min}"
        return ""

    def reason(self) -> str:
        """Returns why the run is to stop: a reason that any rank has, or "". A collective of the world."""
        return next((reason for reason in gather_to_all(self._reason_here()) if reason), "")

    def is_asked(self, group: Any = None) -> bool:
        """Returns whether any rank of ``group`` (None: the world) has a reason to stop. Runs one all-reduce on the group."""
        if not dist.is_initialized():
            return bool(self._reason_here())
        flag = torch.tensor(int(bool(self._reason_here())), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
        return bool(flag)

    def check(self) -> None:
        """Raises Stopped if any rank has a reason to stop. A collective of the world."""
        if self.is_asked():
            raise Stopped

    def check_here(self) -> None:
        """Raises Stopped if this rank has a reason to stop. Not a collective: it serves work that only rank 0 does."""
        if self._reason_here():
            raise Stopped

    def on_rank_zero[T](self, work: Callable[[], T]) -> T:
        """Runs long work that calls ``check_here`` as ``ranks.on_rank_zero`` does. Stopped reaches every rank."""

        def attempt() -> tuple[T | None, bool]:
            try:
                return work(), False
            except Stopped:
                return None, True

        result, is_stopped = on_rank_zero(attempt)
        if is_stopped:
            raise Stopped
        return result  # type: ignore[return-value]
