"""Keeps two runs from writing one exported folder."""

import atexit
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PATIENCE_S = 10.0
"""A run that was killed may still hold its lock for a moment: the kernel frees the memory of its GPUs first."""
_POLL_S = 0.1


@dataclass(frozen=True)
class Owner:
    """The process that has a lock."""

    process: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    """The Slurm job; "" outside of Slurm."""
    start: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    """How often Slurm has requeued the job."""

    @classmethod
    def read(cls, path: Path) -> "Owner | None":
        """Reads the file of a lock; None if it has just been made or removed."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def is_followed_by(self, other: "Owner") -> bool:
        """Whether ``other`` is a later start of the same job, so that this process has ended."""
        return bool(self.job) and self.job == other.job and self.start < other.start


class ExportLock:
    """The right to export to a folder, from the start of a run to its end. One process of a run has it.

    It is a lock of the kernel on the file ``.NAME.lock`` beside the folder, so it ends with the process, also if that is killed. The
    file names the process for others.
    """

    def __init__(self, out_dir: Path) -> None:
        """Waits a moment for the lock.

        Raises:
            ValueError: another process has it.
            OSError: the file cannot be written.
        """
        self.path = out_dir.absolute().parent / f".{out_dir.name}.lock"
        ends = time.monotonic() + _PATIENCE_S
        while (file := self._try()) is None:
            if time.monotonic() > ends:
                raise ValueError(self._refusal(out_dir))
            time.sleep(_POLL_S)
        self._file = file
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(asdict(Owner())).encode(), 0)
        atexit.register(self.release)

    def _try(self) -> int | None:
        """Returns the open file if it could be locked."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = Owner.read(self.path)
            if owner is not None and owner.is_followed_by(Owner()):
                return file  # Some network file systems keep the lock of a machine that has lost its power.
            os.close(file)
            return None
        except OSError:  # This file system has no locks, and nothing keeps two runs apart.
            return file
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # Its owner has removed it meanwhile.
        return None

    def _refusal(self, out_dir: Path) -> str:
        owner = Owner.read(self.path)
        named = "" if owner is None else f", process {owner.process} on {owner.host}"
        return f"--export-hf {out_dir}: another run will write this folder{named}. Give another folder, or start again after its end."

    def release(self) -> None:
        """Removes the file. The end of the process calls this."""
        atexit.unregister(self.release)
        self.path.unlink(missing_ok=True)
        os.close(self._file)
