"""How a run ends before its last step: asked for in the pauses of its work, at one place on all ranks."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.ranks import gather_to_all, kept_by_rank_zero, on_rank_zero


class Stopped(Exception):
    """The run is to end here; raised on every rank alike, but for ``StopRequest.check_here``."""


class StopRequest:
    """--exit-signal (SIGTERM), and --exit-duration-in-mins.

    Args:
        has_signal: whether this process was sent the signal.
        duration_min: minutes after ``began`` at which the run ends; None lets it go on.
        began: when the program started, seconds of ``time.time()``.
        device: of the flags that ranks exchange.
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
        """What asks any rank to stop, empty if nothing does; a collective of the world."""
        return next((reason for reason in gather_to_all(self._reason_here()) if reason), "")

    def is_asked(self, group: Any = None) -> bool:
        """Whether any rank of ``group``, by default the world, is to stop; one all-reduce on it."""
        if not dist.is_initialized():
            return bool(self._reason_here())
        flag = torch.tensor(int(bool(self._reason_here())), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
        return bool(flag)

    def check(self) -> None:
        """Raise Stopped if any rank is to stop; a collective of the world."""
        if self.is_asked():
            raise Stopped

    def check_here(self) -> None:
        """Raise Stopped if this rank is to stop; for the work of ``on_rank_zero``."""
        if self._reason_here():
            raise Stopped

    def on_rank_zero[T](self, work: Callable[[], T]) -> T:
        """``ranks.on_rank_zero`` of long work that calls ``check_here`` now and then."""

        def attempt() -> tuple[T | None, bool]:
            try:
                return work(), False
            except Stopped:
                return None, True

        result, is_stopped = on_rank_zero(attempt)
        if is_stopped:
            raise Stopped
        return result  # type: ignore[return-value]

    def kept_by_rank_zero[T](self, work: Callable[[], T], elsewhere: T) -> T:
        """The same for a result that nobody else needs: the other ranks get ``elsewhere``."""
        return kept_by_rank_zero(work, elsewhere, self.on_rank_zero)
