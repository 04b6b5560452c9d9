"""Runs one program of a check to its end or to its deadline, and leaves none of its processes behind.

Needs the standard library only: a check must report that a package is missing, not die of it.
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
"""In the environment of every process of a step. A server that has a session of its own is found by it."""

GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL for a program that has passed its deadline: pytest and torchrun clean up in it."""

HELPERS_S = 2.0
MEMORY_INTERVAL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """A Python program of this repository and how it is started."""

    program: Sequence[str]
    """A file below the root, or ``-m`` and a module; then its arguments."""
    num_processes: int = 0
    """Ranks that torchrun starts; 0 starts the program itself."""
    variables: dict[str, str] = field(default_factory=dict)
    """Added to the environment."""

    @property
    def line(self) -> list[str]:
        """The command line, without the interpreter."""
        if not self.num_processes:
            return list(self.program)
        # --standalone finds a free port by itself.
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self.num_processes),
        ]
        return [*launcher, *self.program]


class Started(Protocol):
    """A running program that leads a process group."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""


Start = Callable[[Command, Path], Started]
"""Starts a command in a process group of its own, its output appended to a file."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended."""

    code: int | None
    """Exit code, negative for a signal; None if it passed its deadline and was killed."""
    seconds: float
    left_behind: int
    """Processes that were still running after their program had ended by itself. They were killed."""
    peak_gpu_memory_gib: float | None
    """Of the GPU that was fullest, by nvidia-smi every few seconds; None where there is none."""


def start(command: Command, log: Path) -> Started:
    """Start a command in a fresh interpreter."""
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
    """Run a command to its end; one that still runs after ``deadline_s`` is killed with all its descendants."""
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
    """Processes that outlive their program by more than the moment that it takes Python's own helpers to see its end."""
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
    """Kill the group and every marked process, until none is left: one may start another meanwhile."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    ends = time.monotonic() + GRACE_S
    while (found := _marked(marker)) and time.monotonic() < ends:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(marker: str) -> list[int]:
    """Processes that a step's program started, directly or not, in whatever session. Zombies have no environment."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if wanted in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


class GpuMemory:
    """The largest memory in use on a GPU, as nvidia-smi shows it: that of all processes together."""

    def __init__(self) -> None:
        self.peak_gib: float | None = None
        self._next = time.monotonic()

    def sample(self) -> None:
        """Ask if it is time to; a machine whose nvidia-smi fails or hangs is not asked again."""
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
