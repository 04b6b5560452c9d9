"""A folder that is written in parts: under another name until it is whole, taken up again after a kill."""

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

from megatron_rasft.errors import CheckpointError
from megatron_rasft.files import write_json

_JOURNAL = ".conversion"
_SPARE_BYTES = 64 << 20
"""Left free beside the weights for indices and whatever else writes to the disk."""


class Part(Protocol):
    """A piece of the work whose result is one file."""

    @property
    def name(self) -> str:
        """Unique, and a file name."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it will take on the disk, about."""


class StagedFolder:
    """``out_dir`` in the making, as ``.NAME.partial`` beside it. One process at a time.

    Every finished part leaves a note; opened again for the same work, the folder goes on with the parts that
    are missing. ``finish`` gives it its name.
    """

    def __init__(self, out_dir: str | Path, work: dict[str, Any]) -> None:
        """Open or begin the folder.

        Args:
            out_dir: must not exist, or be an empty folder, and neither a link nor a mount point, which no folder
                can take the place of.
            work: what is made out of what, JSON; only the same work goes on with an earlier one's parts.

        Raises:
            ValueError: ``out_dir`` is in use, or of no use.
            CheckpointError: the folder in the making cannot be written, is another work's or another process's.
        """
        self.out_dir = Path(out_dir).absolute()
        if self.out_dir.exists() and not (self.out_dir.is_dir() and not any(self.out_dir.iterdir())):
            raise ValueError(
                f"--output {out_dir} exists and is not an empty folder. Remove it, or give another name."
            )
        if self.out_dir.is_symlink() or self.out_dir.is_mount():
            kind = "symbolic link" if self.out_dir.is_symlink() else "mount point"
            raise ValueError(
                f"--output {out_dir} is a {kind}, which cannot be replaced once the work is done. Give a folder below it."
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
                f"{self.path} was begun for other work (its {', '.join(differing)} differ); delete it to start "
                "over, or give another --output"
            )

    def __enter__(self) -> "StagedFolder":
        """An OSError within is raised as CheckpointError."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, OSError):
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> CheckpointError:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return CheckpointError(
            f"cannot write {self.path}: {reason}. What is done is kept: the same command goes on from there."
        )

    def close(self) -> None:
        """Let another process have it."""
        self._lock.close()

    def do(
        self,
        parts: Sequence[Any],
        make: Callable[[Any], Any],
        *,
        num_workers: int,
        on_progress: Callable[[int], None],
    ) -> dict[str, Any]:
        """Make every part that no earlier run made.

        Args:
            parts: see ``Part``.
            make: writes the part's file below ``path``, under its own name once it is whole; returns JSON.
            num_workers: threads.
            on_progress: called with the bytes of each part as it is there.

        Returns:
            Part name -> what ``make`` returned, for all parts.
        """
        results: dict[str, Any] = {}
        left = []
        for part in parts:
            note = self._note(part.name)
            if note.exists():
                results[part.name] = json.loads(note.read_text(encoding="utf-8"))
                on_progress(part.num_bytes)
            else:
                left.append(part)
        self._check_room(sum(part.num_bytes for part in left))

        def make_and_note(part: Any) -> None:
            results[part.name] = made = make(part)
            write_json(self._note(part.name), made, is_synced=True)
            on_progress(part.num_bytes)

        _in_threads(make_and_note, left, num_workers)
        return results

    def _note(self, part_name: str) -> Path:
        return self._journal / f"{part_name}.json"

    def _check_room(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        needed = num_bytes + (_SPARE_BYTES if num_bytes else 0)
        if needed > free:
            raise CheckpointError(
                f"{self.out_dir} needs {needed / 2**30:.1f} GiB more, but its disk has {free / 2**30:.1f} GiB free; "
                "make room, or give an --output on another disk"
            )

    def finish(self) -> None:
        """Give the folder its name, then drop the notes: where it gets none, they tell what is done."""
        self.path.rename(self.out_dir)
        self.close()
        shutil.rmtree(self.out_dir / _JOURNAL, ignore_errors=True)
        directory = os.open(self.out_dir.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _in_threads(do: Callable[[Any], None], parts: Sequence[Any], num_workers: int) -> None:
    """``do`` for every part; after the first error no other part is begun, and it is raised."""
    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        futures = [pool.submit(do, part) for part in parts]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for future in done:
        future.result()
