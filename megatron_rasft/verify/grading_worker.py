"""The code of a ``VerifierPool`` worker: it limits the process and calls the grader."""

import fcntl
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, get_args

from megatron_rasft.types import Check, Verdict
from megatron_rasft.verify.own_function import OwnFunction, preload

_VERDICTS = frozenset(get_args(Verdict))
_MAX_REASON_CHARS = 200


def prepare(memory_bytes: int, function: OwnFunction | None) -> None:
    """Prepares a new worker: makes deadlines effective, silences its output, loads the user's function, and limits its address space.

    Args:
        memory_bytes: address space that gradings may use in addition to the worker's present size.
        function: the function of --verify-function, if there is one.
    """
    # The default actions kill at once. Python's own handlers would run only after C code such as 10**10**10 returns
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _end_with_the_run()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # sympy's and ANTLR's parsers print pages of warnings about malformed formulas
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    preload(function)
    with open("/proc/self/statm") as statm:
        own_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    # Only the soft limit is set: a sandbox started from this worker sets other limits for its own processes
    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (own_bytes + memory_bytes, hard_limit))


def _end_with_the_run() -> None:
    """Makes the kernel end this process when the run ends, however that happens.

    The parent of a worker is the fork server, which waits for its workers and so outlives a killed run. But multiprocessing gives each
    worker the read end of a pipe, and only the run has the write end. The kernel sends SIGIO when it is closed, which also ends C code.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by multiprocessing"
    pipe = parent.sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([pipe], timeout=0):  # the run has ended before
        os._exit(1)


def is_ready() -> bool:
    """Returns True. The pool runs this task to see whether workers can start."""
    return True


def grade(
    grader: Callable[..., Any], text: str, check: Check, kill_after_s: float
) -> tuple[str, str, float | None]:
    """Calls the grader and returns verdict, reason and reward, also for a grader that raises or returns something else.

    Returns plain strings only: the parent may not be able to unpickle an exception of a library.

    Args:
        grader: ``(text, check) -> (verdict, reason)``, or with a reward as the third.
        text: the response.
        check: gold answer, tests or row.
        kill_after_s: the worker kills itself after this time, in case its parent no longer can.
    """
    # The kernel's timer with the default action also ends C code, and needs no parent
    signal.setitimer(signal.ITIMER_REAL, kill_after_s)
    try:
        verdict, reason, *reward = grader(text, check)
        if verdict not in _VERDICTS:
            return "unverifiable", f"grader returned {str(verdict)[:50]!r}", None
        return str(verdict), str(reason)[:_MAX_REASON_CHARS], reward[0] if reward else None
    except MemoryError:
        return "unverifiable", "grader ran out of memory", None
    except RecursionError:
        return "unverifiable", "grader recursed too deeply", None
    except BaseException as error:  # pebble would raise a SystemExit again in the parent
        return "unverifiable", f"grader raised {type(error).__name__}", None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
