"""The benchmarks of a training step and of the log-probabilities on emulated GPUs."""

import json
from pathlib import Path

import pytest

from tests import forking
from tests.emulated_gpu import running

PROGRAM = forking.REPOSITORY / "benchmarks" / "train_step.py"
FLAGS = "--bf16 --seq-length 64 --global-batch-size 4 --lr-warmup-iters 0 --steps 1 --num-samples 4 --mean-tokens 16"


def test_each_process_has_a_gpu_and_megatron_trains_the_same(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    ranks = [
        forking.Rank(
            program=PROGRAM,
            arguments=[*FLAGS.split(), "--json", str(figures)],
            log=tmp_path / f"{rank}.log",
            variables={"LOCAL_WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    outcome = forking.run(
        ranks, timeout_s=600, ends_with_first_failure=True, parent=running.parent("transformer_engine")
    )
    assert outcome.codes == [0, 0], outcome.output
    report = json.loads(figures.read_text())
    # If a process group exists already, Megatron does not choose a GPU, and every process would use the first.
    assert sorted(place.split()[-1] for place in report["places"]) == ["cuda:0", "cuda:1"]
    measured = report["measured"]
    assert measured.keys() == {
        f"{kind} {layout}" for kind in ("megatron sft", "sft", "rasft") for layout in ("packed", "padded")
    }
    assert report["megatron_cross_entropy"] == "native"
    for layout in ("packed", "padded"):
        theirs, ours = (measured[f"{kind} {layout}"]["first_loss"] for kind in ("megatron sft", "sft"))
        assert ours == pytest.approx(
            theirs, rel=2e-3
        )  # a few steps with a learning rate of 1e-6 were trained in between
        assert theirs > 1.0


def test_logprobs_are_timed_beside_megatron_and_transformer_engine(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = ["--shapes", "tiny", "--tokens", "24", "--repeats", "1", "--json", str(figures)]
    rank = forking.Rank(
        program=PROGRAM.with_name("logprobs.py"),
        arguments=flags,
        log=tmp_path / "log",
        variables={},
        prepare=[running.add_paths],
    )
    outcome = forking.run(
        [rank], timeout_s=600, parent=running.parent("transformer_engine"), has_launcher=False
    )
    assert outcome.codes == [0], outcome.output
    timed = json.loads(figures.read_text())["timed"]["tiny"]
    assert {
        "Megatron's fused cross-entropy",
        "Transformer Engine's cross-entropy",
        "fused, all at once",
    } <= timed.keys()
