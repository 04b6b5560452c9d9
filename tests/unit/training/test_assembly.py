"""The parts of a run that follow from its arguments alone; whole runs are built in tests/functional."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rasft.objective.families.likelihood import Sft
from megatron_rasft.training.assembly import describe_run, open_cache
from megatron_rasft.types import TrainingSample
from tests.unit.training.stand_ins import config_of


def args_of(**changes: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = {
        "save": None,
        "params_dtype": torch.bfloat16,
        "fp8": None,
        "fp8_recipe": "tensorwise",
        "hf_model": "model",
        "train_iters": 8,
        "global_batch_size": 4,
        "world_size": 2,
        "distributed_backend": "gloo",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
    }
    return SimpleNamespace(**defaults | changes)


def sample() -> TrainingSample:
    return TrainingSample(problem_id="p", kind="demonstration", prompt_ids=[1], response_ids=[2], weight=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"initial_weights": "others"},
        {"params_dtype": torch.float32},
        {"fp8": "hybrid"},
        {"fp8": "hybrid", "fp8_recipe": "delayed"},
    ],
    ids=["weights", "dtype", "fp8", "fp8 recipe"],
)
def test_reference_log_probabilities_are_not_shared_between_weights_or_precisions(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    def known(initial_weights: str = "weights", **flags: Any) -> bool:
        cache = open_cache(args_of(save=str(tmp_path), **flags), config_of(), initial_weights)
        assert cache is not None
        return not cache.fill([sample()])

    cache = open_cache(args_of(save=str(tmp_path)), config_of(), "weights")
    assert cache is not None
    cache.add([sample()], [[-0.5]])
    assert known()
    assert not known(**changes)


def test_an_objective_without_a_reference_has_no_cache() -> None:
    assert open_cache(args_of(), config_of(objective=Sft()), "weights") is None


def test_the_first_line_names_objective_model_length_and_layout() -> None:
    line = describe_run(args_of(), config_of(), 40)
    parts = ("rasft", "model", "40 problems", "8 steps of 4", "2 CPU", "tp 2", "bfloat16")
    assert all(part in line for part in parts)
    assert "2 GPU" in describe_run(args_of(distributed_backend="nccl"), config_of(), 40)
