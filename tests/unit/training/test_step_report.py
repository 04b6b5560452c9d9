"""The figures of a step, from a plain result."""

import math
from typing import Any

import pytest

from megatron_rasft import metrics
from megatron_rasft.monitoring.stragglers import StepTimes
from megatron_rasft.training.batches import BatchFacts
from megatron_rasft.training.step_report import gpu_tflop_per_s, step_values, step_warning
from megatron_rasft.training.trainer import StepResult


def result_of(
    *, num_samples: int = 3, mean_weights: dict[str, float] | None = None, **changes: Any
) -> StepResult:
    """A step of 3 samples with 100 tokens."""
    facts = BatchFacts(
        num_problems=2,
        num_samples=num_samples,
        num_tokens=100,
        num_counted=60,
        squared_tokens=0,
        mass=0.7,
        mean_weights=mean_weights or {},
    )
    values: dict[str, Any] = {
        "metrics": {"loss": 0.5},
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "is_skipped": False,
        "batch": facts,
    }
    return StepResult(**values | changes)


def test_a_steps_figures_get_their_names() -> None:
    result = result_of(
        mean_weights={"demonstration": 0.9}, data_s=0.1, forward_backward_s=1.5, optimizer_s=0.2
    )
    assert step_values(result, step_s=2.0, num_queued=7) == {
        metrics.LOSS: 0.5,
        metrics.GRAD_NORM: 1.0,
        metrics.LEARNING_RATE: 0.1,
        metrics.MASS: 0.7,
        metrics.NUM_SAMPLES: 3,
        metrics.NUM_TOKENS: 100,
        metrics.QUEUE: 7,
        metrics.STEP_S: 2.0,
        metrics.DATA_S: 0.1,
        metrics.FORWARD_BACKWARD_S: 1.5,
        metrics.OPTIMIZER_S: 0.2,
        metrics.TOKENS_PER_S: 50.0,
        metrics.DEMONSTRATION_WEIGHT: 0.9,
    }


def test_the_own_times_of_the_ranks_are_metrics() -> None:
    times = StepTimes(slowest_s=3.0, median_s=2.0, stragglers="")
    values = step_values(result_of(rank_times=times), step_s=4.0, num_queued=0)
    assert (values[metrics.SLOWEST_RANK_S], values[metrics.MEDIAN_RANK_S]) == (3.0, 2.0)


def test_the_norm_of_the_parameters_is_there_if_it_was_computed() -> None:
    assert metrics.PARAMS_NORM not in step_values(result_of(), step_s=1.0, num_queued=0)
    assert step_values(result_of(params_norm=3.0), step_s=1.0, num_queued=0)[metrics.PARAMS_NORM] == 3.0


def test_a_step_in_which_profit_trains_no_token_is_named() -> None:
    result = result_of(metrics={"loss": math.nan, "kept_frac": 0.0})
    assert "--objective-profit-threshold" in step_warning(4, result)
    assert not step_warning(4, result_of(metrics={"loss": 0.1, "kept_frac": 0.1}))


def test_throughput_is_that_of_one_gpu() -> None:
    assert gpu_tflop_per_s(result_of(floating_point_operations=8e12), step_s=2.0, num_gpus=4) == 1.0


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (result_of(), ""),
        (result_of(is_skipped=True, num_samples=0), "no training samples"),
        (result_of(is_skipped=True), "--grad-norm-skip-threshold"),
        (result_of(grad_norm=math.nan), "not finite"),
    ],
    ids=["ordinary", "no sample", "skipped", "not finite"],
)
def test_an_unusual_step_is_explained(result: StepResult, reason: str) -> None:
    warning = step_warning(4, result)
    assert reason in warning and bool(warning) == bool(reason) == ("step 4" in warning)
