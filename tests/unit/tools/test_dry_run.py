"""A dry run: its memory is that of capacity planning for the run's own layout, objective and data. It asks no server."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.config import RasftConfig
from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.tools import dry_run
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model
from megatron_rasft.tools.capacity.memory import estimate_memory
from megatron_rasft.tools.dry_run import check_place, run_memory

LLAMA_70B = Path(__file__).with_name("capacity") / "llama-3.1-70b"


def args_of(**changes: Any) -> Any:
    """64 GPUs: 2 replicas of 8 x 4."""
    values: dict[str, Any] = {
        "world_size": 64,
        "data_parallel_size": 2,
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 4,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "virtual_pipeline_model_parallel_size": None,
        "recompute_granularity": "full",
        "seq_length": 4096,
        "micro_batch_size": 1,
        "global_batch_size": 64,
        "fp8": None,
        "distributed_backend": "nccl",
        "params_dtype": "torch.bfloat16",
    }
    return SimpleNamespace(**values | changes)


PROBLEMS: Any = SimpleNamespace(
    rows=SimpleNamespace(report=SimpleNamespace(num_prompt_tokens=2000, num_demonstrations=10))
)


@pytest.mark.parametrize("objective", ["rasft", "sft_kl"])
def test_memory_is_that_of_the_runs_layout(objective: str) -> None:
    model = Model.read(LLAMA_70B)
    config = RasftConfig(objective=OBJECTIVES[objective]())
    expected = estimate_memory(
        model,
        Layout(tp=8, pp=4, cp=1, dp=2, expert_tp=8, recompute="full"),
        CapacityConfig(
            num_gpus=64, objective=objective, seq_length=4096, global_batch_size=64, max_new_tokens=1024
        ),
        AssumptionConfig(prompt_tokens=200),
        num_microbatches=32,
        uses_servers=False,
        samples=objective == "rasft",
    )
    assert run_memory(args_of(), config, PROBLEMS, model) == expected
    assert (expected.reference > 0) == (objective == "sft_kl")


def test_memory_on_a_cpu_is_that_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.read(LLAMA_70B)
    on_gpu = run_memory(args_of(), RasftConfig(), PROBLEMS, model)
    on_cpu = run_memory(args_of(distributed_backend="gloo"), RasftConfig(), PROBLEMS, model)
    assert on_cpu.margin == 0 < on_gpu.margin and on_cpu.total == on_gpu.total - on_gpu.margin
    monkeypatch.setattr(Model, "read", classmethod(lambda *_: model))
    first, *others = dry_run._memory_lines(
        args_of(distributed_backend="gloo", hf_model="model"), RasftConfig(), PROBLEMS
    )
    assert "GPU" not in first and "left free" not in first and "largest process" in first
    assert any("64 processes" in line for line in others)
    assert "GPU" in next(dry_run._memory_lines(args_of(hf_model="model"), RasftConfig(), PROBLEMS))


def test_servers_are_said_to_be_left_alone() -> None:
    served = RasftConfig(rollout=RolloutConfig(rollout_engine="sglang", rollout_urls=["http://server:1"]))
    assert any("check_servers.py" in line for line in dry_run._server_lines(served))
    assert not [*dry_run._server_lines(RasftConfig())]


def test_a_place_that_cannot_be_written_is_found_without_writing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("new/folder", ""):
        check_place("--save", tmp_path / path, is_folder=True)
    for path in ("new/file", "file"):
        check_place("--rasft-metrics", tmp_path / path, is_folder=False)
    for flag, path in (("--save", "file/folder"), ("--save", "file"), ("--rasft-metrics", "file/new")):
        with pytest.raises(ValueError, match=rf"{flag} .*{path}.*file\."):
            check_place(flag, tmp_path / path, is_folder=flag == "--save")
    with pytest.raises(ValueError, match="--rasft-metrics"):
        check_place("--rasft-metrics", tmp_path, is_folder=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
