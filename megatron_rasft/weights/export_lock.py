"""Keeps two runs from writing one exported folder."""

import atexit
import fcntl
import os
import socket
import time
from pathlib import Path

_PATIENCE_S = 10.0
"""A run that was killed may still hold its lock for a moment: the kernel frees the memory of its GPUs first."""
_POLL_S = 0.1


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
                raise ValueError(
                    f"--export-hf {out_dir}: another run will write this folder, {self._owner()}. Give another folder, or start again "
                    "after its end."
                )
            time.sleep(_POLL_S)
        self._file = file
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        atexit.register(self.release)

    def _try(self) -> int | None:
        """Returns the open file if it could be locked."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:  # This file system has no locks, and nothing keeps two runs apart.
            return file
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # Its owner has removed it meanwhile.
        return None

    def _owner(self) -> str:
        try:
            return self.path.read_text()
        except OSError:
            return "which has just ended"

    def release(self) -> None:
        """Removes the file. The end of the process calls this."""
        atexit.unregister(self.release)
        self.path.unlink(missing_ok=True)
        os.close(self._file)
