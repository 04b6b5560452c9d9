"""What attempts to leave the sandbox aim at, and the program that makes the attempts."""

import ctypes
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_rasft.verify.programs import confinement
from tests.unit.verify.programs.escape_attempts import NUMBERS, PREAMBLE

LIBC = ctypes.CDLL(None, use_errno=True)
IPC_PRIVATE, IPC_RMID, IPC_STAT = 0, 0, 2


@dataclass(frozen=True)
class Targets:
    """Files, sockets, a process and kernel objects outside of the sandbox."""

    folder: Path
    victim: subprocess.Popen[bytes]
    listeners: list[socket.socket]
    objects: dict[str, int]

    def names(self) -> dict[str, object]:
        """The values of the names that the attempts use."""
        column = ("x86_64", "aarch64").index(platform.machine())
        return {
            "OUT": str(self.folder),
            "ABSTRACT": self.listeners[2].getsockname(),
            "VICTIM_PID": self.victim.pid,
            "NUMBERS": {name: numbers[column] for name, numbers in NUMBERS.items()},
            **self.objects,
        }

    def state(self) -> list[object]:
        """Everything that an attempt could change."""
        process = psutil.Process(self.victim.pid)
        files = {}
        for path in sorted(self.folder.iterdir()):
            status = path.stat()
            files[path.name] = (
                status.st_mode,
                status.st_uid,
                status.st_size,
                status.st_nlink,
                status.st_mtime,
            )
        heard = [_hears(listener) for listener in self.listeners]
        buffer = ctypes.create_string_buffer(256)
        alive = [
            LIBC.shmctl(self.objects["SHM"], IPC_STAT, buffer),
            LIBC.semctl(self.objects["SEM"], 0, IPC_STAT, buffer),
            LIBC.msgctl(self.objects["MSG"], IPC_STAT, buffer),
        ]
        limits = [process.rlimit(limit) for limit in (psutil.RLIMIT_CPU, psutil.RLIMIT_NOFILE)]
        scheduling = [process.nice(), process.ionice(), process.cpu_affinity(), os.getpgid(process.pid)]
        return [
            self.victim.poll(),
            files,
            heard,
            alive,
            limits,
            scheduling,
            os.sched_getscheduler(process.pid),
        ]


def _hears(listener: socket.socket) -> bool:
    try:
        listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Targets]:
    folder = tmp_path_factory.mktemp("out")
    folder.chmod(0o777)
    (folder / "victim").write_text("x")
    (folder / "victim").chmod(0o666)
    listeners = []
    for kind, address in (
        (socket.SOCK_STREAM, str(folder / "stream")),
        (socket.SOCK_DGRAM, str(folder / "listener")),
        (socket.SOCK_DGRAM, f"\0rasft-{os.getpid()}"),
    ):
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(address)
        listener.setblocking(False)
        listeners.append(listener)
        if address[0] != "\0":
            os.chmod(address, 0o777)
    listeners[0].listen()
    objects = {
        "SHM": LIBC.shmget(IPC_PRIVATE, 4096, 0o1666),
        "SEM": LIBC.semget(IPC_PRIVATE, 1, 0o1666),
        "MSG": LIBC.msgget(IPC_PRIVATE, 0o1666),
    }
    # Without capabilities, like a process of an ordinary user
    victim = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(10000)"],
        preexec_fn=confinement.drop_privileges,
    )
    yield Targets(folder, victim, listeners, objects)
    victim.kill()
    victim.wait()
    for listener in listeners:
        listener.close()
    LIBC.shmctl(objects["SHM"], IPC_RMID, None)
    LIBC.semctl(objects["SEM"], 0, IPC_RMID)
    LIBC.msgctl(objects["MSG"], IPC_RMID, None)


# os.write, because sys.stdout may be one of the objects under attack
TRIES_ALL = """
for name, attempt in ATTEMPTS.items():
    try:
        exec(attempt, dict(globals()))
    except OSError:
        continue
    except BaseException as error:
        name = f"{name}: {error!r}"
    os.write(1, f"{name}\\0".encode())
os.write(1, b"tried all")
"""


def script_of(attempts: dict[str, str], targets: Targets) -> str:
    """Returns a program that prints the names of the attempts that succeed."""
    given = targets.names() | {"ATTEMPTS": attempts}
    return "\n".join([*(f"{name} = {value!r}" for name, value in given.items()), PREAMBLE, TRIES_ALL])
