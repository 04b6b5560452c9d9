"""Grades the samples of a benchmark with the verifier of a training run."""

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.types import Rollout
from megatron_rasft.verify.pool import VerifierPool


def verify_config(config: EvaluationConfig, rel_tolerance: float = 0.0) -> VerifyConfig:
    """Returns the verifier's settings for an evaluation.

    Args:
        config: settings of the evaluation.
        rel_tolerance: relative difference up to which two plain numbers are equal.
    """
    return VerifyConfig(
        verify_timeout_s=config.verify_timeout_s,
        verify_num_workers=config.verify_num_workers,
        # As in the published harness, an answer counts if it was boxed before the response was truncated
        verify_grade_truncated=True,
        verify_numeric_rel_tolerance=rel_tolerance,
        verify_sandbox_level=config.sandbox_level,
        verify_code_timeout_s=config.code_timeout_s,
        verify_code_memory_mib=config.code_memory_mib,
        verify_code_output_mib=config.code_output_mib,
    )


class Grader(AbstractContextManager["Grader"]):
    """Grades the samples of one benchmark. Starts the verifier's workers when it is entered."""

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
        """Sets ``verdict`` and ``verdict_reason`` of every rollout. ``problems`` maps ids to problems."""
        self._pool.verify(rollouts, {name: problem.check for name, problem in problems.items()})
