"""Runs a program of a check until it ends or reaches its deadline, and kills every process that it leaves behind.

Imports only the standard library, so that the check can report a missing package instead of failing with it.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
MARKER = "GPU_CHECK_STEP"
"""Environment variable of every process of a step. It identifies a server that has started its own session."""

GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL for a program that has passed its deadline, in which pytest and torchrun clean up."""

HELPERS_S = 2.0
MEMORY_INTERVAL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """A Python program of this repository, and the way to start it."""

    program: Sequence[str]
    """A file in the repository, or ``-m`` and a module; then the arguments."""
    num_processes: int = 0
    """Number of ranks for torchrun to start; 0: start the program without torchrun."""
    variables: dict[str, str] = field(default_factory=dict)
    """Variables to add to the environment."""

    @property
    def line(self) -> list[str]:
        """The command line after the interpreter."""
        if not self.num_processes:
            return list(self.program)
        # --standalone makes torchrun choose a free port
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self.num_processes),
        ]
        return [*launcher, *self.program]


class Started(Protocol):
    """A running program with its own process group."""

    pid: int

    def poll(self) -> int | None:
        """Exit code; None while it runs."""


Start = Callable[[Command, Path], Started]
"""Starts a command in a new process group and appends its output to a file."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The result of a program that has ended."""

    code: int | None
    """Exit code, negative for a signal; None if it passed its deadline and was killed."""
    seconds: float
    left_behind: int
    """Number of processes that were still running after their program had ended by itself, and were killed."""
    peak_gpu_memory_gib: float | None
    """Largest memory in use on a GPU, sampled every few seconds with nvidia-smi; None without nvidia-smi."""


def start(command: Command, log: Path) -> Started:
    """Starts a command in a new interpreter."""
    environment = os.environ | command.variables
    # The repository need not be installed.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command.line],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(command: Command, log: Path, deadline_s: float, begin: Start = start) -> Ended:
    """Runs a command until it ends. After ``deadline_s`` the command and all its descendants are killed."""
    marker = uuid.uuid4().hex
    command.variables[MARKER] = marker
    memory = GpuMemory()
    began = time.monotonic()
    process = begin(command, log)
    try:
        while (code := process.poll()) is None and time.monotonic() - began < deadline_s:
            memory.sample()
            time.sleep(0.1)
        seconds = time.monotonic() - began
        left = [] if code is None else _left_behind(marker)
    finally:
        if process.poll() is None:
            _end(process)
        _kill(process.pid, marker)
    return Ended(code=code, seconds=seconds, left_behind=len(left), peak_gpu_memory_gib=memory.peak_gib)


def _left_behind(marker: str) -> list[int]:
    """Returns processes that outlive their program by more than the moment that Python's own helper processes need to end."""
    ends = time.monotonic() + HELPERS_S
    while (found := _marked(marker)) and time.monotonic() < ends:
        time.sleep(0.05)
    return found


def _end(process: Started) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    ends = time.monotonic() + GRACE_S
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)


def _kill(group: int, marker: str) -> None:
    """Kills the group and every marked process. Repeats this until none exists, because a process may start another meanwhile."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    ends = time.monotonic() + GRACE_S
    while (found := _marked(marker)) and time.monotonic() < ends:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(marker: str) -> list[int]:
    """Processes that a step's program started, directly or indirectly, in any session.

    Zombies are not found, as they have no environment.
    """
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if wanted in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


class GpuMemory:
    """The largest memory that all processes together use on any GPU, according to nvidia-smi."""

    def __init__(self) -> None:
        self.peak_gib: float | None = None
        self._next = time.monotonic()

    def sample(self) -> None:
        """Runs nvidia-smi if the interval has passed, but never again once it has failed or hung."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + MEMORY_INTERVAL_S
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
            used = max(int(line) for line in done.stdout.split()) / 1024  # it prints MiB
        except (OSError, subprocess.SubprocessError, ValueError):
            self._next = float("inf")
            return
        self.peak_gib = max(self.peak_gib or 0.0, used)
