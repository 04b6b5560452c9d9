"""Calls --verify-function once before anything heavy is built, so that a faulty function fails at the start."""

from dataclasses import replace

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import ProblemRow, Rollout
from megatron_rasft.verify.own_function import FAILED
from megatron_rasft.verify.pool import VerifierPool

_FAILURES = (FAILED, "grader ")
"""Starts of reasons that the pool gives if the function raised, or ended its worker."""


def try_function(config: VerifyConfig, row: ProblemRow, response: str, source: str) -> str:
    """Grades one response with ``config.verify_function`` in a worker, as a run does. Returns verdict and reason as text.

    Args:
        row: all fields of a row.
        response: usually the solution in the row.
        source: place of the row, for the message.

    Raises:
        ValueError: the function cannot be loaded, takes other arguments, raises, exceeds its deadline, or returns something that is
            not a judgement.
        RasftError: the worker cannot be started.
    """
    rollout = Rollout.of_text("", response)
    with VerifierPool(replace(config, verify_num_workers=1)) as pool:
        pool.verify([rollout], {rollout.problem_id: row}, warns=False)
    reason = rollout.verdict_reason
    if rollout.verdict == "timeout":
        raise ValueError(
            f"--verify-function {config.verify_function} gave no verdict on the first row ({source}): {reason}. Make it faster, or "
            f"raise --verify-timeout-s {config.verify_timeout_s:g}."
        )
    if failed(rollout):
        raise ValueError(
            f"--verify-function {config.verify_function} failed on the first row ({source}): {reason.removeprefix(FAILED)}. "
            "Correct the function."
        )
    return f"{rollout.verdict} ({reason})"


def failed(rollout: Rollout) -> bool:
    """Returns whether --verify-function raised, returned something that is not a judgement, or ended its worker."""
    return rollout.verdict_reason.startswith(_FAILURES)
