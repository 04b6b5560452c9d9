"""Grades rollouts in processes that can be killed. The parent never parses what a model wrote."""

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, get_args

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.errors import RasftError
from megatron_rasft.types import Check, CodeTests, Rollout, Verdict
from megatron_rasft.verify.math_grading import grade_answer
from megatron_rasft.verify.programs.program_grading import grade_program

logger = logging.getLogger(__name__)

Grader = Callable[[str, str], tuple[Verdict, str]]
"""``(response text, gold answer) -> (verdict, reason)``: a module-level function or a ``functools.partial``."""

_VERDICTS = frozenset(get_args(Verdict))
_MAX_REASON_CHARS = 200
# A worker kills itself this long after the deadline at which the parent should have: it has none any more
_ORPHAN_GRACE_S = 5.0
# A sandbox keeps its own deadline; past this the worker that waits for it is killed
_SANDBOX_GRACE_S = 60.0
# A pool that breaks this often in one call gets one rollout at a time, so that the guilty one is known
_MAX_BROKEN_POOLS = 2
_MAIN_LOCK = threading.Lock()


class VerifierPool:
    """Workers that grade rollouts, each rollout with a deadline and a memory limit of its own.

    Workers come from a fork server that knows neither torch nor the main script, so they start in
    milliseconds and hold none of the trainer's memory. They end with the parent, or, if it is killed, a few
    seconds after the deadline. Programs do not run in the workers but in a sandbox that each of them keeps. Use it
    as a context manager; it may be entered again after it was left.
    """

    def __init__(self, config: VerifyConfig, grader: Grader | None = None) -> None:
        """Args:
        config: the ``verify_*`` knobs.
        grader: replaces ``grade_answer``; must be importable in a worker. Tests of programs are run in any case.
        """
        self._config = config
        self._grader = grader or partial(grade_answer, rel_tolerance=config.verify_numeric_rel_tolerance)
        self._num_workers = config.verify_num_workers or max(1, len(os.sched_getaffinity(0)) // 2)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> "VerifierPool":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; what they are grading is lost. May be called twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def verify(
        self,
        rollouts: Sequence[Rollout],
        checks: Mapping[str, Check],
        look_up: Callable[[], None] = lambda: None,
    ) -> Counter[Verdict]:
        """Set ``verdict`` and ``verdict_reason`` of every rollout and count the verdicts.

        Rollouts cut by length or aborted are ``wrong`` without being graded (``verify_grade_truncated`` lets
        the grader decide on the former). A missing or empty gold answer gives ``unverifiable``. A grader that
        runs past its deadline gives ``timeout``; one that crashes gives ``unverifiable``; others go on.

        Args:
            rollouts: graded in place, whatever verdict they had.
            checks: problem id -> gold answer, or tests of a program.
            look_up: called after each verdict; what it raises ends the call, with no worker left at its task.

        Raises:
            RasftError: workers cannot be started at all.
        """
        to_grade: deque[Rollout] = deque()
        for rollout in rollouts:
            rollout.verdict = None
            if rollout.finish_reason == "abort":
                _set(rollout, "wrong", "aborted")
            elif rollout.finish_reason == "length" and not self._config.verify_grade_truncated:
                _set(rollout, "wrong", "truncated")
            elif not _is_usable(checks.get(rollout.problem_id, "")):
                _set(rollout, "unverifiable", "no gold answer")
            else:
                to_grade.append(rollout)

        num_broken = 0
        while to_grade:
            max_in_flight = 2 * self._num_workers if num_broken <= _MAX_BROKEN_POOLS else 1
            unfinished = self._grade(to_grade, checks, max_in_flight, look_up)
            if unfinished:
                num_broken += 1
                logger.warning(
                    "the verifier's workers broke down (%d times in this call): starting new ones", num_broken
                )
                if max_in_flight == 1:
                    _set(unfinished.pop(), "unverifiable", "grader broke the worker pool")
                to_grade.extendleft(unfinished)
                self._restart()
        assert all(r.verdict is not None for r in rollouts), "a rollout was left without a verdict"
        return Counter(r.verdict for r in rollouts if r.verdict is not None)

    def _grade(
        self,
        to_grade: deque[Rollout],
        checks: Mapping[str, Check],
        max_in_flight: int,
        look_up: Callable[[], None],
    ) -> list[Rollout]:
        """Grade until the queue is empty (returns []) or the pool breaks (returns what was in flight)."""
        in_flight: dict[Future[Any], Rollout] = {}
        # Backstop for a pool that lost track of a task: every task in flight could have timed out twice by then
        stalled_s = 60 + 4 * max((self._deadline_s(checks[r.problem_id]) for r in to_grade), default=0)
        try:
            while to_grade or in_flight:
                look_up()
                while to_grade and len(in_flight) < max_in_flight:
                    rollout = to_grade.popleft()
                    try:
                        in_flight[self._schedule(rollout, checks[rollout.problem_id])] = rollout
                    except RuntimeError:  # pebble's word for a pool that broke since the last look
                        return [rollout, *in_flight.values()]
                done, _ = wait(in_flight, timeout=stalled_s, return_when=FIRST_COMPLETED)
                if not done:
                    return list(in_flight.values())
                for future in done:
                    try:
                        _set(in_flight[future], *future.result())
                    except FutureTimeoutError:
                        deadline_s = self._deadline_s(checks[in_flight[future].problem_id])
                        _set(in_flight[future], "timeout", f"deadline of {deadline_s:g} s")
                    except ProcessExpired as error:
                        _set(in_flight[future], "unverifiable", f"grader crashed, exit code {error.exitcode}")
                    except (BrokenProcessPool, CancelledError):
                        return list(in_flight.values())
                    del in_flight[future]
            return []
        except BaseException:  # Ctrl-C above all: leave nothing running behind
            for future in in_flight:
                future.cancel()
            raise

    def _schedule(self, rollout: Rollout, check: Check) -> ProcessFuture:
        assert self._pool is not None, "use VerifierPool as a context manager"
        text = rollout.text[-self._config.verify_max_response_chars :]
        deadline_s = self._deadline_s(check)
        grader = partial(grade_program, config=self._config) if isinstance(check, CodeTests) else self._grader
        args = (grader, text, check, deadline_s + _ORPHAN_GRACE_S)
        return self._pool.schedule(_grade_in_worker, args=args, timeout=deadline_s)

    def _deadline_s(self, check: Check) -> float:
        """When the worker is killed; a sandbox has given its verdict long before."""
        if not isinstance(check, CodeTests):
            return self._config.verify_timeout_s
        num_runs = len(check.cases) if check.style == "stdin" else 1
        return num_runs * self._config.verify_code_timeout_s + _SANDBOX_GRACE_S

    def _start(self) -> None:
        assert self._pool is None, "the pool is running already"
        self._pool = ProcessPool(
            max_workers=self._num_workers,
            max_tasks=self._config.verify_max_tasks_per_worker,
            initializer=_initialize_worker,
            initargs=(self._config.verify_memory_mib * 2**20,),
            context=_IsolatedContext(),
        )
        try:
            self._pool.schedule(_ready).result(timeout=120)
        except (BrokenProcessPool, FutureTimeoutError, CancelledError, ProcessExpired) as error:
            self.close()
            raise RasftError(
                f"the verifier's workers do not start ({type(error).__name__}: {error}). Look above for what "
                f"the worker printed; --verify-memory-mib {self._config.verify_memory_mib} may be too small."
            ) from error
        except BaseException:
            self.close()
            raise

    def _restart(self) -> None:
        self.close()
        self._start()


def _set(rollout: Rollout, verdict: Verdict, reason: str) -> None:
    rollout.verdict, rollout.verdict_reason = verdict, reason


def _is_usable(check: Check) -> bool:
    return isinstance(check, CodeTests) or bool(check.strip())


def _ready() -> bool:
    return True


def _grade_in_worker(
    grader: Callable[..., Any], text: str, check: Check, kill_after_s: float
) -> tuple[str, str]:
    """Only plain strings go back: unpickling an exception of a library could fail in the parent."""
    # The kernel's own clock, without a Python handler: it ends C code too, and needs no parent
    signal.setitimer(signal.ITIMER_REAL, kill_after_s)
    try:
        verdict, reason = grader(text, check)
        if verdict not in _VERDICTS:
            return "unverifiable", f"grader returned {str(verdict)[:50]!r}"
        return str(verdict), str(reason)[:_MAX_REASON_CHARS]
    except MemoryError:
        return "unverifiable", "grader ran out of memory"
    except RecursionError:
        return "unverifiable", "grader recursed too deeply"
    except BaseException as error:  # a SystemExit would be raised again, in the parent
        return "unverifiable", f"grader raised {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _initialize_worker(memory_bytes: int) -> None:
    # Python's handler would wait for C code such as 10**10**10 to return; the default kills at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        own_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    # The soft limit only: a sandbox that the worker starts sets its own
    resource.setrlimit(
        resource.RLIMIT_AS, (own_bytes + memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1])
    )
    # Parsers complain about bad formulas at length; nobody asked
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


class _IsolatedProcess(ForkServerProcess):
    """A worker that does not run the main script again.

    multiprocessing imports the parent's main script into each child that does not fork from it: for a trainer
    that is torch and Megatron in every worker. No public switch turns that off; it is skipped where
    ``__main__`` has neither file nor spec, so both are hidden while the child's start-up data is collected.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _hidden_main():
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]


class _IsolatedContext(ForkServerContext):
    Process = _IsolatedProcess  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        # What the server has imported, its children need not import. Without effect if it runs already.
        self.set_forkserver_preload([grade_answer.__module__, __name__])


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    with _MAIN_LOCK:
        hidden: dict[str, Any] = {
            name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)
        }
        try:
            vars(main).pop("__file__", None)
            main.__spec__ = None
            yield
        finally:
            vars(main).update(hidden)
