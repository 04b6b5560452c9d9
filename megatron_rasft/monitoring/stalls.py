"""Ends a run in which no rank makes progress, and names the rank for which the others wait.

A rank makes progress when it enters a phase, begins a micro-batch, or checks for a reason to stop. A thread of each rank publishes this in the
store of torch.distributed. Collectives make all ranks wait for the slowest one, so a run stands still only if every rank does. Then
each rank publishes its Python stack as well, one of them prints a line about the rank to blame, and all end with exit code 1.
"""

import argparse
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import wraps
from typing import Any, Protocol

import torch.distributed as dist

from megatron_rasft.errors import RasftError
from megatron_rasft.monitoring.stacks import frame_name, stack_of
from megatron_rasft.monitoring.status import RunStatus

_LONG_PHASES = frozenset({"start", "load", "sync", "save", "export"})
"""Phases without checks in between, whose time grows with the model. They have three times the deadline."""

REPORT_S = 30.0
"""Longest time between two reports of a rank."""

_SILENT_ROUNDS = 3
"""A rank whose report has not changed in this many rounds of another rank is silent."""

_GRACE_S = 5.0
"""Longest time of a request to the store, and time left to the other ranks for their end."""

_NUM_FRAMES = 6
"""Frames of a stack that are shown."""


class Store(Protocol):
    """The methods of torch's Store that are used here."""

    def set(self, key: str, value: str, /) -> Any: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank's published progress."""

    rank: int
    host: str
    pid: int
    phase: str
    num_reports: int
    num_phases: int
    """Phases entered so far. All ranks enter the same ones in the same order."""
    waited_s: float
    """Time since the last progress, seconds."""
    is_late: bool
    """Whether this is longer than the deadline of the phase."""
    stack: tuple[str, ...] = ()
    """The main thread's frames, innermost first, as ``file:line function``; empty unless the rank is late. py-spy has read those of a
    silent rank, if it is installed on its machine."""
    is_in_collective: bool = False
    """Whether the innermost frame is one of torch.distributed."""
    is_silent: bool = False
    """Whether the rank has stopped reporting. Set by the reader."""

    def line(self, deadline_s: float) -> str:
        """Describes the rank in one line."""
        stack = (
            " < ".join(self.stack[:_NUM_FRAMES])
            or "not known; py-spy, if installed on its machine, would read it"
        )
        silence = (
            "Its process does not report any more: it is stopped, holds Python's lock, or its machine is gone. "
            if self.is_silent
            else ""
        )
        return (
            f"rank {self.rank} on {self.host} has made no progress for {self.waited_s:.0f} s in phase {self.phase} "
            f"(--stall-deadline-s {deadline_s:g}). {silence}Its Python stack, innermost call first: {stack}"
        )


def blame(reports: Sequence[Report]) -> Report:
    """Returns the rank for which the others most likely wait; the first of several.

    In this order: a silent rank, one that is not in a collective while others are, one that has entered fewer phases, one whose
    stack differs from the most common stack.
    """
    rest = sorted(reports, key=lambda report: report.rank)
    common = Counter(report.stack for report in rest).most_common(1)[0][0]
    fewest = min(report.num_phases for report in rest)
    signs: Sequence[Callable[[Report], bool]] = (
        lambda report: report.is_silent,
        lambda report: not report.is_in_collective,
        lambda report: report.num_phases == fewest,
        lambda report: report.stack != common,
    )
    for sign in signs:
        suspects = [report for report in rest if sign(report)]
        if 0 < len(suspects) < len(rest):
            rest = suspects
    return rest[0]


class StallWatch:
    """The progress of this rank, and its view of the others.

    Args:
        deadline_s: --stall-deadline-s.
        store: shared by all ranks.
        rank: this rank.
        world_size: number of ranks.
        is_reader: whether this rank reads the others' reports. Two on a node are enough: one of them may hang itself.
        end: called with the line if this rank is the one that prints it, with "" on the others. Ends the process.
        clock: monotonic time, seconds.
    """

    def __init__(
        self,
        deadline_s: float,
        store: Store,
        rank: int,
        world_size: int,
        *,
        is_reader: bool,
        end: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline_s = deadline_s
        self._store = store
        self._rank = rank
        self._keys = [f"rasft/stalls/{i}" for i in range(world_size)]
        self._is_reader = is_reader
        self._end = end
        self._clock = clock
        self._phase = "start"
        self._num_phases = 0
        self._num_reports = 0
        self._num_failed = 0
        """Calls of ``look`` in a row in which the store failed."""
        self._progress_at = self._looked_at = clock()
        self._host = socket.gethostname()
        self._main_thread = threading.get_ident()
        self._unchanged: dict[int, tuple[int, int]] = {}
        """Rank -> number of its last report, and rounds in which it has not changed."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)

    def enter(self, phase: str) -> None:
        """Notes that this rank enters a phase."""
        self._phase = phase
        self._num_phases += 1
        self.tick()

    def tick(self) -> None:
        """Notes that this rank has made progress within its phase."""
        self._progress_at = self._clock()

    @property
    def interval_s(self) -> float:
        """Time between two reports."""
        return min(REPORT_S, self.deadline_s / 4)

    @property
    def is_cut_off(self) -> bool:
        """Whether the store does not answer any more. Then the ranks cannot agree on one that reports the stall."""
        return self._num_failed >= _SILENT_ROUNDS

    def look(self) -> None:
        """Publishes this rank's report, and ends the run if it stands still. Called in every interval."""
        now = self._clock()
        if now - self._looked_at > 3 * self.interval_s + _GRACE_S:
            # This process did not run, for example because Slurm has suspended the job. That time does not count.
            self._progress_at += now - self._looked_at
        self._looked_at = now
        report = self._report(now)
        self._store.set(self._keys[self._rank], json.dumps(asdict(report)))
        if self._store.check([_STALLED]):
            self._end("")
        elif self._is_reader and report.is_late:
            self._read()

    def look_safely(self) -> None:
        """Calls ``look``. If the store fails several times while this rank is late, ends this rank."""
        try:
            self.look()
            self._num_failed = 0
        except RuntimeError:  # The store has ended with its process, or a rank has not reported yet.
            self._num_failed += 1
            report = self._report(self._clock())
            if report.is_late and self.is_cut_off:
                self._end(report.line(self.deadline_s) + ". The store of torch.distributed does not answer")

    def _report(self, now: float) -> Report:
        waited_s = max(0.0, now - self._progress_at)
        limit_s = self.deadline_s * (3 if self._phase in _LONG_PHASES else 1)
        self._num_reports += 1
        report = Report(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            phase=self._phase,
            num_reports=self._num_reports,
            num_phases=self._num_phases,
            waited_s=waited_s,
            is_late=waited_s > limit_s,
        )
        return replace(report, **self._stack()) if report.is_late else report

    def _stack(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main_thread)
        frames = [] if frame is None else traceback.extract_stack(frame)[::-1]
        is_in_collective = bool(frames) and f"torch{os.sep}distributed{os.sep}" in frames[0].filename
        names = tuple(frame_name(f.filename, f.lineno, f.name) for f in frames[: 2 * _NUM_FRAMES])
        return {"stack": names, "is_in_collective": is_in_collective}

    def _read(self) -> None:
        reports = [Report(**json.loads(value)) for value in self._store.multi_get(self._keys)]
        self._num_failed = 0
        reports = [replace(r, stack=tuple(r.stack), is_silent=self._is_silent(r)) for r in reports]
        if not all(report.is_late or report.is_silent for report in reports):
            return
        if self._store.compare_set(_STALLED, "", str(self._rank)) == str(self._rank).encode():
            self._end(self._with_stack(blame(reports)).line(self.deadline_s))
        else:
            self._end("")

    def _is_silent(self, report: Report) -> bool:
        number, rounds = self._unchanged.get(report.rank, (0, 0))
        rounds = rounds + 1 if number == report.num_reports else 0
        self._unchanged[report.rank] = report.num_reports, rounds
        # The readers on its machine are first, because they can read its stack.
        return rounds >= _SILENT_ROUNDS + (report.host != self._host)

    def _with_stack(self, report: Report) -> Report:
        """Adds the stack of a silent rank, if py-spy can read it from here."""
        if not report.is_silent or report.host != self._host:
            return report
        return replace(report, stack=stack_of(report.pid) or report.stack)

    # ---- the thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread: it must not be inside torch when the interpreter ends."""
        self._stopped.set()
        self._thread.join(2 * _GRACE_S)
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._stopped.is_set():
            # Needs no Python: it writes the stacks to this rank's log if a C function holds Python's lock, and this thread with it.
            faulthandler.dump_traceback_later(
                3 * self.deadline_s + _GRACE_S, file=sys.__stderr__ or sys.stderr
            )
            self.look_safely()
            self._stopped.wait(self.interval_s)


_STALLED = "rasft/stalls/ended-by"

_watch: StallWatch | None = None
"""The watch of this process; None if stalls are not watched."""


def start_watch(args: argparse.Namespace) -> None:
    """Starts to watch this rank's progress, if --stall-deadline-s is not 0. Called when torch.distributed is initialized."""
    global _watch
    if not args.stall_deadline_s:
        return
    # A clone has a connection of its own, so it does not wait while the main thread waits for a key.
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=_GRACE_S))

    def end(line: str) -> None:
        # The first rank that ends breaks the collectives of the others. Their errors would hide the line.
        sys.excepthook = lambda *error: time.sleep(watch.interval_s + 2 * _GRACE_S)
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)
            if rank == 0 or not watch.is_cut_off:
                _note_failure(args.save, line)
        # The store may belong to this process: the other ranks need it to see that the run has ended.
        time.sleep(watch.interval_s + _GRACE_S)
        os._exit(1)

    is_reader, rank = int(os.environ.get("LOCAL_RANK", "0")) < 2, dist.get_rank()
    watch = StallWatch(
        args.stall_deadline_s, store, rank, dist.get_world_size(), is_reader=is_reader, end=end
    )
    _watch = watch
    watch.start()


def _note_failure(save: str | None, reason: str, patience_s: float = _GRACE_S) -> None:
    """Writes the reason into status.json. A disk that hangs may be what the run waits for, and must not keep the process alive."""
    writer = threading.Thread(target=_write_failure, args=(save, reason), name="stall reason", daemon=True)
    writer.start()
    writer.join(patience_s)


def _write_failure(save: str | None, reason: str) -> None:
    before = RunStatus.read(save)
    # A rank that an earlier start has left behind must not change the end of the run.
    if save is not None and before is not None and before.state == "running":
        try:
            replace(before, state="failed", reason=reason).write(save)
        except RasftError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def end_watch() -> None:
    """Stops watching, at the end of the program."""
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.stop()


def enter(phase: str) -> None:
    """Notes that this rank enters a phase of the run."""
    if _watch is not None:
        _watch.enter(phase)


def tick() -> None:
    """Notes that this rank has made progress within its phase."""
    if _watch is not None:
        _watch.tick()


def phase[**P, T](name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes every call of the decorated method a phase."""

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @wraps(method)
        def entered(*args: P.args, **kwargs: P.kwargs) -> T:
            enter(name)
            return method(*args, **kwargs)

        return entered

    return decorate
