"""The recommended layout is a usual one; impossible flags are refused in one line with a way out."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.tools.capacity.choosing import LayoutEstimate, estimate_layouts, nothing_fits
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model
from tests.tiny_models import write_folder


def estimates(
    model: Model, precision: str = "bf16", **given: Any
) -> tuple[list[LayoutEstimate], CapacityConfig]:
    config = CapacityConfig(**{"num_gpus": 64, **given})
    return estimate_layouts(model, config, AssumptionConfig(), precision=precision), config


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_70b_on_64_gpus_is_split_as_engineers_do(llama_70b: Model, precision: str) -> None:
    found, config = estimates(llama_70b, precision)
    best = found[0].layout
    assert found[0].excess_gib(config) <= 0
    assert best.tp in (4, 8) and 2 <= best.pp <= 8 and best.cp <= 2
    assert found[0].rollout_gpus in (16, 24, 32)
    assert 0.25 < found[0].step.mfu < 0.45 if precision == "bf16" else 0.15 < found[0].step.mfu < 0.27
    hours = [estimate.run.hours for estimate in found if estimate.excess_gib(config) <= 0]
    assert hours == sorted(hours)


def test_8b_on_one_node_needs_no_pipeline(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parent / "llama-3.1-70b" / "config.json").read_text())
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    model = Model.read(tmp_path)
    found, given = estimates(model, num_gpus=8)
    assert nothing_fits(found, model, given, AssumptionConfig()) is None
    assert found[0].layout.pp <= 2 and found[0].layout.tp <= 4


def test_mixture_samples_from_servers_where_its_experts_are_spread(tmp_path: Path) -> None:
    model = Model.read(write_folder("mixtral", tmp_path / "mixtral"))
    found, _ = estimates(model, num_gpus=8)
    assert {estimate.layout.ep for estimate in found} == {1, 2, 4}
    assert all(estimate.rollout_gpus > 0 for estimate in found if estimate.layout.ep > 1)


def test_objective_without_rollouts_trains_on_every_gpu(llama_70b: Model) -> None:
    found, _ = estimates(llama_70b, objective="sft")
    assert {estimate.rollout_gpus for estimate in found} == {0}
    assert found[0].refresh.total_s == 0 and found[0].memory.host == 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"seq_length": 262144}, "--seq-length 262144 .* 131072"),
        ({"num_gpus": 12}, "--num-gpus 12 .* --gpus-per-node 8"),
        ({"tensor_model_parallel_size": 3}, "--tensor-model-parallel-size 3 .* --gpus-per-node 8"),
        ({"pipeline_model_parallel_size": 7}, "--pipeline-model-parallel-size 7 .* 80 layers"),
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2 .* 0 experts"),
        ({"rollout_gpus": 16}, "--global-batch-size 256 .* 48 GPUs .* 25[58]"),
        ({"rollout_gpus": 6}, "--rollout-gpus 6 .* 4 GPUs .* 8"),
        ({"rollout_gpus": 20}, "--rollout-gpus 20 .* 44 GPUs .* 24"),
        ({"rollout_gpus": 16, "objective": "sft"}, "--objective sft .* --rollout-gpus 16"),
        ({"rollout_gpus": 16, "gpu_memory_gib": 16}, "131 GiB .* 8 GPUs.* --rollout-gpus 0"),
        (
            {"num_gpus": 8, "rollout_gpus": 4, "tensor_model_parallel_size": 8},
            "--tensor-model-parallel-size 8: .* --num-gpus 12",
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 7},
            "64 training GPUs .*--num-layers-per-virtual-pipeline-stage 7",
        ),
        ({"gpus_per_node": 6, "num_gpus": 6, "tensor_model_parallel_size": 6}, "--rasft-query-groups 12"),
    ],
)
def test_impossible_flags_are_refused_by_name(llama_70b: Model, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        estimates(llama_70b, **given)
    assert "\n" not in str(caught.value)


def test_nothing_fits_says_by_how_much_and_what_to_change(llama_70b: Model) -> None:
    found, config = estimates(
        llama_70b,
        num_gpus=32,
        objective="sft",
        seq_length=40960,
        recompute="selective",
        context_parallel_size=1,
    )
    message = nothing_fits(found, llama_70b, config, AssumptionConfig())
    assert message is not None and "\n" not in message
    assert f"{found[0].excess_gib(config):.1f} too much" in message
    assert "--recompute full" in message and "a shorter --seq-length" in message
    found, _ = estimates(
        llama_70b, num_gpus=32, objective="sft", seq_length=40960, recompute="full", context_parallel_size=1
    )
    assert found[0].excess_gib(config) <= 0


def test_more_gpus_are_named_where_they_are_enough(llama_70b: Model) -> None:
    found, config = estimates(llama_70b, num_gpus=8)
    message = nothing_fits(found, llama_70b, config, AssumptionConfig())
    assert message is not None
    enough = int(message.split("--num-gpus ")[1].split(",")[0])
    found, larger = estimates(llama_70b, num_gpus=enough)
    assert found[0].excess_gib(larger) <= 0
    found, smaller = estimates(llama_70b, num_gpus=enough // 2)
    assert found[0].excess_gib(smaller) > 0
