"""The live line: how far long work is, such as a phase of a refresh, with its rate and the time that is left. Only rank 0 shows it.

A thread reads the count of the present work, so the line also appears while the main thread is inside one long call.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.status import Status

from megatron_rasft.rollout.sampling import SamplingReport
from megatron_rasft.types import Rollout

_LOOK_S = 1.0
"""Longest time between two looks of the thread at the count, seconds."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something that takes long, and that is counted."""

    label: str
    unit: str
    total: int
    """0 if it is not known, as for a weight sync through files."""
    done: Callable[[], int]
    """Returns how much is done. Another thread calls it, at any time."""
    num_tokens: Callable[[], int]
    """Returns how many tokens have been sampled, counted as ``done`` is; 0 for work without tokens."""
    began: float
    done_before: int
    """Units that were done when the line began, such as samples that servers made during the training steps."""
    tokens_before: int

    def line(self, now: float) -> str:
        """Returns the line at the time ``now``."""
        seconds, tokens = self._seconds(now), self.num_tokens() - self.tokens_before
        parts = self._counts(now, has_rate=True)
        if tokens:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        return ", ".join([*parts, f"after {_duration(seconds)}"])

    def brief(self, now: float) -> str:
        """Returns the start of a line that shows work within this work."""
        return ", ".join(self._counts(now, has_rate=False))

    def _counts(self, now: float, has_rate: bool) -> list[str]:
        done = self.done()
        rate = (done - self.done_before) / self._seconds(now)
        parts = [f"{self.label}: {done:,} of {self.total:,} {self.unit}" if self.total else self.label]
        if rate > 0 and has_rate:
            parts.append(f"{rate:,.{0 if rate >= 10 else 1}f} per s")
        if rate > 0:
            parts.append(f"{_duration(max(0, self.total - done) / rate)} left")
        return parts

    def _seconds(self, now: float) -> float:
        return max(1e-6, now - self.began)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class LiveLine:
    """Shows the present work: in place on a terminal, and as a line every ``interval_s`` elsewhere, as in a log.

    Args:
        console: also used for all other lines, so that these appear above the line on a terminal.
        interval_s: longest time between two lines, seconds.
        clock: monotonic time, seconds.
    """

    def __init__(
        self, console: Console, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._interval_s = interval_s
        self._look_s = min(_LOOK_S, interval_s / 2)
        self._clock = clock
        self._works: list[Work] = []
        """Work within work: each is done within the one before it."""
        self._said_at = 0.0
        self._status: Status | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live line", daemon=True)

    @contextmanager
    def shows(
        self, label: str, unit: str, total: int, done: Callable[[], int], num_tokens: Callable[[], int]
    ) -> Iterator[None]:
        """Shows work until the end of the context; see ``Work`` for the arguments."""
        work = Work(
            label=label,
            unit=unit,
            total=total,
            done=done,
            num_tokens=num_tokens,
            began=self._clock(),
            done_before=done(),
            tokens_before=num_tokens(),
        )
        with self._lock:
            self._works.append(work)
        try:
            yield
        finally:
            with self._lock:
                self._works.remove(work)
                self._hide()

    def look(self) -> None:
        """Shows the present work, if it is time to."""
        with self._lock:
            if not self._works:
                return
            now = self._clock()
            if self._console.is_terminal:
                self._update(self._line(now))
            # The next look would be too late.
            elif now + self._look_s >= max(self._works[0].began, self._said_at) + self._interval_s:
                self._said_at = now
                self._console.print(self._line(now), markup=False)

    def _line(self, now: float) -> str:
        *around, work = self._works
        return "; ".join([*(outer.brief(now) for outer in around), work.line(now)])

    def _update(self, line: str) -> None:
        if self._status is None:
            self._status = self._console.status("")
            self._status.start()
        self._status.update(line)

    def _hide(self) -> None:
        status, self._status = self._status, None
        if status is not None:
            status.stop()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._look_s):
            self.look()


_live: LiveLine | None = None
"""The line of this process; None on ranks other than 0, and in programs that are not a run."""


def start(console: Console, interval_s: float) -> None:
    """Starts to show work in this process, unless ``interval_s`` is 0."""
    global _live
    if interval_s > 0:
        _live = LiveLine(console, interval_s)
        _live.start()


def stop() -> None:
    """Stops to show work."""
    global _live
    live, _live = _live, None
    if live is not None:
        live.stop()


@contextmanager
def shown(console: Console, interval_s: float) -> Iterator[None]:
    """Shows work of this process until the end of the context."""
    start(console, interval_s)
    try:
        yield
    finally:
        stop()


@contextmanager
def work(
    label: str, unit: str, total: int, done: Callable[[], int], num_tokens: Callable[[], int] = lambda: 0
) -> Iterator[None]:
    """Shows work of this process until the end of the context; see ``Work`` for the arguments."""
    if _live is None:
        yield
        return
    with _live.shows(label, unit, total, done, num_tokens):
        yield


def sampling(report: SamplingReport) -> AbstractContextManager[None]:
    """Shows the sampling by servers that ``report`` counts."""
    return work("sampling", "rollouts", report.num_samples, report.outcomes.total, lambda: report.num_tokens)


def verifying(rollouts: Sequence[Rollout]) -> AbstractContextManager[None]:
    """Shows the verification of rollouts, which sets their verdicts."""
    return work("verifying", "rollouts", len(rollouts), lambda: sum(r.verdict is not None for r in rollouts))
