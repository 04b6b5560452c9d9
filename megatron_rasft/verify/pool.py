"""Grades rollouts in worker processes that can be killed. The trainer itself never parses a response."""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.errors import RasftError
from megatron_rasft.reasoning_tags import open_tag
from megatron_rasft.types import Check, CodeTests, Rollout, Verdict
from megatron_rasft.verify import grading_worker, own_function
from megatron_rasft.verify.grading_order import GIVEN_UP, GradingOrder, Turn
from megatron_rasft.verify.isolated_workers import IsolatedContext
from megatron_rasft.verify.programs.program_grading import grade_program
from megatron_rasft.wording import counted

logger = logging.getLogger(__name__)

Grader = Callable[[str, Any], tuple[Verdict, str] | tuple[Verdict, str, float | None]]
"""``(response text, gold answer or row) -> (verdict, reason)``, or with a reward as the third: a module-level function or a
``functools.partial`` of one."""

# A worker whose check runs in a sandbox is killed this long after the deadline that the sandbox itself enforces
_SANDBOX_GRACE_S = 60.0
# Answers that take longer than this are graded after all others, with the whole deadline. Most take a few
# milliseconds. The first one of a new worker takes up to half a second
_FIRST_ROUND_SHARE = 0.05
_FIRST_ROUND_MIN_S = 0.5
# If the pool breaks more often in one call, rollouts are graded one at a time, which shows the one that breaks it
_MAX_BROKEN_POOLS = 2
# Seconds between two calls of ``on_verdict`` while no grading ends
_CHECK_S = 5.0


@dataclass
class _Call:
    """The state of one call of ``verify``."""

    order: GradingOrder
    checks: Mapping[str, Check]
    on_verdict: Callable[[], None]
    is_last_round: bool = False
    num_broken: int = 0
    """How often the workers broke."""


class VerifierPool:
    """Workers that grade rollouts. Each rollout has its own deadline and memory limit.

    Workers are forked from a server process that has loaded the grader but neither torch nor the main script. So they
    start in milliseconds and hold none of the trainer's memory. They end with the parent, also if it is
    killed while they grade. Programs do not run in a worker but in a sandbox that it starts.

    Use it as a context manager. It may be entered again after it was left.
    """

    def __init__(
        self, config: VerifyConfig, grader: Grader | None = None, orphan_grace_s: float = 5.0
    ) -> None:
        """Creates a pool without starting its workers.

        Args:
            config: limits, number of workers, sandbox.
            grader: replaces ``grade_answer``. It must be importable in a worker. Programs are always graded by
                ``grade_program``, and rows by ``verify_function``.
            orphan_grace_s: a worker kills itself this long after its deadline, seconds. Until then its parent should have
                killed it.

        Raises:
            ValueError: the file or entry point of ``verify_function`` cannot be read.
        """
        self._config = config
        self.function = (
            None if config.verify_function is None else own_function.find_function(config.verify_function)
        )
        """The function of --verify-function; None without this flag."""
        self._grader = grader or _answer_grader(config, self.function)
        self._orphan_grace_s = orphan_grace_s
        self._num_workers = config.verify_num_workers or max(1, len(os.sched_getaffinity(0)) // 2)
        self._locks: list[Any] = []
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
            self._locks.clear()

    def verify(
        self,
        rollouts: Sequence[Rollout],
        checks: Mapping[str, Check],
        on_verdict: Callable[[], None] = lambda: None,
        warns: bool = True,
    ) -> Counter[Verdict]:
        """Sets ``verdict``, ``verdict_reason`` and ``reward`` of every rollout, and counts the verdicts.

        Aborted rollouts are ``wrong`` without being graded. So are truncated rollouts, unless ``verify_grade_truncated`` is set.
        A problem without gold answer gives ``unverifiable``. A grader that exceeds its deadline gives ``timeout``. A grader that
        crashes gives ``unverifiable``. Other rollouts are not affected.

        Equal responses to a problem are graded once and get the same verdict. Answers whose grading is slow are graded after all others. A rollout is not graded but gets ``timeout`` if the gradings
        before it hang: ``GradingOrder`` has the rules.

        Args:
            rollouts: changed in place. Earlier verdicts are overwritten.
            checks: gold answer, tests or row of each problem, by problem id.
            on_verdict: called before the first and after every verdict, and every few seconds without one, for example to check for
                signals. If it raises, the call ends with that exception and the gradings in progress are cancelled.
            warns: whether to log how many gradings hang or fail.

        Raises:
            RasftError: workers cannot be started.
        """
        graded = [rollout for rollout in rollouts if self._needs_grading(rollout, checks)]
        first_of: dict[tuple[str, str], Rollout] = {}
        for rollout in graded:
            first_of.setdefault((rollout.problem_id, rollout.text), rollout)
        to_grade = list(first_of.values())
        order = GradingOrder(
            to_grade, self._config.verify_timeouts_per_problem, self._config.verify_max_timeouts
        )
        call = _Call(order, checks, on_verdict)
        order.start_round([r for r in to_grade if self._has_first_round(checks[r.problem_id])], is_last=False)
        self._grade_round(call)
        call.is_last_round = True
        order.start_round([r for r in to_grade if r.verdict is None], is_last=True)
        self._grade_round(call)
        for rollout in graded:
            first = first_of[rollout.problem_id, rollout.text]
            assert first.verdict is not None, "a rollout has no verdict"
            _set(rollout, first.verdict, first.verdict_reason, first.reward)
        if warns:
            _warn_of_timeouts(graded)
            _warn_of_failures(graded)
        return Counter(r.verdict for r in rollouts if r.verdict is not None)

    def _needs_grading(self, rollout: Rollout, checks: Mapping[str, Check]) -> bool:
        """Returns whether a grader must decide. If not, sets the verdict."""
        check = checks.get(rollout.problem_id, "")
        rollout.verdict = rollout.reward = None
        if rollout.finish_reason == "abort":
            _set(rollout, "wrong", "aborted")
        elif rollout.finish_reason == "length" and not self._config.verify_grade_truncated:
            _set(rollout, "wrong", "truncated")
        elif isinstance(check, str) and not check.strip():
            _set(rollout, "unverifiable", "no gold answer")
        return rollout.verdict is None

    def _grade_round(self, call: "_Call") -> None:
        """Grades until the queue is empty. Replaces the workers if they break."""
        while call.order:
            max_in_flight = 2 * self._num_workers if call.num_broken <= _MAX_BROKEN_POOLS else 1
            unfinished = self._grade(call, max_in_flight)
            if unfinished:
                call.num_broken += 1
                logger.warning(
                    "verifier workers crashed (%d. time in this call): starting new workers", call.num_broken
                )
                if max_in_flight == 1:
                    _set(unfinished[0], "unverifiable", "grader broke the worker pool")
                    call.order.settle(unfinished.pop(0), is_late=False)
                call.order.put_back(unfinished)
                self._restart()

    def _grade(self, call: "_Call", max_in_flight: int) -> list[Rollout]:
        """Grades until the queue is empty. Returns [], or the rollouts in progress when the pool broke."""
        in_flight: dict[Future[Any], Rollout] = {}
        # Guards against a task that pebble loses: in this time every running task could exceed its deadline twice
        stalled_s = 60 + 4 * max(map(self._deadline_s, call.checks.values()), default=0)
        try:
            while call.order or in_flight:
                call.on_verdict()
                while len(in_flight) < max_in_flight and (rollout := self._next(call, len(in_flight))):
                    try:
                        in_flight[self._schedule(rollout, call)] = rollout
                    except RuntimeError:  # pebble raises this if the pool is broken
                        return [rollout, *in_flight.values()]
                done = _wait_for_one(in_flight, stalled_s, call.on_verdict)
                if in_flight and not done:
                    return list(in_flight.values())
                for future in done:
                    try:
                        self._settle(in_flight[future], call, future)
                    except (BrokenProcessPool, CancelledError):
                        return list(in_flight.values())
                    del in_flight[future]
            return []
        except BaseException:  # includes Ctrl-C and the exceptions of on_verdict
            for future in in_flight:
                future.cancel()
            raise

    def _next(self, call: "_Call", num_in_flight: int) -> Rollout | None:
        """Returns the next rollout to grade, or None if there is none at present. Gives up those before it that must not be graded."""
        while call.order:
            turn = call.order.turn(num_in_flight)
            if turn == "grade":
                return call.order.take()
            if turn == "wait":
                return None
            rollout = call.order.give_up()
            if call.is_last_round:
                _set(rollout, "timeout", GIVEN_UP + self._why(turn))
        return None

    def _why(self, turn: Turn) -> str:
        if turn == "give up":
            return f"the {self._config.verify_timeouts_per_problem} responses before it exceeded the deadline"
        return f"{counted(self._config.verify_max_timeouts, 'response')} exceeded the deadline"

    def _settle(self, rollout: Rollout, call: "_Call", future: Future[Any]) -> None:
        """Sets the verdict, unless the rollout was slow in the first round."""
        is_late = False
        try:
            _set(rollout, *future.result())
        except FutureTimeoutError:
            is_late = True
        except ProcessExpired as error:
            # A worker that is not killed at its deadline kills itself a little later
            is_late = error.exitcode == -signal.SIGALRM
            if not is_late:
                _set(rollout, "unverifiable", f"grader crashed, exit code {error.exitcode}")
        call.order.settle(rollout, is_late)
        if is_late and call.is_last_round:
            _set(rollout, "timeout", f"deadline of {self._deadline_s(call.checks[rollout.problem_id]):g} s")

    def _schedule(self, rollout: Rollout, call: "_Call") -> ProcessFuture:
        assert self._pool is not None, "VerifierPool must be used as a context manager"
        check = call.checks[rollout.problem_id]
        text = end_of_response(rollout.text, self._config.verify_max_response_chars)
        deadline_s = self._deadline_s(check) if call.is_last_round else self._first_deadline_s
        grader = partial(grade_program, config=self._config) if isinstance(check, CodeTests) else self._grader
        args = (grader, text, check, deadline_s + self._orphan_grace_s)
        return self._pool.schedule(grading_worker.grade, args=args, timeout=deadline_s)

    @property
    def _first_deadline_s(self) -> float:
        return max(_FIRST_ROUND_MIN_S, _FIRST_ROUND_SHARE * self._config.verify_timeout_s)

    def _has_first_round(self, check: Check) -> bool:
        """Returns whether a check is tried with a short deadline first. Programs and own functions take long even if nothing hangs."""
        return isinstance(check, str) and self._first_deadline_s < self._config.verify_timeout_s

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
            initargs=(self._config.verify_memory_mib * 2**20, self.function),
            context=IsolatedContext(
                [grading_worker.__name__, _module_of(self._grader), _module_of(grade_program)], self._locks
            ),
        )
        try:
            self._pool.schedule(grading_worker.is_ready).result(timeout=120)
        except (BrokenProcessPool, FutureTimeoutError, CancelledError, ProcessExpired) as error:
            self.close()
            raise RasftError(
                f"the verifier's workers do not start ({type(error).__name__}: {error}). See the output above for the "
                f"worker's own error. --verify-memory-mib {self._config.verify_memory_mib} may be too small, or the code of "
                "--verify-function does not end."
            ) from error
        except BaseException:
            self.close()
            raise

    def _restart(self) -> None:
        self.close()
        self._start()


def _wait_for_one(
    futures: Collection[Future[Any]], timeout_s: float, meanwhile: Callable[[], None]
) -> set[Future[Any]]:
    """Waits until a future has ended, and calls ``meanwhile`` every few seconds. Returns those that have ended; none after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        done, _ = wait(futures, timeout=min(_CHECK_S, max(0.0, left_s)), return_when=FIRST_COMPLETED)
        if done or left_s <= 0 or not futures:
            return done
        meanwhile()


def _answer_grader(config: VerifyConfig, function: own_function.OwnFunction | None) -> Grader:
    if function is not None:
        return partial(
            own_function.grade_by_function, function=function, correct_reward=config.verify_correct_reward
        )
    # Imported here because sympy takes seconds to load, and this process never calls the grader
    from megatron_rasft.verify.mathematics.answer_grading import grade_answer

    return partial(grade_answer, rel_tolerance=config.verify_numeric_rel_tolerance)


def end_of_response(text: str, num_chars: int) -> str:
    """Returns the end of a response. If the rest opened a block of reasoning and did not close it, the end keeps the tag."""
    return open_tag(text[:-num_chars]) + text[-num_chars:]


def _module_of(grader: Any) -> str:
    function = grader.func if isinstance(grader, partial) else grader
    return str(function.__module__)


def _warn_of_timeouts(rollouts: Sequence[Rollout]) -> None:
    reasons = [rollout.verdict_reason for rollout in rollouts if rollout.verdict == "timeout"]
    num_given_up = sum(reason.startswith(GIVEN_UP) for reason in reasons)
    if num_given_up:
        logger.warning(
            "gradings hang: %d responses exceeded their deadline, and %d were not graded because of them "
            "(--verify-timeouts-per-problem, --verify-max-timeouts)",
            len(reasons) - num_given_up,
            num_given_up,
        )


def _warn_of_failures(rollouts: Sequence[Rollout]) -> None:
    reasons = [r.verdict_reason for r in rollouts if r.verdict_reason.startswith(own_function.FAILED)]
    if reasons:
        logger.warning(
            "--verify-function failed for %d of %d responses, which are unverifiable. The first: %s",
            len(reasons),
            len(rollouts),
            reasons[0].removeprefix(own_function.FAILED),
        )


def _set(rollout: Rollout, verdict: Verdict, reason: str, reward: float | None = None) -> None:
    rollout.verdict, rollout.verdict_reason, rollout.reward = verdict, reason, reward
