"""Starts confined processes: a small interpreter that has the common modules loaded and forks one for every check.

It holds neither tests nor programs, so that what it forks finds none in its memory: the parent hands it open files
and it passes them on. A forked process runs one check and is never used again.

What is started for a check of ``tests``: the tester, which judges, and the candidate, which runs the program, with a
socket between them. For ``program``: the candidate alone, with its standard streams.
"""

import contextlib
import errno
import gc
import importlib
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rasft.types import CodeTests, ProgramCase
from megatron_rasft.verify.programs import candidate, confinement, tester

_PRELOADED = (
    "math cmath random re string json datetime decimal fractions statistics copy operator itertools functools "
    "collections collections.abc heapq bisect typing dataclasses enum abc io time timeit hashlib base64 textwrap "
    "contextlib array numbers zlib calendar"
).split()
HEAVY = ("numpy", "pytest")
"""Packages that cost every fork: loaded where they are asked for only."""
# Nothing can be opened at the lowest level, so whatever a program may import has to be there
_NOT_PRELOADED = frozenset("antigravity idlelib lib2to3 this tkinter turtle turtledemo test".split())
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NUM_FILES = 64
_NUM_PROCESSES = 64
_NUM_INODES = 1024
_LOOK_S = 0.25
_MAX_REQUEST_BYTES = 1 << 16


@dataclass(frozen=True)
class Allowance:
    """What one check may use."""

    timeout_s: float
    memory_bytes: int
    output_bytes: int
    scratch_bytes: int


def main(level: str, packages: str, control_fd: int, parent_pid: int) -> None:
    """Serve requests from ``control_fd`` until it is closed. Says first whether ``level`` could be reached.

    Args:
        packages: names of what to load beside the standard library, with spaces between.
    """
    confinement.die_with_parent()
    if os.getppid() != parent_pid:
        return
    control = socket.socket(fileno=control_fd)
    os.setpgid(0, 0)
    _preload(level, packages.split())
    base_bytes = confinement.address_space_bytes()
    try:
        if level == "namespaces":
            confinement.enter_namespaces()
            _continue_as_first_process(control)
            confinement.enter_bare_root(_readable_paths())
        else:
            confinement.adopt_orphans()
    except OSError as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    # Long integers cross between processes as text
    sys.set_int_max_str_digits(0)
    gc.collect()
    gc.freeze()
    control.send(b"{}")
    launcher = _Launcher(level, control, base_bytes)
    while True:
        request, fds, _, _ = socket.recv_fds(control, _MAX_REQUEST_BYTES, 4)
        if not request:
            return
        outcome = launcher.run(json.loads(request), fds)
        control.send(json.dumps(outcome).encode())


def _preload(level: str, packages: list[str]) -> None:
    names: Iterable[str] = [*_PRELOADED, *packages]
    if level == "limits":
        names = [
            *names,
            *sorted(n for n in sys.stdlib_module_names - _NOT_PRELOADED if not n.startswith("_")),
        ]
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        if "pytest" in packages:
            # its own plugins are imported by its first run
            with contextlib.suppress(ImportError, SystemExit):
                importlib.import_module("pytest").main(["--version"])
    # loaded on first use otherwise, and by then there may be no file to open
    with contextlib.suppress(Exception):
        "".encode("idna")
        __import__("locale").getpreferredencoding(False)


def _readable_paths() -> list[Path]:
    """Python, its packages and the system's libraries; no path below another one of the list."""
    wanted = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)]
    wanted += [Path(entry) for entry in sys.path if entry.endswith(("-packages", "lib-dynload"))]
    wanted += [
        Path(path)
        for path in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", *_DEVICES)
    ]
    chosen: list[Path] = []
    for path in sorted({path.absolute() for path in wanted}):
        if path != Path("/") and not any(path.is_relative_to(other) for other in chosen):
            chosen.append(path)
    return chosen


def _continue_as_first_process(control: socket.socket) -> None:
    """Fork into the new process-id namespace; what was the process until now only waits and ends with its child."""
    child = os.fork()
    if child:
        control.close()
        os.waitpid(child, 0)
        os._exit(0)
    confinement.die_with_parent()


class _Launcher:
    def __init__(self, level: str, control: socket.socket, base_bytes: int) -> None:
        self._level = level
        self._control = control
        self._base_bytes = base_bytes

    def run(self, request: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        """Start what ``request`` asks for, wait for it within its time, and leave nothing of it running."""
        allowance = Allowance(**request["allowance"])
        scratch = None
        if self._level == "landlock":
            scratch = Path(tempfile.mkdtemp(prefix=f"rasft-code-{os.getpid()}-"))
        announce, announced = os.pipe()
        keeper = os.fork()
        if not keeper:
            try:
                os.close(announce)
                self._control.close()
                self._keep(request["kind"], fds, allowance, scratch, announced)
            finally:
                os._exit(3)
        os.close(announced)
        for fd in fds:
            os.close(fd)
        candidate_pid = int.from_bytes(os.read(announce, 8), "little")
        os.close(announce)
        try:
            return {"outcome": self._wait(keeper, allowance, scratch)}
        finally:
            self._end_all(keeper, candidate_pid)
            if scratch is not None:
                _remove(scratch)

    def _wait(self, pid: int, allowance: Allowance, scratch: Path | None) -> str:
        """``timeout``, ``stopped: ...``, or how the process ended."""
        deadline = time.monotonic() + allowance.timeout_s
        ended = os.pidfd_open(pid)
        try:
            while True:
                left_s = max(0.0, deadline - time.monotonic())
                # Landlock limits no sum: it is looked at now and then
                if select.select([ended], [], [], left_s if scratch is None else min(left_s, _LOOK_S))[0]:
                    break
                if scratch is not None and _is_over(scratch, allowance.scratch_bytes):
                    return (
                        f"stopped: it wrote more than {allowance.scratch_bytes >> 20} MiB or too many files"
                    )
                if time.monotonic() >= deadline:
                    return "timeout"
        finally:
            os.close(ended)
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        if status.si_code != os.CLD_EXITED:
            return f"killed by signal {status.si_status}"
        return "ended" if status.si_status == 0 else "failed"

    def _end_all(self, keeper: int, candidate_pid: int) -> None:
        """Kill whatever is left and wait for it. Without namespaces there is nothing but these two to look for."""
        if self._level == "namespaces":
            # every process but this one, which is the first of its namespace
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            # both are still unreaped, so the ids are theirs
            for pid in filter(None, (keeper, candidate_pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def _keep(
        self, kind: str, fds: Sequence[int], allowance: Allowance, scratch: Path | None, announced: int
    ) -> None:
        """Make the file system and the process ids of one check, start the candidate in them, become the tester."""
        confinement.die_with_parent()
        if self._level == "namespaces":
            os.unshare(os.CLONE_NEWNS | os.CLONE_NEWPID)
            options = f"size={allowance.scratch_bytes},nr_inodes={_NUM_INODES},mode=1777"
            confinement.mount("tmpfs", "/tmp", "tmpfs", confinement.MS_NOSUID | confinement.MS_NODEV, options)
            scratch = Path("/tmp")
        os.chdir(scratch or "/")
        if kind == "program":
            source, stdin, stdout = fds
            child = self._fork(announced, keeps=(source, stdin, stdout))
            if child:
                # not reaped: its id stays its own until the launcher has looked
                status = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                os._exit(0 if status is not None and status.si_status == 0 else 1)
            program = _read(source)
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            self._confine(allowance, allowance.output_bytes, scratch, is_candidate=True)
            sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8", errors="surrogateescape")
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", errors="surrogateescape")
            os._exit(candidate.run_program(program))
        request, verdict, source = fds
        tester_end, candidate_end = socket.socketpair()
        child = self._fork(announced, keeps=(source, candidate_end.fileno()))
        if not child:
            tester_end.detach()
            program = _read(source)
            os.close(source)
            self._confine(allowance, allowance.scratch_bytes, scratch, is_candidate=True)
            candidate.serve(candidate_end, program, allowance.output_bytes)
            os._exit(0)
        candidate_end.close()
        os.close(source)
        content = json.loads(_read(request))
        content["cases"] = tuple(ProgramCase(**case) for case in content["cases"])
        tests = CodeTests(**{**content, "tests": tuple(content["tests"])})
        self._confine(allowance, allowance.scratch_bytes, scratch, is_candidate=False)
        found = tester.judge(tests, tester_end, allowance.output_bytes)
        os.pwrite(verdict, json.dumps(found).encode(), 0)
        os._exit(0)

    def _fork(self, announced: int, keeps: Sequence[int]) -> int:
        """A child with these files and the standard streams only; its id is told to the launcher first."""
        child = os.fork()
        if child:
            os.write(announced, child.to_bytes(8, "little"))
            os.close(announced)
            return child
        confinement.die_with_parent()
        kept = sorted({0, 1, 2, *keeps})
        for before, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(before + 1, after)
        return 0

    def _confine(
        self, allowance: Allowance, file_bytes: int, scratch: Path | None, *, is_candidate: bool
    ) -> None:
        is_bare = self._level == "namespaces"
        if not is_candidate:
            confinement.hide_memory()
        confinement.set_limits(
            memory_bytes=self._base_bytes + allowance.memory_bytes,
            cpu_s=int(allowance.timeout_s) + 2,
            file_bytes=file_bytes,
            num_files=_NUM_FILES,
            num_processes=_NUM_PROCESSES if is_bare else None,
        )
        confinement.drop_privileges(to_nobody=is_bare)
        may_truncate = True
        if self._level == "landlock":
            assert scratch is not None
            may_truncate = confinement.restrict_paths(_readable_paths(), scratch)
        confinement.filter_system_calls(
            may_open=self._level != "limits" or not is_candidate,
            may_change_files=self._level != "limits",
            may_change_attributes=is_bare,
            may_truncate=may_truncate,
        )


def _read(fd: int) -> str:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0).decode("utf-8", "surrogatepass")


def _is_over(folder: Path, max_bytes: int) -> bool:
    """Whether what lies below a folder is too large, too numerous, or hidden."""
    errors: list[OSError] = []
    num_bytes = num_files = 0
    for root, folders, files in os.walk(folder, onerror=errors.append):
        num_files += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                num_bytes += os.lstat(f"{root}/{name}").st_blocks * 512
        if num_bytes > max_bytes or num_files > _NUM_INODES:
            return True
    return any(error.errno != errno.ENOENT for error in errors)


def _remove(folder: Path) -> None:
    """Also where the program took its own rights away, or dug deeper than ``shutil`` follows."""
    for root, _, _ in os.walk(folder, topdown=True):
        with contextlib.suppress(OSError):
            os.chmod(root, 0o700)
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        subprocess.run(["rm", "-rf", "--", str(folder)], check=False)
