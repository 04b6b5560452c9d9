"""A folder that is written in parts, under a temporary name until it is complete.

If the process is killed, the next call continues.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_rasft.errors import CheckpointError, WeightsError
from megatron_rasft.files import write_json

_JOURNAL = ".conversion"
_SPARE_BYTES = 64 << 20
"""Disk space to leave free for indices and for other programs."""


class Part(Protocol):
    """A part of the work that produces one file."""

    @property
    def name(self) -> str:
        """Unique name, which is also a valid file name."""

    @property
    def num_bytes(self) -> int:
        """Approximate size of the part's file, bytes."""


class StagedFolder:
    """The unfinished ``out_dir``, as ``.NAME.partial`` next to it. Only one process can open it at a time.

    Every finished part leaves a note file. When the folder is opened again for the same work, only parts without a note are made.
    ``finish`` renames the folder to ``out_dir``.
    """

    def __init__(self, out_dir: str | Path, work: dict[str, Any]) -> None:
        """Opens an unfinished folder or creates one.

        Args:
            out_dir: must not exist, or be an empty folder. It cannot be a link or a mount point, because a rename does not
                replace these.
            work: input and settings as JSON. Parts of an earlier call are only reused if its work was the same.

        Raises:
            ValueError: ``out_dir`` is in use, a link or a mount point.
            CheckpointError: the unfinished folder cannot be written, belongs to other work, or is open in another process.
        """
        self.out_dir = Path(out_dir).absolute()
        if self.out_dir.exists() and not (self.out_dir.is_dir() and not any(self.out_dir.iterdir())):
            raise ValueError(
                f"--output {out_dir} exists and is not an empty folder. Remove it, or give another name."
            )
        if self.out_dir.is_symlink() or self.out_dir.is_mount():
            kind = "symbolic link" if self.out_dir.is_symlink() else "mount point"
            raise ValueError(
                f"--output {out_dir} is a {kind}, which a finished folder cannot replace. Give a folder below it."
            )
        self.path = self.out_dir.parent / f".{self.out_dir.name}.partial"
        self._journal = self.path / _JOURNAL
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._lock = (self._journal / "lock").open("w")
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise CheckpointError(f"another process is writing {self.path}; wait until it ends") from None
        try:
            self._check_work(work)
        except OSError as error:
            self.close()
            raise self._failure(error) from error

    def _check_work(self, work: dict[str, Any]) -> None:
        note = self._journal / "work.json"
        wanted = json.loads(json.dumps(work))
        if not note.exists():
            write_json(note, wanted, is_synced=True)
            return
        earlier = json.loads(note.read_text(encoding="utf-8"))
        differing = [key for key in {**earlier, **wanted} if earlier.get(key) != wanted.get(key)]
        if differing:
            self.close()
            raise CheckpointError(
                f"{self.path} belongs to a conversion with other settings ({', '.join(differing)}); delete it to start "
                "over, or give another --output"
            )

    def __enter__(self) -> "StagedFolder":
        """Turns an OSError in the block into a CheckpointError."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, WeightsError):  # the same command would fail again, so nothing can be continued
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()
        if isinstance(error, OSError):
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> CheckpointError:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return CheckpointError(
            f"cannot write {self.path}: {reason}. Finished files are kept: the same command continues after them."
        )

    def close(self) -> None:
        """Releases the folder to other processes."""
        self._lock.close()

    def do(
        self,
        parts: Sequence[Any],
        make: Callable[[Any], Any],
        *,
        num_workers: int,
        on_progress: Callable[[int], None],
    ) -> dict[str, Any]:
        """Makes all parts that earlier calls have not made.

        Args:
            parts: the parts of the work; see ``Part``.
            make: writes the part's file into the folder ``path`` and renames it when it is complete; returns JSON values.
            num_workers: number of threads.
            on_progress: called with the bytes of each part when it is finished.

        Returns:
            Part name -> result of ``make``, for all parts.
        """
        results: dict[str, Any] = {}
        missing = []
        for part in parts:
            note = self._note(part.name)
            if note.exists():
                results[part.name] = json.loads(note.read_text(encoding="utf-8"))
                on_progress(part.num_bytes)
            else:
                missing.append(part)
        self._check_disk_space(sum(part.num_bytes for part in missing))

        def make_and_note(part: Any) -> None:
            results[part.name] = made = make(part)
            write_json(self._note(part.name), made, is_synced=True)
            on_progress(part.num_bytes)

        _in_threads(make_and_note, missing, num_workers)
        return results

    def _note(self, part_name: str) -> Path:
        return self._journal / f"{part_name}.json"

    def _check_disk_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        needed = num_bytes + (_SPARE_BYTES if num_bytes else 0)
        if needed > free:
            raise CheckpointError(
                f"{self.out_dir} needs {needed / 2**30:.1f} GiB more, but its disk has {free / 2**30:.1f} GiB free; "
                "free some space, or give an --output on another disk"
            )

    def finish(self) -> None:
        """Renames the folder, then deletes the notes. If the rename fails, the notes still tell the next call what is finished."""
        self.path.rename(self.out_dir)
        self.close()
        shutil.rmtree(self.out_dir / _JOURNAL, ignore_errors=True)
        # without flushing the parent folder a power failure could undo the rename
        directory = os.open(self.out_dir.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _in_threads(do: Callable[[Any], None], parts: Sequence[Any], num_workers: int) -> None:
    """Calls ``do`` for every part. After the first error it begins no further parts, and raises the error."""
    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        futures = [pool.submit(do, part) for part in parts]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for future in done:
        future.result()
