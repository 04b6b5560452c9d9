"""Finds out whether a running check uses more threads or more disk than it may.

The kernel limits both in namespaces. Elsewhere it counts the threads of a user, not of a check, and limits each file, but
not their sum. So the launcher looks at its check at short intervals.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

INTERVAL_S = 0.05
"""Seconds between two looks."""
MAX_THREADS = 64
MAX_FILES = 1024
# A file without a name is of unknown size if only a part of it is mapped
_MAX_NAMELESS = 16


def find_excess(pids: Sequence[int], scratch: Path | None, max_bytes: int) -> str:
    """Returns what the processes of a check use too much of, or an empty string.

    Args:
        pids: the processes.
        scratch: the folder to which they may write; None for no folder.
        max_bytes: largest sum of the sizes of their files, and the limit of each file.
    """
    if any(_num_threads(pid) > MAX_THREADS for pid in pids):
        return f"it started more than {MAX_THREADS} threads"
    if scratch is not None and _is_too_large(scratch, pids, max_bytes):
        return f"it wrote more than {max_bytes >> 20} MiB or too many files"
    return ""


def _num_threads(pid: int) -> int:
    # The folder has one link for each thread, and two of its own. It is gone once the process has been reaped
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    return 0


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
    with contextlib.suppress(OSError):
        device = folder.stat().st_dev
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(status.st_mode) and status.st_dev == device and not status.st_nlink:
                    yield status.st_blocks * 512
        mapped: dict[str, int] = {}
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as maps:
            for line in maps:
                if line.endswith(" (deleted)\n") and str(folder) in line:
                    addresses, _, _, _, inode, _ = line.split(maxsplit=5)
                    first, end = (int(address, 16) for address in addresses.split("-"))
                    mapped[inode] = mapped.get(inode, 0) + end - first
        # Their number is limited, too, because a process may map one page of a large file
        yield from (max(size, at_least) for size in mapped.values())
