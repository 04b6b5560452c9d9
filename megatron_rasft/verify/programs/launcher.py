"""The launcher: a small interpreter that confines itself, and then forks the processes of each check.

It loads the common modules once, so that a check costs two forks instead of two interpreter starts. Each forked process
runs one check and ends. The launcher itself never reads tests or programs, so no forked process has those of an earlier
check in its memory: it passes on open files that its parent gave it.

A check of ``tests`` needs two processes with a socket between them: the tester, which gives the verdict, and its child,
the candidate, which runs the program. A check of a ``script`` needs the candidate alone, with standard input and output.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from megatron_rasft.scratch import remove
from megatron_rasft.types import CodeTests, ProgramCase
from megatron_rasft.verify.programs import (
    candidate,
    confinement,
    environment,
    preloading,
    seccomp,
    tester,
    usage,
)

HEAVY = ("numpy", "pytest")
"""Packages that make every fork slower. A launcher loads them only if the program or the tests name them."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NUM_FILES = 64
_FIRST_USER = 1 << 30
_MAX_REQUEST_BYTES = 1 << 16


@dataclass(frozen=True)
class Allowance:
    """The limits of one check."""

    timeout_s: float
    """Wall time of the check."""
    memory_bytes: int
    """Address space of each process, in addition to the launcher's."""
    output_bytes: int
    """Maximum size of a script's standard output, or of one message between tester and candidate."""
    scratch_bytes: int
    """Maximum total size of the files that the program and the tests write."""


def main(level: str, packages: str, control_fd: int, parent_pid: int, scratch: str) -> None:
    """Runs checks until ``control_fd`` is closed. The first message to its other end reports whether ``level`` could be reached.

    Args:
        level: the sandbox level to confine this process to.
        packages: packages to load beside the standard library, separated by spaces.
        control_fd: the socket to the process that started this one.
        parent_pid: id of that process.
        scratch: for the level ``landlock``, the folder for the folders of the checks.
    """
    confinement.die_with_parent()
    if os.getppid() != parent_pid:
        return  # the parent ended before the death signal was set
    control = socket.socket(fileno=control_fd)
    # The kernel counts threads by user. Checks of another launcher must not count, so root runs each launcher's as another user
    users = (_FIRST_USER + os.getpid(), confinement.NOBODY)
    os.setpgid(0, 0)
    preloading.load_modules(packages.split(), is_complete=level == "limits")
    _readable_paths()  # found once, for all forked processes
    base_bytes = confinement.address_space_bytes()
    try:
        seccomp.prepare_filters()
        if level == "namespaces":
            confinement.enter_namespaces()
            _continue_as_first_process(control)
            confinement.enter_bare_root(_readable_paths())
        else:
            confinement.adopt_orphans()
        if level == "landlock":
            confinement.landlock_version()
    except OSError as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    # Integers cross between the processes as decimal text, of any length
    sys.set_int_max_str_digits(0)
    # The collector would write to every object's header, and so copy the memory that forks share
    gc.collect()
    gc.freeze()
    control.send(b"{}")
    launcher = _Launcher(level, control, base_bytes, users, scratch)
    while True:
        request, fds, _, _ = socket.recv_fds(control, _MAX_REQUEST_BYTES, 4)
        if not request:
            return
        outcome = launcher.run(json.loads(request), fds)
        control.send(json.dumps(outcome).encode())


@lru_cache(maxsize=1)
def _readable_paths() -> tuple[Path, ...]:
    """Returns the paths of Python, its packages and the system libraries, without paths below another path in the result."""
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
    return tuple(chosen)


def _continue_as_first_process(control: socket.socket) -> None:
    """Forks a child that becomes process 1 of the new namespace, and returns in it. The calling process waits and ends with it.

    A process never moves to another process-id namespace itself: only children that it forks after unshare(2) do.
    """
    child = os.fork()
    if child:
        control.close()
        os.waitpid(child, 0)
        os._exit(0)
    confinement.die_with_parent()


class _Launcher:
    """Runs the requested checks one after the other.

    Args:
        level: the level that this process is confined to.
        control: the socket to the parent, which forked processes must close.
        base_bytes: address space of this process.
        users: ids of users without files, for checks in namespaces. The first that exists is used.
        scratch: for the level ``landlock``, the folder for the folders of the checks.
    """

    def __init__(
        self, level: str, control: socket.socket, base_bytes: int, users: Sequence[int], scratch: str
    ) -> None:
        self._level = level
        self._control = control
        self._base_bytes = base_bytes
        self._users = users if level == "namespaces" else ()
        self._scratch = scratch

    def run(self, request: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        """Runs one check within its time, and ends everything that it started.

        Args:
            request: ``kind`` (``tests`` or ``script``) and ``allowance``.
            fds: ``tests``: the tests, the verdict (to be written), the program. ``script``: the program, standard
                input, standard output (to be written).

        Returns:
            ``outcome``: ``ended``, ``failed``, ``timeout``, ``killed by signal N`` or ``stopped: REASON``.
        """
        allowance = Allowance(**request["allowance"])
        scratch = None
        if self._level == "landlock":
            scratch = Path(tempfile.mkdtemp(dir=self._scratch))
        # The first process of the check reports its child's id, so that both can be killed at the deadline
        pid_reader, pid_writer = os.pipe()
        first = os.fork()
        if not first:
            try:
                os.close(pid_reader)
                self._control.close()
                check = _Check(self._level, self._base_bytes, allowance, scratch, pid_writer, self._users)
                check.run_script(*fds) if request["kind"] == "script" else check.run_tests(*fds)
            finally:
                os._exit(3)
        for fd in (pid_writer, *fds):
            os.close(fd)
        candidate_pid = int.from_bytes(os.read(pid_reader, 8), "little")
        os.close(pid_reader)
        try:
            return {"outcome": self._wait([first, candidate_pid], allowance, scratch)}
        finally:
            self._end_all(first, candidate_pid)
            if scratch is not None:
                remove(scratch)

    def _wait(self, pids: Sequence[int], allowance: Allowance, scratch: Path | None) -> str:
        """Waits for the first process until the deadline and returns the outcome. Does not reap it: see ``_end_all``."""
        deadline = time.monotonic() + allowance.timeout_s
        ended = os.pidfd_open(pids[0])
        watcher = usage.Watcher(pids, scratch, allowance.scratch_bytes)
        try:
            while True:
                left_s = max(0.0, deadline - time.monotonic())
                interval_s = left_s if self._level == "namespaces" else min(left_s, usage.INTERVAL_S)
                if select.select([ended], [], [], interval_s)[0]:
                    break
                if self._level != "namespaces":
                    excess = watcher.find_excess()
                    if excess:
                        return f"stopped: {excess}"
                if time.monotonic() >= deadline:
                    return "timeout"
        finally:
            os.close(ended)
        status = os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        assert status is not None
        if status.si_code != os.CLD_EXITED:
            return f"killed by signal {status.si_status}"
        return "ended" if status.si_status == 0 else "failed"

    def _end_all(self, first: int, candidate_pid: int) -> None:
        """Kills the processes of the check and reaps them. seccomp forbids them to start others."""
        if self._level == "namespaces":
            # -1 is every process of this namespace except process 1, which is the launcher
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            # Neither process has been reaped, so the kernel cannot have reused their ids
            for pid in filter(None, (first, candidate_pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


class _Check:
    """The first process of one check: prepares file system and process ids, and starts the candidate.

    Args:
        level: sandbox level of the launcher.
        base_bytes: address space of the launcher.
        allowance: limits of the check.
        scratch: the folder that may be written to; None for the private /tmp of ``namespaces``, or for no folder.
        pid_writer: pipe to the launcher for the candidate's process id.
        users: users that root may become.
    """

    def __init__(
        self,
        level: str,
        base_bytes: int,
        allowance: Allowance,
        scratch: Path | None,
        pid_writer: int,
        users: Sequence[int],
    ) -> None:
        confinement.die_with_parent()
        self._level = level
        self._base_bytes = base_bytes
        self._allowance = allowance
        self._scratch = scratch
        self._pid_writer = pid_writer
        self._users = users
        if level == "namespaces":
            # The new process-id namespace is for the candidate, which then cannot see the tester
            os.unshare(os.CLONE_NEWNS | os.CLONE_NEWPID)
            options = f"size={allowance.scratch_bytes},nr_inodes={usage.MAX_FILES},mode=1777"
            self._scratch = Path("/tmp")
            # Python itself may be installed below /tmp
            confinement.mount_empty_folder(self._scratch, options, kept=_readable_paths())
        elif scratch is not None:
            # The modules that use temporary files may have been asked for their folder before
            os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
        os.chdir(self._scratch or "/")
        _reopen_standard_streams()
        # Restricted before the candidate is forked, which then restricts itself again. A Landlock domain does not let
        # signals out, not even the death signal of a parent (Linux 6.12 and later), except to a domain inside it
        self._may_truncate = level != "landlock" or self._restrict_paths()

    def run_script(self, source: int, stdin: int, stdout: int) -> NoReturn:
        """Runs the program in the file ``source`` as a script, and ends with its success or failure."""
        child = self._fork(keeps=(source, stdin, stdout))
        if child:
            # WNOWAIT leaves the child unreaped: its id stays reserved until the launcher has killed it
            status = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            os._exit(0 if status is not None and status.si_status == 0 else 1)
        program = _read(source)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        self._confine(self._allowance.output_bytes, is_candidate=True)
        os._exit(environment.run_script(program))

    def run_tests(self, request: int, verdict: int, source: int) -> NoReturn:
        """Becomes the tester: runs the tests in the file ``request`` and writes their verdict to ``verdict``."""
        tester_end, candidate_end = socket.socketpair()
        child = self._fork(keeps=(source, candidate_end.fileno()))
        if not child:
            tester_end.detach()  # _fork has already closed this file
            program = _read(source)
            os.close(source)
            self._confine(self._allowance.scratch_bytes, is_candidate=True)
            candidate.serve(candidate_end, program, self._allowance.output_bytes)
            os._exit(0)
        candidate_end.close()
        os.close(source)
        if self._level == "namespaces":
            # A process whose children would belong to another process-id namespace cannot start threads
            own = os.pidfd_open(os.getpid())
            os.setns(own, os.CLONE_NEWPID)
            os.close(own)
        # Read only now: the candidate was forked before, so the tests were never in its memory
        tests = _tests_from(json.loads(_read(request)))
        self._confine(self._allowance.scratch_bytes, is_candidate=False)
        found = tester.judge(tests, tester_end, self._allowance.output_bytes)
        os.pwrite(verdict, json.dumps(found).encode(), 0)
        os._exit(0)

    def _fork(self, keeps: Sequence[int]) -> int:
        """Forks a process that keeps only these files and the standard streams, and reports its id to the launcher."""
        child = os.fork()
        if child:
            os.write(self._pid_writer, child.to_bytes(8, "little"))
            os.close(self._pid_writer)
            return child
        confinement.die_with_parent()
        kept = sorted({0, 1, 2, *keeps})
        for before, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(before + 1, after)
        return 0

    def _confine(self, file_bytes: int, *, is_candidate: bool) -> None:
        """Takes the rights of this process away, before it runs tests or the program.

        Args:
            file_bytes: largest file that it may write.
            is_candidate: False for the tester, which may open files for reading at every level.
        """
        has_own_namespace = self._level == "namespaces"
        if not is_candidate:
            confinement.hide_memory()
        confinement.set_limits(
            memory_bytes=self._base_bytes + self._allowance.memory_bytes,
            # A little more than the wall time, so that exceeding it is usually reported as a time-out
            cpu_s=int(self._allowance.timeout_s) + 2,
            file_bytes=file_bytes,
            num_files=_NUM_FILES,
            num_processes=usage.MAX_THREADS if has_own_namespace else None,
        )
        confinement.drop_privileges(self._users)
        if self._level == "landlock" and is_candidate:
            self._restrict_paths()
        seccomp.filter_system_calls(
            may_open=self._level != "limits" or not is_candidate,
            may_change_files=self._level != "limits",
            may_change_attributes=has_own_namespace,
            may_truncate=self._may_truncate,
        )

    def _restrict_paths(self) -> bool:
        assert self._scratch is not None, "a check at the level landlock has a folder"
        return confinement.restrict_paths(_readable_paths(), self._scratch)


def _reopen_standard_streams() -> None:
    """Opens the null device anew as the standard streams. Flags of a file that several checks share would be seen by the next."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def _read(fd: int) -> str:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0).decode("utf-8", "surrogatepass")


def _tests_from(content: dict[str, Any]) -> CodeTests:
    cases = tuple(ProgramCase(**case) for case in content["cases"])
    return CodeTests(**{**content, "tests": tuple(content["tests"]), "cases": cases})
