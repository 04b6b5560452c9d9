"""Verdicts on the samples of a benchmark, by the verifier that a training run uses."""

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.tools.evaluation.benchmarks import Benchmark, Problem
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.types import Rollout
from megatron_rasft.verify.pool import VerifierPool


def verify_config(config: EvaluationConfig, rel_tolerance: float = 0.0) -> VerifyConfig:
    """The verifier's knobs of an evaluation."""
    return VerifyConfig(
        verify_timeout_s=config.verify_timeout_s,
        verify_num_workers=config.verify_num_workers,
        verify_grade_truncated=True,
        verify_numeric_rel_tolerance=rel_tolerance,
        verify_sandbox_level=config.sandbox_level,
        verify_code_timeout_s=config.code_timeout_s,
        verify_code_memory_mib=config.code_memory_mib,
        verify_code_output_mib=config.code_output_mib,
    )


class Grader(AbstractContextManager["Grader"]):
    """Grades the samples of one benchmark; owns the verifier's processes.

    Unlike a training run it grades truncated samples too, as the published harness does: what a model has boxed
    before it was cut counts.
    """

    def __init__(self, benchmark: Benchmark, config: EvaluationConfig) -> None:
        self._pool = VerifierPool(verify_config(config, benchmark.rel_tolerance))
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
        self._pool.verify(rollouts, {name: problem.check for name, problem in problems.items()})
