"""Whole runs on the GPU path: Transformer Engine's layers, NCCL and Megatron's own optimizer, as far as they can be emulated."""

from functools import partial
from pathlib import Path

import pytest

from tests.emulated_gpu import facts, running
from tests.functional import launching
from tests.tiny_policy import write_model, write_sums

FLAGS = [
    *(
        "--seq-length",
        "64",
        "--global-batch-size",
        "8",
        "--micro-batch-size",
        "4",
        "--rasft-refresh-interval",
        "3",
    ),
    *("--lr", "1e-3", "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--train-iters", "2"),
    *("--rollout-max-new-tokens", "12", "--data-prompt-suffix", "", "--no-verify-filter-too-short"),
    *("--verify-num-workers", "1"),
]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A random model and 40 problems, as flags."""
    root = tmp_path_factory.mktemp("emulated")
    model, data = write_model(root / "model"), write_sums(root / "sums.jsonl", 40)
    return ["--hf-model", str(model), "--train-data", str(data)]


def train(save: Path, flags: list[str], world_size: int = 1) -> list[facts.Facts]:
    """A run that must end well; what each rank used."""
    paths = [save.with_name(f"{save.name}-facts{rank}.json") for rank in range(world_size)]
    outcome = running.run(
        save.with_name(f"{save.name}-logs"),
        [*flags, *FLAGS, "--save", str(save)],
        world_size,
        prepare_rank=lambda rank: [partial(facts.record, paths[rank])],
    )
    assert outcome.codes == [0] * world_size, outcome.output
    return facts.read(paths)


def assert_gpu_path(found: list[facts.Facts]) -> None:
    """No stand-in for CPUs took part in what a GPU trains with."""
    for rank in found:
        assert (rank.backend, rank.distributed_backend) == ("nccl", "nccl")
        assert rank.transformer_impl == "transformer_engine"
        assert rank.optimizer.startswith("transformer_engine.")
        assert not rank.cpu_backend_is_on
        assert rank.gradient_accumulation_fusion
        assert rank.core_attention == ["megatron.core.extensions.transformer_engine.TEDotProductAttention"]
        assert not [layer for layer in rank.layers if layer.startswith("megatron_rasft.")]
        assert {
            "gemm",
            "rmsnorm_fwd",
            "rmsnorm_bwd",
            "rope_thd",
            "attention_thd",
            "adam",
            "fused_logprobs",
        } <= rank.kernels.keys()


@pytest.mark.parametrize("world_size", [1, 2])
def test_run_takes_the_gpu_path(files: list[str], tmp_path: Path, world_size: int) -> None:
    assert_gpu_path(train(tmp_path / "save", [*files, "--bf16"], world_size))
    assert len(launching.losses(tmp_path / "save")) == 2
