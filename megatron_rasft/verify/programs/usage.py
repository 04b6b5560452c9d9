"""Finds out whether a running check uses more threads or more disk than it may.

The kernel limits both in namespaces. Elsewhere it counts the threads of a user, not of a check, and limits each file, but
not their sum. So the launcher looks at its check at short intervals.
"""

import contextlib
import errno
import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

INTERVAL_S = 0.05
"""Seconds between two looks."""
MAX_THREADS = 64
MAX_FILES = 1024
# A file without a name is of unknown size if only a part of it is mapped
_MAX_NAMELESS = 16
# A program that moves folders while they are counted hides them, unless it is stopped during the look
_STOPS_EVERY_S = 1.0
_MAX_WAIT_FOR_STOP_S = 0.05


class Watcher:
    """Looks at one check.

    Args:
        pids: the processes; 0 stands for one that has not started.
        scratch: the folder to which they may write; None for no folder.
        max_bytes: largest sum of the sizes of their files, and the limit of each file.
    """

    def __init__(self, pids: Sequence[int], scratch: Path | None, max_bytes: int) -> None:
        self._pids = [pid for pid in pids if pid]
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._next_stop = time.monotonic() + _STOPS_EVERY_S

    def find_excess(self) -> str:
        """Returns what the processes use too much of, or an empty string."""
        if any(_num_threads(pid) > MAX_THREADS for pid in self._pids):
            return f"it started more than {MAX_THREADS} threads"
        if self._scratch is not None and self._writes_too_much(self._scratch):
            return f"it wrote more than {self._max_bytes >> 20} MiB or too many files"
        return ""

    def _writes_too_much(self, folder: Path) -> bool:
        if time.monotonic() < self._next_stop:
            return _is_too_large(folder, self._pids, self._max_bytes)
        with _stopped(self._pids):
            is_too_large = _is_too_large(folder, self._pids, self._max_bytes)
        self._next_stop = time.monotonic() + _STOPS_EVERY_S
        return is_too_large


def _num_threads(pid: int) -> int:
    # The folder has one link for each thread, and two of its own. It is gone once the process has been reaped
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    return 0


@contextlib.contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[None]:
    """Stops these processes during the context. None of them may have been reaped."""
    _signal(pids, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + _MAX_WAIT_FOR_STOP_S
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.001)
        yield
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _runs(pid: int) -> bool:
    """Returns whether a thread of the process is neither stopped nor ended."""
    return any(_state(thread) not in "TtZX" for thread in _threads(pid))


def _state(thread: str) -> str:
    """Returns the letter for the state of a thread in proc(5): T is stopped, Z and X have ended."""
    with contextlib.suppress(OSError):
        # It follows the name, which ends with the last parenthesis
        return Path(f"{thread}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    return "X"


def _threads(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [f"/proc/{pid}/task/{thread}" for thread in os.listdir(f"/proc/{pid}/task")]
    return []


def _is_too_large(folder: Path, pids: Sequence[int], max_bytes: int) -> bool:
    errors: list[OSError] = []
    num_bytes = sum(size for pid in pids for size in _nameless_sizes(folder, pid, max_bytes // _MAX_NAMELESS))
    num_files = 0
    for root, folders, files in os.walk(folder, onerror=errors.append):
        num_files += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                num_bytes += os.lstat(f"{root}/{name}").st_blocks * 512
        if num_bytes > max_bytes or num_files > MAX_FILES:
            return True
    # A folder without permissions, or too deep a path
    return any(error.errno != errno.ENOENT for error in errors)


def _nameless_sizes(folder: Path, pid: int, at_least: int) -> Iterator[int]:
    """Yields the sizes of files that a process has deleted, or made without a name, and still has open or mapped."""
    # The first thread may have ended before the others, and then has neither files nor memory. The others share theirs
    alive = next((thread for thread in _threads(pid) if _state(thread) not in "ZX"), None)
    if alive is not None:
        with contextlib.suppress(OSError):
            yield from _nameless_sizes_of(folder, alive, at_least)


def _nameless_sizes_of(folder: Path, thread: str, at_least: int) -> Iterator[int]:
    device = folder.stat().st_dev
    for fd in os.listdir(f"{thread}/fd"):
        with contextlib.suppress(OSError):
            status = os.stat(f"{thread}/fd/{fd}")
            if stat.S_ISREG(status.st_mode) and status.st_dev == device and not status.st_nlink:
                yield status.st_blocks * 512
    mapped: dict[str, int] = {}
    with open(f"{thread}/maps", errors="surrogateescape") as maps:
        for line in maps:
            if line.endswith(" (deleted)\n") and str(folder) in line:
                addresses, _, _, _, inode, _ = line.split(maxsplit=5)
                first, end = (int(address, 16) for address in addresses.split("-"))
                mapped[inode] = mapped.get(inode, 0) + end - first
    # Their number is limited, too, because a process may map one page of a large file
    yield from (max(size, at_least) for size in mapped.values())
