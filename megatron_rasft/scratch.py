"""Folders for temporary files that do not outlive their process for long.

A process makes its folder, holds a lock on it, and removes it at its end. If the process is killed, the kernel releases the lock. The
next process of the same user and machine that makes a folder of this kind removes every one that nobody has locked.
"""

import contextlib
import fcntl
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import zlib
from multiprocessing.util import Finalize
from pathlib import Path

_NUM_TRIES = 10

_RUN_PREFIX = "rasft-run-"

_MAX_PARENT_BYTES = 47
"""Longest path in which ``use_own_folder`` makes its folder: with the names of this folder (28 bytes), of multiprocessing's (14) and of
a socket in it (18) the path of the socket has the 107 bytes that Linux allows."""

_MAX_SOCKET_FOLDER_BYTES = 88
"""Longest path of a folder in which a socket with a name of up to 18 bytes has a path of the 107 bytes that Linux allows."""

_REMOVED_LAST = -200
"""Priority among the finalizers of multiprocessing, whose own folder has -100."""


class ScratchFolder:
    """A folder that is removed by ``close``, or after the end of this process by the next one that makes such a folder.

    Args:
        prefix: begins the name of the folder. Only folders with the same prefix are removed.
    """

    def __init__(self, prefix: str) -> None:
        parent = Path(tempfile.gettempdir())
        # If the nodes share this folder, each may see its own locks only (localflock of Lustre, local_lock of NFS). The name is short,
        # because paths of sockets are limited to 107 bytes.
        prefix = f"{prefix}{zlib.crc32(socket.gethostname().encode()):08x}-"
        _remove_abandoned(parent, prefix)
        self.path, self.lock = _make_locked(parent, prefix)
        """The open file ``lock`` holds the lock, also in a child that inherits it and outlives this process."""

    @property
    def holds_sockets(self) -> bool:
        """Whether the path of a socket in the folder is short enough."""
        return len(os.fsencode(self.path)) <= _MAX_SOCKET_FOLDER_BYTES

    def close(self) -> None:
        """Removes the folder and its content."""
        remove(self.path)
        os.close(self.lock)


def use_own_folder() -> None:
    """Makes this process and its children create temporary files in a new folder, which is removed as a ``ScratchFolder`` is.

    multiprocessing, wandb and other libraries leave their folders in /tmp for ever if their process is killed. Call it once in a
    program, before wandb is imported. It does nothing if the path of the folder for temporary files is too long.
    """
    if len(os.fsencode(tempfile.gettempdir())) > _MAX_PARENT_BYTES:
        return
    _keep_compiled_kernels()
    folder = ScratchFolder(_RUN_PREFIX)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder.path)
    Finalize(None, folder.close, exitpriority=_REMOVED_LAST)


def _keep_compiled_kernels() -> None:
    """Leaves the kernels that torch.compile has compiled where later runs find them, which is where torch keeps them by default."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = str(os.getuid())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}")


def remove(folder: Path) -> None:
    """Deletes a folder in which a program may have removed permissions or created a very deep path."""
    for root, folders, _ in os.walk(folder):
        # os.walk lists these folders afterwards
        for path in (Path(root, name) for name in folders):
            with contextlib.suppress(OSError):
                if not path.is_symlink():
                    path.chmod(0o700)
    # shutil recurses once per level; rm does not
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        subprocess.run(["rm", "-rf", "--", str(folder)], check=False)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """Makes a folder and returns it with the open file that holds its lock."""
    for _ in range(_NUM_TRIES):
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Before the folder is locked, another process may take it for abandoned
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                is_locked = _has_locked(lock)
            except OSError:  # this file system has no locks: the folder of a killed process stays
                is_locked = True
            if is_locked and path.exists():
                return path, lock
            os.close(lock)
    raise OSError(
        f"{parent} does not keep new folders: {_NUM_TRIES} of them vanished or were locked by others"
    )


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid() and _has_locked(lock):
                    remove(path)
            finally:
                os.close(lock)


def _has_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
