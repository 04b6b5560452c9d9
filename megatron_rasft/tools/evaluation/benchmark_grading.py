"""Grades the samples of a benchmark with the verifier of a training run."""

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.types import Rollout
from megatron_rasft.verify.function_trial import try_function
from megatron_rasft.verify.own_function import find_function
from megatron_rasft.verify.pool import VerifierPool


def verify_config(config: EvaluationConfig, rel_tolerance: float = 0.0) -> VerifyConfig:
    """Returns the verifier's settings for an evaluation.

    Args:
        config: settings of the evaluation.
        rel_tolerance: relative difference up to which two plain numbers are equal.
    """
    return VerifyConfig(
        verify_function=config.verify_function,
        verify_correct_reward=config.verify_correct_reward,
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


def graded_by(config: EvaluationConfig) -> str | None:
    """Identifies the function that grades, by its code, and its threshold; None without --verify-function."""
    if config.verify_function is None:
        return None
    digest = find_function(config.verify_function).digest
    return f"{config.verify_function} (sha256 {digest}, correct from {config.verify_correct_reward:g})"


def try_function_on(benchmark: Benchmark, config: EvaluationConfig) -> None:
    """Calls --verify-function with the first row and its solution, if it has one, so that a faulty function fails at the start."""
    row = benchmark.problems[0].fields
    assert row is not None, "rows are kept for --verify-function"
    solution = row.get("response") or row.get("solution") or ""
    try_function(verify_config(config), row, str(solution), str(benchmark.path))


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
        """Sets ``verdict``, ``verdict_reason`` and ``reward`` of every rollout. ``problems`` maps ids to problems."""
        self._pool.verify(rollouts, {name: problem.check for name, problem in problems.items()})
