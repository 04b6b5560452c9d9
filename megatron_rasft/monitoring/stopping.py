"""Ends a run before its last step: on a signal, after a given time, or before the end of its Slurm allocation.

All ranks must stop at the same point, so the run checks at fixed points, where the ranks agree by a collective.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.errors import is_first_of_node
from megatron_rasft.monitoring import stalls
from megatron_rasft.ranks import gather_to_all, on_rank_zero

_MARGIN_S = 60.0
"""Time left for the end of the processes, seconds, if --exit-before-end-s is not given."""

_UNKNOWN_SAVE_S = 300.0
"""Time left for a save, seconds, before the run has saved once."""

_LARGEST_SHARE = 0.25
"""The largest share of the allocation that is left for a save, and for the longest step. A longer measured time is not their own: it
comes from a disk that hung, or from a job that was suspended. It would end the run, or every later start, far too early."""


_ENDINGS = (signal.SIGINT, signal.SIGTERM)
"""The signals of a second Ctrl-C. torchrun passes its first Ctrl-C on as SIGINT and its second one as SIGTERM."""

_ON_INTERRUPT = b"Ctrl-C: the run stops as soon as it can, and saves. A second Ctrl-C ends it at once.\n"


class Stopped(Exception):
    """Ends the run. It is raised on every rank at the same place, except by ``StopRequest.check_here``."""


@dataclass(kw_only=True)
class Allocation:
    """The end of a Slurm allocation, and how long before it a run must stop.

    Slurm gives the times of the allocation, so container start and imports are counted, unlike in --exit-duration-in-mins.
    """

    ends_at: float
    """``time.time()`` of the end."""
    length_s: float
    """Counted from the start of the run if Slurm does not give the start of the allocation."""
    before_s: float | None = None
    """--exit-before-end-s. None: calculated from measured times."""
    save_s: float | None = None
    """The longest save so far, seconds; None before the first one."""
    longest_wait_s: float = 0.0
    """The longest time between two checks, seconds: a step, or a phase of a refresh."""
    _checked_at: float | None = None

    @classmethod
    def of_slurm(
        cls,
        before_s: float | None,
        save_s: float | None = None,
        variables: Mapping[str, str] = os.environ,
        now: float | None = None,
    ) -> "Allocation | None":
        """Reads the allocation from Slurm's variables.

        Args:
            before_s: --exit-before-end-s.
            save_s: the longest save of an earlier start, seconds.
            variables: the environment.
            now: ``time.time()`` at the start of the run; None for the present.

        Returns:
            None outside of Slurm, without a time limit, if ``before_s`` is 0, or if the end has passed: such a variable is wrong.
        """
        ends, starts = (
            int(text) if (text := variables.get(f"SLURM_JOB_{name}_TIME", "")).isdecimal() else 0
            for name in ("END", "START")
        )
        now = time.time() if now is None else now
        if ends <= now or before_s == 0:
            return None
        length_s = ends - (starts if 0 < starts < ends else now)
        return cls(ends_at=ends, length_s=length_s, before_s=before_s, save_s=save_s)

    def note_save(self, seconds: float) -> None:
        """Notes how long a save took."""
        self.save_s = max(seconds, self.save_s or 0.0)

    def needed_s(self) -> float:
        """Returns how long before the end the run must stop, seconds."""
        if self.before_s is not None:
            return self.before_s
        # Short allocations, as for a trial, would otherwise be over before their first step.
        margin_s, unknown_s = min(_MARGIN_S, 0.1 * self.length_s), min(_UNKNOWN_SAVE_S, 0.1 * self.length_s)
        save_s = unknown_s if self.save_s is None else min(1.5 * self.save_s, _LARGEST_SHARE * self.length_s)
        return min(self.longest_wait_s, _LARGEST_SHARE * self.length_s) + save_s + margin_s

    def reason(self, now: float) -> str:
        """Returns why the run is to stop at ``now``, or "". Call it at every check: the time between the calls is measured."""
        if self._checked_at is not None:
            self.longest_wait_s = max(self.longest_wait_s, now - self._checked_at)
        self._checked_at = now
        left_s, needed_s = self.ends_at - now, self.needed_s()
        if left_s > needed_s:
            return ""
        return f"the end of the Slurm allocation in {left_s:.0f} s (--exit-before-end-s {needed_s:.0f})"


class StopRequest:
    """Checks for --exit-signal (SIGTERM), Ctrl-C, --exit-duration-in-mins and the end of the Slurm allocation.

    Args:
        has_signal: called without arguments; returns whether this process has received the signal.
        duration_min: minutes after ``began`` at which the run ends; None for no limit.
        began: ``time.time()`` when the program started.
        device: device of the tensor that the ranks exchange.
        allocation: the Slurm allocation of the run; None if it has no end.
    """

    def __init__(
        self,
        has_signal: Callable[[], bool],
        duration_min: int | None = None,
        began: float = 0.0,
        device: torch.device | str = "cpu",
        allocation: Allocation | None = None,
    ) -> None:
        self._has_signal = has_signal
        self._duration_min = duration_min
        self._began = began
        self._device = device
        self.allocation = allocation
        self._is_interrupted = False

    @contextlib.contextmanager
    def catching_interrupt(self) -> Iterator[None]:
        """Makes the first Ctrl-C a request to stop, as the signal is, and lets the second one end the process at once."""
        before = {number: signal.getsignal(number) for number in _ENDINGS}
        if before[signal.SIGINT] == signal.SIG_IGN:
            yield  # a background job of a shell, which the terminal's Ctrl-C must not reach
            return
        signal.signal(signal.SIGINT, lambda number, frame: self._note_interrupt())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_interrupt(self) -> None:
        self._is_interrupted = True
        # The system's own action needs no Python, so it also ends a process that waits for the others in a collective.
        for number in _ENDINGS:
            signal.signal(number, signal.SIG_DFL)
        if is_first_of_node():
            os.write(2, _ON_INTERRUPT)  # not print, which may be in the middle of another line

    def _reason_here(self) -> str:
        stalls.tick()
        if self._is_interrupted:
            return "Ctrl-C"
        if self._has_signal():
            return "a signal"
        if self._duration_min and time.time() - self._began > 60 * self._duration_min:
            return f"--exit-duration-in-mins {self._duration_min}"
        return "" if self.allocation is None else self.allocation.reason(time.time())

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
