"""The figures of one training step, as metrics and as warnings."""

import math

from megatron_rasft import metrics
from megatron_rasft.training.trainer import StepResult


def step_values(result: StepResult, *, step_s: float, num_queued: int) -> dict[str, float]:
    """Returns metric name -> value.

    Args:
        step_s: duration of the whole step, seconds.
        num_queued: batches that are left in the queue.
    """
    values = {f"objective/{name}": value for name, value in result.metrics.items()}
    values |= {
        metrics.GRAD_NORM: result.grad_norm,
        metrics.LEARNING_RATE: result.learning_rate,
        metrics.MASS: result.batch.mass,
        metrics.NUM_SAMPLES: result.batch.num_samples,
        metrics.NUM_TOKENS: result.num_tokens,
        metrics.QUEUE: num_queued,
        metrics.STEP_S: step_s,
        metrics.DATA_S: result.data_s,
        metrics.FORWARD_BACKWARD_S: result.forward_backward_s,
        metrics.OPTIMIZER_S: result.optimizer_s,
        metrics.TOKENS_PER_S: result.num_tokens / step_s,
    }
    if result.rank_times is not None:
        values[metrics.SLOWEST_RANK_S] = result.rank_times.slowest_s
        values[metrics.MEDIAN_RANK_S] = result.rank_times.median_s
    if result.params_norm is not None:
        values[metrics.PARAMS_NORM] = result.params_norm
    # If the batch has no sample of a kind, there is no mean weight to report for it.
    for kind, name in (
        ("demonstration", metrics.DEMONSTRATION_WEIGHT),
        ("rollout", metrics.ROLLOUT_WEIGHT),
        ("wrong_rollout", metrics.WRONG_ROLLOUT_WEIGHT),
    ):
        if kind in result.batch.mean_weights:
            values[name] = result.batch.mean_weights[kind]
    return values


def gpu_tflop_per_s(result: StepResult, *, step_s: float, num_gpus: int) -> float:
    """Model FLOPs per second of one GPU, in units of 10^12, for --log-throughput."""
    return result.floating_point_operations / step_s / num_gpus / 1e12


def step_warning(iteration: int, result: StepResult) -> str:
    """Returns the warning to print after an unusual step; "" after an ordinary step."""
    if result.is_skipped:
        return f"step {iteration} changed no weight: {_why_skipped(result)}"
    if not math.isfinite(result.grad_norm):
        return f"step {iteration} trained on a gradient that is not finite"
    if result.metrics.get("kept_frac") == 0:
        return f"step {iteration} has no gradient: no token is above --objective-profit-threshold"
    return ""


def _why_skipped(result: StepResult) -> str:
    if not result.batch.num_samples:
        return "its problems have no training samples"
    return "its gradient norm is above --grad-norm-skip-threshold, or not finite"
