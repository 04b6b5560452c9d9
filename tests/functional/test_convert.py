"""A run starts from converted weights, and converting a run's checkpoint gives the folder that the run exports."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rasft.weights.folder import HfFolder
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.tiny_policy import write_mixture
from tools import convert_checkpoint


def convert(direction: str, source: Path, target: Path, *more: str) -> None:
    flags = ["--input", str(source), "--output", str(target), *more]
    assert convert_checkpoint.main([direction, *flags]) == 0


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = HfFolder.open(a), HfFolder.open(b)
    assert first.tensors.keys() == second.tensors.keys()
    assert not [name for name in first.tensors if not torch.equal(first.read(name), second.read(name))]


def test_four_ranks_start_from_a_converted_checkpoint_and_go_on(workshop: Workshop, tmp_path: Path) -> None:
    """Interleaved stages: the first stage has layers 1 and 3, the second has layers 2 and 4."""
    other = shutil.copytree(workshop.policy, tmp_path / "other")
    weights = {n: t * 1.1 for n, t in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    convert("hf-to-megatron", other, tmp_path / "converted")

    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    layout += ["--num-layers-per-virtual-pipeline-stage", "1"]
    start = ["--load", str(tmp_path / "converted"), "--objective", "asft", *layout]
    flags = workshop.flags("--save", str(tmp_path / "save"), "--save-interval", "2", *start)
    launching.succeed(tmp_path / "first", [*flags, "--train-iters", "2"], 4)
    launching.succeed(
        tmp_path / "second", [*flags, "--train-iters", "3", "--override-opt_param-scheduler"], 4
    )
    begun = workshop.flags("--save", str(tmp_path / "direct"), "--objective", "asft", model=other)
    launching.succeed(tmp_path / "third", [*begun, "--train-iters", "3"])
    assert launching.losses(tmp_path / "save") == pytest.approx(
        launching.losses(tmp_path / "direct"), abs=1e-4, rel=0
    )


def test_reference_is_that_of_the_weights_a_run_began_with(workshop: Workshop, tmp_path: Path) -> None:
    converted, save = tmp_path / "converted", tmp_path / "save"
    convert("hf-to-megatron", workshop.random, converted)
    flags = ["--rasft-ref-cache", str(tmp_path / "cache.sqlite"), "--train-iters", "1"]
    workshop.train(save, [*flags, "--load", str(converted)])
    longer = [*flags, "--train-iters", "2", "--override-opt_param-scheduler"]
    other = launching.run(tmp_path / "logs", workshop.flags(*longer, "--save", str(save)))
    assert other.codes == [1] and "the run began with other weights than those of" in other.errors[0]
    workshop.train(tmp_path / "direct", flags)
    for folder in (save, tmp_path / "direct"):
        assert launching.steps(folder)[1]["objective/ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_checkpoint_of_a_run_becomes_what_the_run_exports(workshop: Workshop, tmp_path: Path) -> None:
    flags = ["--train-iters", "2", "--export-hf", str(tmp_path / "exported")]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    workshop.train(tmp_path / "save", flags + layout, 4)
    convert("megatron-to-hf", tmp_path / "save", tmp_path / "converted", "--verify")
    assert_same_weights(tmp_path / "exported", tmp_path / "converted")
    card = (tmp_path / "converted/README.md").read_text()
    assert f"| Base model | {workshop.policy} |" in card and "| Steps | 2 |" in card
    assert (tmp_path / "converted/tokenizer.json").exists()


def test_experts_train_on_two_ranks_as_on_one(workshop: Workshop, tmp_path: Path) -> None:
    model = write_mixture(tmp_path / "model", workshop.policy)
    convert("hf-to-megatron", model, tmp_path / "converted")
    parallel = ["--expert-model-parallel-size", "2", "--context-parallel-size", "2"]
    for world_size, layout in ((1, []), (2, parallel)):
        folder = tmp_path / f"ranks{world_size}"
        flags = workshop.flags("--objective", "sft", "--train-iters", "3", "--save", str(folder), model=model)
        flags += ["--load", str(tmp_path / "converted"), "--moe-token-dispatcher-type", "alltoall", *layout]
        launching.succeed(
            tmp_path / f"logs{world_size}", [*flags, "--export-hf", str(folder / "hf")], world_size
        )
        convert("megatron-to-hf", folder, tmp_path / f"back{world_size}")
        assert_same_weights(folder / "hf", tmp_path / f"back{world_size}")
    losses = [launching.losses(tmp_path / f"ranks{n}") for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5, rel=0) and losses[0][2] < losses[0][0]


def test_converted_weights_of_another_model_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    from tests.tiny_models import write_folder

    convert("hf-to-megatron", write_folder("llama", tmp_path / "llama"), tmp_path / "converted")
    outcome = launching.run(
        tmp_path / "logs",
        workshop.flags("--load", str(tmp_path / "converted"), "--save", str(tmp_path / "save")),
    )
    assert outcome.codes != [0] and "is of another model (hidden_size 48 != 64" in outcome.errors[0]


def test_converted_weights_that_are_damaged_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    convert("hf-to-megatron", workshop.policy, tmp_path / "converted")
    largest = max((tmp_path / "converted/release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    outcome = launching.run(
        tmp_path / "logs",
        workshop.flags("--load", str(tmp_path / "converted"), "--save", str(tmp_path / "save")),
    )
    assert outcome.codes != [0]
    assert f"the weights in {tmp_path / 'converted'} cannot be loaded: rank 0: " in outcome.errors[0]
