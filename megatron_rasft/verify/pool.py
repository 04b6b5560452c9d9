"""Grades rollouts in worker processes that can be killed. The trainer itself never parses a response."""

import contextlib
import logging
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.errors import RasftError
from megatron_rasft.types import Check, CodeTests, Rollout, Verdict
from megatron_rasft.verify import grading_worker
from megatron_rasft.verify.programs.program_grading import grade_program

logger = logging.getLogger(__name__)

Grader = Callable[[str, str], tuple[Verdict, str]]
"""``(response text, gold answer) -> (verdict, reason)``: a module-level function or a ``functools.partial`` of one."""

# A worker whose check runs in a sandbox is killed this long after the deadline that the sandbox itself enforces
_SANDBOX_GRACE_S = 60.0
# If the pool breaks more often in one call, rollouts are graded one at a time, which shows the one that breaks it
_MAX_BROKEN_POOLS = 2
_MAIN_LOCK = threading.Lock()


class VerifierPool:
    """Workers that grade rollouts. Each rollout has its own deadline and memory limit.

    Workers are forked from a server process that has loaded the grader but neither torch nor the main script. So they
    start in milliseconds and hold none of the trainer's memory. They end with the parent, or, if it is killed while
    they grade, a few seconds after the deadline. Programs do not run in a worker but in a sandbox that it starts.

    Use it as a context manager. It may be entered again after it was left.
    """

    def __init__(
        self, config: VerifyConfig, grader: Grader | None = None, orphan_grace_s: float = 5.0
    ) -> None:
        """Creates a pool without starting its workers.

        Args:
            config: limits, number of workers, sandbox.
            grader: replaces ``grade_answer``. It must be importable in a worker. Programs are always graded by
                ``grade_program``.
            orphan_grace_s: a worker kills itself this long after its deadline, seconds. Until then its parent should have
                killed it, unless the parent has been killed.
        """
        self._config = config
        self._grader = grader or _answer_grader(config)
        self._orphan_grace_s = orphan_grace_s
        self._num_workers = config.verify_num_workers or max(1, len(os.sched_getaffinity(0)) // 2)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> "VerifierPool":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers, without waiting for the rollouts that they grade. May be called twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def verify(
        self,
        rollouts: Sequence[Rollout],
        checks: Mapping[str, Check],
        on_verdict: Callable[[], None] = lambda: None,
    ) -> Counter[Verdict]:
        """Sets ``verdict`` and ``verdict_reason`` of every rollout, and counts the verdicts.

        Aborted rollouts are ``wrong`` without being graded. So are truncated rollouts, unless ``verify_grade_truncated`` is set.
        A problem without gold answer gives ``unverifiable``. A grader that exceeds its deadline gives ``timeout``. A grader that
        crashes gives ``unverifiable``. Other rollouts are not affected.

        Args:
            rollouts: changed in place. Earlier verdicts are overwritten.
            checks: gold answer or tests of each problem, by problem id.
            on_verdict: called before the first and after every verdict, for example to check for signals. If it raises, the
                call ends with that exception and the gradings in progress are cancelled.

        Raises:
            RasftError: workers cannot be started.
        """
        to_grade = deque(rollout for rollout in rollouts if self._needs_grading(rollout, checks))
        num_broken = 0
        while to_grade:
            max_in_flight = 2 * self._num_workers if num_broken <= _MAX_BROKEN_POOLS else 1
            unfinished = self._grade(to_grade, checks, max_in_flight, on_verdict)
            if unfinished:
                num_broken += 1
                logger.warning(
                    "verifier workers crashed (%d. time in this call): starting new workers", num_broken
                )
                if max_in_flight == 1:
                    _set(unfinished.pop(), "unverifiable", "grader broke the worker pool")
                to_grade.extendleft(unfinished)
                self._restart()
        assert all(r.verdict is not None for r in rollouts), "a rollout has no verdict"
        return Counter(r.verdict for r in rollouts if r.verdict is not None)

    def _needs_grading(self, rollout: Rollout, checks: Mapping[str, Check]) -> bool:
        """Returns whether a grader must decide. If not, sets the verdict."""
        check = checks.get(rollout.problem_id, "")
        rollout.verdict = None
        if rollout.finish_reason == "abort":
            _set(rollout, "wrong", "aborted")
        elif rollout.finish_reason == "length" and not self._config.verify_grade_truncated:
            _set(rollout, "wrong", "truncated")
        elif not isinstance(check, CodeTests) and not check.strip():
            _set(rollout, "unverifiable", "no gold answer")
        return rollout.verdict is None

    def _grade(
        self,
        to_grade: deque[Rollout],
        checks: Mapping[str, Check],
        max_in_flight: int,
        on_verdict: Callable[[], None],
    ) -> list[Rollout]:
        """Grades until the queue is empty. Returns [], or the rollouts in progress when the pool broke."""
        in_flight: dict[Future[Any], Rollout] = {}
        # Guards against a task that pebble loses: in this time every running task could exceed its deadline twice
        stalled_s = 60 + 4 * max((self._deadline_s(checks[r.problem_id]) for r in to_grade), default=0)
        try:
            while to_grade or in_flight:
                on_verdict()
                while to_grade and len(in_flight) < max_in_flight:
                    rollout = to_grade.popleft()
                    try:
                        in_flight[self._schedule(rollout, checks[rollout.problem_id])] = rollout
                    except RuntimeError:  # pebble raises this if the pool is broken
                        return [rollout, *in_flight.values()]
                done, _ = wait(in_flight, timeout=stalled_s, return_when=FIRST_COMPLETED)
                if not done:
                    return list(in_flight.values())
                for future in done:
                    try:
                        self._set_result(in_flight[future], checks, future)
                    except (BrokenProcessPool, CancelledError):
                        return list(in_flight.values())
                    del in_flight[future]
            return []
        except BaseException:  # includes Ctrl-C and the exceptions of on_verdict
            for future in in_flight:
                future.cancel()
            raise

    def _set_result(self, rollout: Rollout, checks: Mapping[str, Check], future: Future[Any]) -> None:
        try:
            _set(rollout, *future.result())
        except FutureTimeoutError:
            deadline_s = self._deadline_s(checks[rollout.problem_id])
            _set(rollout, "timeout", f"deadline of {deadline_s:g} s")
        except ProcessExpired as error:
            _set(rollout, "unverifiable", f"grader crashed, exit code {error.exitcode}")

    def _schedule(self, rollout: Rollout, check: Check) -> ProcessFuture:
        assert self._pool is not None, "VerifierPool must be used as a context manager"
        text = rollout.text[-self._config.verify_max_response_chars :]
        deadline_s = self._deadline_s(check)
        grader = partial(grade_program, config=self._config) if isinstance(check, CodeTests) else self._grader
        args = (grader, text, check, deadline_s + self._orphan_grace_s)
        return self._pool.schedule(grading_worker.grade, args=args, timeout=deadline_s)

    def _deadline_s(self, check: Check) -> float:
        """Returns the time after which the worker is killed. For a program, the sandbox's own deadline ends much earlier."""
        if not isinstance(check, CodeTests):
            return self._config.verify_timeout_s
        num_runs = len(check.cases) if check.style == "stdin" else 1
        return num_runs * self._config.verify_code_timeout_s + _SANDBOX_GRACE_S

    def _start(self) -> None:
        assert self._pool is None, "the pool has been started already"
        self._pool = ProcessPool(
            max_workers=self._num_workers,
            max_tasks=self._config.verify_max_tasks_per_worker,
            initializer=grading_worker.prepare,
            initargs=(self._config.verify_memory_mib * 2**20,),
            context=_IsolatedContext(
                [grading_worker.__name__, _module_of(self._grader), _module_of(grade_program)]
            ),
        )
        try:
            self._pool.schedule(grading_worker.is_ready).result(timeout=120)
        except (BrokenProcessPool, FutureTimeoutError, CancelledError, ProcessExpired) as error:
            self.close()
            raise RasftError(
                f"the verifier's workers do not start ({type(error).__name__}: {error}). See the output above for the "
                f"worker's own error. --verify-memory-mib {self._config.verify_memory_mib} may be too small."
            ) from error
        except BaseException:
            self.close()
            raise

    def _restart(self) -> None:
        self.close()
        self._start()


def _answer_grader(config: VerifyConfig) -> Grader:
    # Imported here because sympy takes seconds to load, and this process never calls the grader
    from megatron_rasft.verify.math_grading import grade_answer

    return partial(grade_answer, rel_tolerance=config.verify_numeric_rel_tolerance)


def _module_of(grader: Any) -> str:
    function = grader.func if isinstance(grader, partial) else grader
    return str(function.__module__)


def _set(rollout: Rollout, verdict: Verdict, reason: str) -> None:
    rollout.verdict, rollout.verdict_reason = verdict, reason


class _IsolatedProcess(ForkServerProcess):
    """A worker process that does not import the main script again.

    multiprocessing imports the parent's main script into every child that is not forked from the parent. For a trainer
    that would be torch and Megatron in each worker. Python has no option against this, but skips the import if ``__main__`` has
    neither a file nor a spec (multiprocessing/spawn.py, ``get_preparation_data``). So both are hidden while a child starts.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _hidden_main():
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]


class _IsolatedContext(ForkServerContext):
    """A multiprocessing context whose fork server loads some modules once for all workers.

    Args:
        preloaded: names of the modules. Ignored if this program has started the server before.
    """

    Process = _IsolatedProcess  # type: ignore[assignment]

    def __init__(self, preloaded: list[str]) -> None:
        super().__init__()
        self.set_forkserver_preload(preloaded)


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
