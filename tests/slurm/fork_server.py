"""The process from which the programs of jobs are forked. forked_python.py is its client, in the place of each program."""

import atexit
import ctypes
import faulthandler
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

from tests import forking
from tests.slurm import forked_python

_PR_SET_PDEATHSIG = 1


@contextmanager
def programs_forked(
    folder: Path, parent: forking.Parent = forking.ON_CPU, prepare: Callable[[], None] | None = None
) -> Iterator[dict[str, str]]:
    """Runs a fork server; yields the variables that make a job's programs its children.

    Args:
        folder: gets a socket, whose path may have 107 characters, and the interpreter.
        parent: the process from which the server is forked.
        prepare: called in the server before it forks.
    """
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    source = Path(forked_python.__file__).read_text(encoding="utf-8")
    python.write_text(f"#!{sys.executable} -SEs\n{source}", encoding="utf-8")
    python.chmod(0o755)
    path = str(folder / "fork.socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(256)
    os.environ.update(forking.ENVIRONMENT)
    with parent.forks():
        server = multiprocessing.get_context("forkserver").Process(target=_serve, args=(listener, prepare))
        server.start()
    listener.close()
    names = dict.fromkeys(("PYTHON", "PYTHON_EXEC"), str(python))  # the second is torchrun's
    forked = {"FORK_SERVER": path, "FORKED_MODULES": "torch.distributed.run"}
    try:
        yield {**names, **forked, "REAL_PYTHON": sys.executable}
    finally:
        server.kill()
        server.join()


@dataclass(frozen=True)
class _Program:
    """A running program."""

    client: socket.socket
    pid: int
    end: int
    """File descriptor that is readable when the process has ended."""
    is_module: bool


def _serve(listener: socket.socket, prepare: Callable[[], None] | None) -> None:
    """Forks a process for each client, until the process that started this one ends."""
    if prepare is not None:
        prepare()
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, _Program] = {}
    """The programs by both of their file descriptors."""
    while True:
        ready, _, _ = select.select([listener, parent.sentinel, *running], [], [])
        if parent.sentinel in ready:
            return
        for fd in ready:
            if fd is listener:
                program = _start(listener)
                running[program.client.fileno()] = running[program.end] = program
            elif fd in running:
                program = running[fd]
                if _has_ended(program, fd):
                    del running[program.client.fileno()], running[program.end]
                    os.close(program.end)
                    program.client.close()


def _has_ended(program: _Program, fd: int) -> bool:
    """Passes a client's signals on, or a program's exit code; returns whether the program has ended."""
    if fd == program.end:
        code = os.waitstatus_to_exitcode(os.waitpid(program.pid, 0)[1])
        with suppress(OSError):  # the client was killed
            program.client.send(str(code).encode())
        return True
    number = b""
    with suppress(OSError):
        number = program.client.recv(1)
    _send(program, number[0] if number else signal.SIGKILL)  # no byte: the client was killed
    if not number:
        os.waitpid(program.pid, 0)
    return not number


def _send(program: _Program, number: int) -> None:
    """Sends a signal to a program, and to the processes that a module has started, as Slurm would."""
    process = psutil.Process(program.pid)
    for receiver in [process, *(process.children(recursive=True) if program.is_module else [])]:
        with suppress(psutil.Error):
            receiver.send_signal(number)


def _start(listener: socket.socket) -> _Program:
    client, _ = listener.accept()
    content, files, _, _ = socket.recv_fds(client, forked_python.LARGEST_REQUEST, 3)
    request = json.loads(content)
    pid = os.fork()
    if not pid:
        listener.close()
        client.close()
        _run(request, files)
    for file in files:
        os.close(file)
    return _Program(client, pid, os.pidfd_open(pid), request["words"][0] == "-m")


def _run(request: dict[str, Any], files: list[int]) -> None:
    """Makes this process what the client would be as an interpreter, runs the program, and ends the process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no program outlives the fork server
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    tempfile.tempdir = None  # TMPDIR differs
    for name in forked_python.PASSED_ON:
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in request["ignored"]:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable()
    sys.executable = request["python"]
    # verifier workers are forked from the parent, which has imported the grader
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    code = _exit_code(request["words"])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _exit_code(words: list[str]) -> int:
    """Runs a program or, after ``-m``, a module; returns the exit code that Python would give it."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
