"""A run exports the model that it trained, and transformers loads it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.functional import launching
from tests.functional.conftest import Workshop
from tools import convert_checkpoint


def test_run_without_learning_exports_the_weights_it_read(workshop: Workshop, tmp_path: Path) -> None:
    flags = ["--lr", "0", "--train-iters", "2", "--export-hf", str(tmp_path / "exported")]
    workshop.train(tmp_path / "save", flags)
    before = load_file(workshop.policy / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not [name for name, tensor in before.items() if not tensor.equal(after[name])]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| Base model | {workshop.policy} |" in card and "| Steps | 2 |" in card
    loss = launching.losses(tmp_path / "save")[-1]
    assert f"| Loss of the last step | {loss:.4g} |" in card


def test_fp32_weights_are_not_rounded_to_the_folders_type(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(workshop.policy, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    flags = ["--save", str(tmp_path / "save"), "--train-iters", "1", "--lr", "1e-6", "--objective", "sft"]
    flags += ["--export-hf", str(tmp_path / "exported")]
    launching.succeed(tmp_path / "logs", workshop.flags(*flags, model=folder))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "float32"
    moved = [name for name, tensor in before.items() if not tensor.float().equal(after[name])]
    assert len(moved) == len(before), "updates of 1e-6 are below bf16's resolution, and are not lost"

    conversion = ["--input", str(tmp_path / "save"), "--output", str(tmp_path / "converted"), "--verify"]
    assert convert_checkpoint.main(["megatron-to-hf", *conversion]) == 0
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert all(tensor.equal(converted[name]) for name, tensor in after.items())
    for written in ("config.json", "README.md"):
        texts = [(tmp_path / name / written).read_text() for name in ("exported", "converted")]
        assert texts[0] == texts[1].replace("# converted", "# exported")


def test_four_processes_train_and_export_the_same_model_as_one(workshop: Workshop, tmp_path: Path) -> None:
    folders = {1: tmp_path / "one", 4: tmp_path / "four"}
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    for world_size, folder in folders.items():
        flags = ["--train-iters", "3", "--export-hf", str(folder / "exported")]
        workshop.train(folder / "save", flags + (layout if world_size == 4 else []), world_size)
    one = launching.losses(folders[1] / "save")
    assert len(one) == 3
    assert launching.losses(folders[4] / "save") == pytest.approx(one, abs=1e-5, rel=0)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[4] / "exported")
    tokens = tokenizer("3 + 4\n3+4=7", return_tensors="pt").input_ids
    before, single, four = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (workshop.policy, *(f / "exported" for f in folders.values()))
    )
    torch.testing.assert_close(four, single, atol=1e-3, rtol=0)
    assert (single - before).abs().max() > 1e-2, "the run has not changed the model"
