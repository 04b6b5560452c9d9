"""The programs accept the commands that are printed for them."""

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.machine import cpu_backend
from megatron_rasft.tools.capacity.choosing import LayoutEstimate, estimate_layouts
from megatron_rasft.tools.capacity.commands import command_lines, training_flags
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model

cpu_backend.enable()

from megatron_rasft.model import model_source  # noqa: E402
from megatron_rasft.training import startup  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from tests.tiny_models import write_folder  # noqa: E402
from tools import serve_node, serve_rollouts  # noqa: E402


def first(model: Model, precision: str = "bf16", **given: Any) -> tuple[LayoutEstimate, CapacityConfig]:
    config = CapacityConfig(**{"num_gpus": 64, **given})
    return estimate_layouts(model, config, AssumptionConfig(), precision=precision)[0], config


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"recompute": "full", "context_parallel_size": 2, "rollout_lag": 1},
        {
            "recompute": "selective",
            "pipeline_model_parallel_size": 4,
            "num_layers_per_virtual_pipeline_stage": 5,
        },
        {"objective": "sft_kl", "save_interval": 0},
        {"rollout_gpus": 0, "rasft_query_groups": 16},
    ],
    ids=str,
)
def test_run_accepts_its_flags(
    llama_70b: Model, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    model = Model.read(Path(llama_70b.path), given.get("rasft_query_groups"))
    accepted(model, *first(model, **given), monkeypatch)


def test_run_of_a_mixture_accepts_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.read(write_folder("mixtral", tmp_path / "mixtral"))
    short = {"seq_length": 2048, "max_new_tokens": 1024}
    for given in (
        {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2},
        {"recompute": "selective"},
    ):
        accepted(model, *first(model, num_gpus=16, **short, **given), monkeypatch)


def accepted(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that startup.parse accepts the flags and reads the same layout from them."""
    monkeypatch.setattr(model_source.HfFolder, "open", partial(HfFolder.open, with_weights=False))
    monkeypatch.setenv("WORLD_SIZE", str(estimate.layout.num_gpus))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["pretrain_rasft.py"])
    args, run, _ = startup.parse(training_flags(model, estimate, config))
    at = estimate.layout
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (at.tp, at.pp)
    assert (args.context_parallel_size, args.expert_model_parallel_size) == (at.cp, at.ep)
    assert args.data_parallel_size == at.dp and args.expert_tensor_parallel_size == at.expert_tp
    assert (args.virtual_pipeline_model_parallel_size or 1) == at.chunks
    assert args.sequence_parallel == (at.tp > 1)
    assert (args.recompute_granularity or "none") == at.recompute
    assert args.use_distributed_optimizer and args.accumulate_allreduce_grads_in_fp32 and args.bf16
    assert run.rollout.rollout_engine == ("sglang" if estimate.rollout_gpus else "embedded")


def test_fp8_flags_are_known(llama_70b: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU startup.parse refuses FP8, but only after it has parsed all flags."""
    estimate, config = first(llama_70b, "fp8")
    monkeypatch.setattr(model_source.HfFolder, "open", partial(HfFolder.open, with_weights=False))
    monkeypatch.setenv("WORLD_SIZE", str(estimate.layout.num_gpus))
    monkeypatch.setattr("sys.argv", ["pretrain_rasft.py"])
    with pytest.raises(ValueError, match="--fp8-format needs"):
        startup.parse(training_flags(llama_70b, estimate, config, precision="fp8"))


PROGRAMS = {
    # each writes its arguments to a file of its name; srun runs its command, after its own flags
    "srun": 'echo "$@" >>"$CALLS/srun"; while [ $# != 0 ]; do case $1 in python | torchrun) exec "$@" ;; esac; shift; done',
    "torchrun": 'printf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$@" >"$CALLS/torchrun"',
    "python": 'printf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$@" >"$CALLS/python"',
    "scontrol": "echo n1; echo n2",
}


@pytest.mark.parametrize(
    ("given", "sruns"),
    [
        (
            {"rollout_gpus": 32},
            ["--nodes 4 --relative 4 --ntasks-per-node 1", "--nodes 4 --ntasks-per-node 1"],
        ),
        ({"num_gpus": 8, "recompute": "full", "rollout_gpus": 0}, []),
        ({"num_gpus": 16, "rollout_gpus": 8, "gpu_memory_gib": 180}, ["--nodes 1 --relative 1", "--nodes 1"]),
        ({"num_gpus": 8, "rollout_gpus": 4, "gpu_memory_gib": 500}, []),
    ],
    ids=str,
)
def test_commands_run_when_they_are_pasted(
    llama_70b: Model, tmp_path: Path, given: dict[str, Any], sruns: list[str]
) -> None:
    estimate, config = first(llama_70b, **given)
    calls = tmp_path / "calls"
    calls.mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    pasted = "\n".join([*command_lines(llama_70b, estimate, config), "wait"])
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-euc", pasted], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    started = (calls / "srun").read_text().splitlines() if (calls / "srun").exists() else []
    assert len(started) == len(sruns)
    assert all(any(line.startswith(expected) for line in started) for expected in sruns)
    trainer_gpus, *words = (calls / "torchrun").read_text().splitlines()
    assert words[words.index("--nproc-per-node") + 1] == str(min(8, estimate.layout.num_gpus))
    if config.num_gpus > 8:
        assert words[words.index("--rdzv-endpoint") + 1] == "n1:29500"
    if config.rollout_gpus:
        server_gpus, program, *flags = (calls / "python").read_text().splitlines()
        own, more = serve_node.parser().parse_known_args(flags)
        args = serve_rollouts.parser().parse_args(more)
        num_nodes = max(1, estimate.rollout_gpus // 8)
        assert program == "tools/serve_node.py" and args.python == Path("python3")
        assert own.num_servers * args.tp * num_nodes == estimate.rollout_gpus
        if config.num_gpus == 8:
            assert (trainer_gpus, server_gpus) == ("0,1,2,3", "4,5,6,7")
