"""Runs a program that a model wrote where it can reach nothing: the levels of protection, and how they are found.

``namespaces``
    Own process ids, own mounts, own network without any interface. The file system holds Python, its packages and the
    system's libraries, read-only, and an empty /tmp in memory with a limit on bytes and files; no /proc, no home
    folders, no data. Threads are limited to 64. Works for root, and for users where the kernel gives them user
    namespaces; container runtimes often do not.
``landlock``
    The same paths may be read and a folder of the check's own may be written, by the kernel's Landlock: one file at most
    as large as the limit; what they hold together, and their number, is looked at every 0.25 s, without files that are
    deleted but open. Sockets and changes of modes, owners and times are refused by seccomp. Works in containers with
    Linux 5.13 or later.
``limits``
    No file can be opened at all: the standard library and numpy are loaded beforehand. Tests that write files, and
    programs that import other packages, fail here.

At every level: seccomp refuses new processes and programs, sockets, signals to others and their scheduling, tracing,
mounts, namespaces, keys, io_uring, bpf; capabilities are dropped; address space, CPU time, file size and open files are
limited; the environment is cleared; everything is killed at the deadline, and since no process can be started, all of
it is known. The tests run in a second process, confined in the same way, that never runs the program: see ``remote_objects``.

What no level does: it shares the kernel with the host, so a hole in the kernel's system calls is a way out; it does
not hide how long things take or how busy the machine is; and tests that accept anything are passed by anything.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_rasft.config.verify import SandboxLevel, VerifyConfig
from megatron_rasft.errors import RasftError
from megatron_rasft.types import CodeTests, Verdict
from megatron_rasft.verify.programs.launcher import HEAVY, Allowance

LEVELS: tuple[SandboxLevel, ...] = get_args(SandboxLevel)
"""Strongest first."""

_PACKAGE_PARENT = Path(__file__).resolve().parents[3]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from megatron_rasft.verify.programs.launcher import main; "
    "sys.path.pop(0); main(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))"
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    # The order of sets decides about some programs: it must not differ between two runs
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
# A module that is not loaded beforehand: its file must be readable
_PROBE = "import colorsys\ndef f(x): return x * x"
_PROBE_TESTS = CodeTests(style="asserts", tests=("assert f(3) == 9",), entry_point="f")
_START_TIMEOUT_S = 120.0
# The launcher keeps the deadline; this much later it is taken to be stuck
_GRACE_S = 30.0


class SandboxError(RasftError):
    """This machine does not allow the protection that was asked for."""


class Sandbox:
    """One launcher and the checks it runs, one after the other. Use it as a context manager, or ``close`` it.

    Everything ends with the thread that uses it, so use it in one that lasts.

    Args:
        config: limits, and the weakest level that is accepted.
        levels: levels to try, strongest first; the first that works is used.

    Raises:
        SandboxError: none works, or only weaker ones than ``verify_sandbox_level``.
    """

    def __init__(self, config: VerifyConfig, levels: Sequence[SandboxLevel] = LEVELS) -> None:
        self.allowance = Allowance(
            timeout_s=config.verify_code_timeout_s,
            memory_bytes=config.verify_code_memory_mib * 2**20,
            output_bytes=config.verify_code_output_mib * 2**20,
            scratch_bytes=config.verify_code_output_mib * 2**20,
        )
        accepted = LEVELS[: LEVELS.index(config.verify_sandbox_level) + 1]
        reasons = []
        for level in levels:
            if level not in accepted:
                continue
            try:
                self._launchers = {"": _Process(level, "")}
            except SandboxError as error:
                reasons.append(f"{level}: {error}")
                continue
            self.level: SandboxLevel = level
            """The protection that is active."""
            verdict, reason = self.judge(_PROBE, _PROBE_TESTS)
            # a busy machine says nothing about the level
            if verdict in ("correct", "timeout"):
                return
            self.close()
            reasons.append(f"{level}: a program that should pass is {verdict}: {reason}")
        raise SandboxError(
            f"--verify-sandbox-level {config.verify_sandbox_level} cannot be reached on this machine "
            f"({'; '.join(reasons) or 'no level was tried'}). Allow it, run elsewhere, or accept a weaker level: "
            f"{', '.join(LEVELS)} from strong to weak."
        )

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the launcher and whatever it runs."""
        while self._launchers:
            self._launchers.popitem()[1].close()

    def judge(self, program: str, tests: CodeTests) -> tuple[Verdict, str]:
        """Run ``tests`` (any style but ``stdin``) on a program."""
        request = json.dumps(dataclasses.asdict(tests)).encode()
        with _in_memory("request", request) as asked, _in_memory("verdict", b"") as given:
            with _in_memory("program", _encode(program)) as source:
                outcome = self._run(
                    "tests", [asked, given, source], _packages_of(program, *tests.tests, tests.setup)
                )
            found = os.pread(given, 10_000, 0)
        if outcome == "timeout":
            return "timeout", f"deadline of {self.allowance.timeout_s:g} s"
        if outcome.startswith("stopped"):
            return "wrong", outcome
        if not found:
            return "unverifiable", f"the tests were {outcome} without a verdict"
        verdict, reason = json.loads(found)
        return verdict, reason

    def output_of(self, program: str, stdin: str) -> tuple[str, str]:
        """Run a program as a script: ``(outcome, standard output)``; the outcome is ``ended``, ``failed`` or ``timeout``."""
        with _in_memory("stdin", stdin.encode()) as given, _in_memory("stdout", b"") as taken:
            with _in_memory("program", _encode(program)) as source:
                outcome = self._run("program", [source, given, taken], _packages_of(program))
            size = min(os.fstat(taken).st_size, self.allowance.output_bytes)
            output = os.pread(taken, size, 0).decode("utf-8", "replace")
        return outcome, output

    def _run(self, kind: str, fds: list[int], packages: str) -> str:
        request = {"kind": kind, "allowance": dataclasses.asdict(self.allowance)}
        if packages not in self._launchers:
            self._launchers[packages] = _Process(self.level, packages)
        try:
            return self._launchers[packages].ask(request, fds, self.allowance.timeout_s + _GRACE_S)
        except OSError:
            # stuck or gone: the next check gets a new one, and the one that did it has no verdict
            self._launchers.pop(packages).close()
            return "ended by a broken sandbox"


def _packages_of(*sources: str) -> str:
    """The heavy packages that these sources name."""
    return " ".join(name for name in HEAVY if any(name in source for source in sources))


class _Process:
    """The launcher's process and the socket to it."""

    def __init__(self, level: SandboxLevel, packages: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(_PACKAGE_PARENT), level, packages, str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", _START, *arguments],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            answer = self._answer(_START_TIMEOUT_S)
        except OSError:
            self.close()
            raise SandboxError("its process does not start") from None
        if "failed" in answer:
            self.close()
            raise SandboxError(str(answer["failed"]))

    def ask(self, request: dict[str, Any], fds: list[int], timeout_s: float) -> str:
        socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        return str(self._answer(timeout_s)["outcome"])

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        self._control.settimeout(timeout_s)
        data = self._control.recv(10_000)
        if not data:
            raise ConnectionResetError
        answer: dict[str, Any] = json.loads(data)
        return answer

    def close(self) -> None:
        self._control.close()
        # All it started ends with it: by the kernel's word where there are namespaces, else by the death signal
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _in_memory(name: str, content: bytes) -> Any:
    """A file without a place in the file system, holding ``content``."""
    fd = os.memfd_create(name)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _encode(program: str) -> bytes:
    return program.encode("utf-8", "replace")
