"""The sandbox: starts launchers at the strongest level that the machine allows, and runs checks in them.

``docs/sandbox.md`` describes the three levels (``namespaces``, ``landlock``, ``limits``) and the attacks that none of them
prevents. README.md of this package shows the processes.
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
from megatron_rasft.scratch import ScratchFolder
from megatron_rasft.types import CodeTests, Verdict
from megatron_rasft.verify.programs.launcher import HEAVY, Allowance

LEVELS: tuple[SandboxLevel, ...] = get_args(SandboxLevel)
"""Sandbox levels, strongest first."""

# The folder that holds megatron_rasft. The launcher imports from it without any .pth file or PYTHONPATH
_PACKAGE_PARENT = Path(__file__).resolve().parents[3]
assert (_PACKAGE_PARENT / "megatron_rasft").is_dir(), f"{_PACKAGE_PARENT} does not hold this package"
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from megatron_rasft.verify.programs.launcher import main; "
    "sys.path.pop(0); main(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])"
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    # Some programs depend on the order of sets. With a fixed seed, two runs give the same verdict
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
# The launcher does not load colorsys beforehand, so the probe fails if the packages' files cannot be read
_PROBE = "import colorsys\ndef f(x): return x * x"
_PROBE_TESTS = CodeTests(style="asserts", tests=("assert f(3) == 9",), entry_point="f")
_START_TIMEOUT_S = 120.0
# Seconds after a check's deadline, which the launcher enforces. A launcher that has not answered by then is replaced
_GRACE_S = 30.0


class SandboxError(RasftError):
    """Raised if this machine does not allow the required sandbox level."""


def allowance_of(config: VerifyConfig) -> Allowance:
    """Returns the limits of a check that these flags set."""
    return Allowance(
        timeout_s=config.verify_code_timeout_s,
        memory_bytes=config.verify_code_memory_mib * 2**20,
        output_bytes=config.verify_code_output_mib * 2**20,
        scratch_bytes=config.verify_code_output_mib * 2**20,
    )


class Sandbox:
    """Runs checks, one after the other, in a launcher. Use it as a context manager, or call ``close``.

    The kernel kills the launcher when the thread that created the sandbox ends, so create it in a thread that lasts.

    Args:
        config: limits, and the weakest level to accept.
        levels: levels to try, strongest first. The first that works is used.

    Raises:
        SandboxError: no level works that is at least as strong as ``verify_sandbox_level``.
    """

    def __init__(self, config: VerifyConfig, levels: Sequence[SandboxLevel] = LEVELS) -> None:
        self.allowance = allowance_of(config)
        self._launchers: dict[str, _LauncherProcess] = {}
        accepted = LEVELS[: LEVELS.index(config.verify_sandbox_level) + 1]
        failures = []
        for level in levels:
            if level not in accepted:
                continue
            self.level: SandboxLevel = level
            """The sandbox level in use."""
            failure = self._try_level()
            if not failure:
                return
            failures.append(f"{level}: {failure}")
        raise SandboxError(
            f"--verify-sandbox-level {config.verify_sandbox_level} is not available on this machine "
            f"({'; '.join(failures) or 'no level was tried'}). Programs that the model writes would run with less "
            "protection. Allow user namespaces or Landlock in the container or the kernel, use another machine, or accept a "
            f"weaker level with --verify-sandbox-level (tools/evaluate.py: --sandbox-level); docs/sandbox.md describes "
            f"the levels. From strong to weak: {', '.join(LEVELS)}."
        )

    def _try_level(self) -> str:
        """Starts a launcher at ``self.level`` and runs a probe. Returns why it failed, or an empty string."""
        try:
            self._launchers[""] = _LauncherProcess(self.level, "")
        except SandboxError as error:
            return str(error)
        verdict, reason = self.judge(_PROBE, _PROBE_TESTS)
        # A timeout comes from a busy machine and does not mean that the level is not available
        if verdict in ("correct", "timeout"):
            return ""
        self.close()
        return f"a correct program got {verdict}: {reason}"

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the launchers and everything that they run."""
        while self._launchers:
            self._launchers.popitem()[1].close()

    def judge(self, program: str, tests: CodeTests) -> tuple[Verdict, str]:
        """Runs ``tests``, of any style but ``stdin``, on a program. Returns the verdict and a short reason."""
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
            return "unverifiable", f"the tests gave no verdict: {outcome}"
        verdict, reason = json.loads(found)
        return verdict, reason

    def run_script(self, program: str, stdin: str) -> tuple[str, str]:
        """Runs a program as a script.

        Returns:
            The outcome and the standard output. The outcome is ``ended`` (exit status 0), ``failed`` (any other exit status),
            ``timeout``, or a description.
        """
        with _in_memory("stdin", stdin.encode()) as given, _in_memory("stdout", b"") as taken:
            with _in_memory("program", _encode(program)) as source:
                outcome = self._run("script", [source, given, taken], _packages_of(program))
            size = min(os.fstat(taken).st_size, self.allowance.output_bytes)
            output = os.pread(taken, size, 0).decode("utf-8", "replace")
        return outcome, output

    def _run(self, kind: str, fds: list[int], packages: str) -> str:
        request = {"kind": kind, "allowance": dataclasses.asdict(self.allowance)}
        if packages not in self._launchers:
            self._launchers[packages] = _LauncherProcess(self.level, packages)
        try:
            return self._launchers[packages].run(request, fds, self.allowance.timeout_s + _GRACE_S)
        except OSError:
            # The launcher hangs or has ended. This check gets no verdict, and the next check starts a new launcher
            self._launchers.pop(packages).close()
            return "the sandbox broke"


def _packages_of(*sources: str) -> str:
    """Returns the heavy packages whose names occur in these sources, separated by spaces."""
    return " ".join(name for name in HEAVY if any(name in source for source in sources))


class _LauncherProcess:
    """A launcher, the socket to it, and the folder for its checks.

    Args:
        level: sandbox level to start it at.
        packages: packages that it loads beside the standard library, separated by spaces.

    Raises:
        SandboxError: the launcher does not start, or the machine does not allow the level.
    """

    def __init__(self, level: SandboxLevel, packages: str) -> None:
        self._scratch = ScratchFolder("rasft-programs-") if level == "landlock" else None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(_PACKAGE_PARENT), level, packages, str(theirs.fileno()), str(os.getpid())]
            arguments.append(str(self._scratch.path) if self._scratch else "")
            # A new interpreter instead of a fork: this process holds tests and programs in its memory. -P keeps the
            # current folder out of sys.path, -s the user's packages
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
            raise SandboxError("the launcher does not start") from None
        if "failed" in answer:
            self.close()
            raise SandboxError(str(answer["failed"]))

    def run(self, request: dict[str, Any], fds: list[int], timeout_s: float) -> str:
        """Runs one check with these open files and returns its outcome."""
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
        """Ends the launcher. Its processes end with it, by the process-id namespace or by their death signals."""
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self._scratch is not None:
            self._scratch.close()


@contextlib.contextmanager
def _in_memory(name: str, content: bytes) -> Any:
    """Opens an anonymous file in memory that holds ``content``; yields its descriptor."""
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
