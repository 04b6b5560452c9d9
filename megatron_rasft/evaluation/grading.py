"""Verdicts on the samples of a benchmark, by the verifier that a training run uses."""

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.evaluation.benchmarks import Benchmark, Problem
from megatron_rasft.types import Rollout
from megatron_rasft.verify.grading import grade_answer
from megatron_rasft.verify.pool import VerifierPool


class Grader(AbstractContextManager["Grader"]):
    """Grades the samples of one benchmark; owns the verifier's processes.

    Unlike a training run it grades truncated samples too, as the published harness does: what a model has boxed
    before it was cut counts.
    """

    def __init__(self, benchmark: Benchmark, timeout_s: float, num_workers: int) -> None:
        if benchmark.kind == "code":
            raise ValueError(
                f"--benchmarks {benchmark.name}: its programs must be run, and this version has no sandbox for that. "
                "Leave it out."
            )
        config = VerifyConfig(
            verify_timeout_s=timeout_s,
            verify_num_workers=num_workers,
            verify_grade_truncated=True,
            verify_numeric_rel_tolerance=benchmark.rel_tolerance,
        )
        self._pool = VerifierPool(config, partial(grade_answer, rel_tolerance=benchmark.rel_tolerance))
        self._exit = ExitStack()

    def __enter__(self) -> "Grader":
        self._exit.enter_context(self._pool)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def __call__(self, rollouts: list[Rollout], problems: dict[str, Problem]) -> None:
        """Set ``verdict`` and ``verdict_reason`` of every rollout."""
        self._pool.verify(rollouts, {name: problem.answer for name, problem in problems.items()})
