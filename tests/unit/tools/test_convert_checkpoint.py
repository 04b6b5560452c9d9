"""Runs the command as a user does: exit codes, messages and output."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rasft.tools import cli
from megatron_rasft.tools.conversion import conversion
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder
from megatron_rasft.weights.folder import HfFolder
from tests.tiny_models import whole_blocks, write_folder
from tests.unit.weights.quantized_folders import (
    COMPRESSED_ROWS,
    FP8_BLOCKS,
    quantize_folder,
    with_rows,
)
from tests.unit.weights.quantized_folders import in_blocks as in_blocks_of
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("qwen3_moe", tmp_path_factory.mktemp("hf") / "model", torch.bfloat16)


def command(direction: str, source: Path, target: Path, *more: str) -> int:
    return cli.run(
        convert_checkpoint.main, [direction, "--input", str(source), "--output", str(target), *more]
    )


def test_there_and_back_with_proof(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("hf-to-megatron", model, tmp_path / "megatron", "--verify", "--workers", "1") == 0
    assert command("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    printed = capsys.readouterr().out
    assert printed.count(", sha256 ") == 2
    assert printed.count("logits of ") == 2
    checksums = {line.split("sha256 ")[1] for line in printed.splitlines() if "sha256" in line}
    assert len(checksums) == 1


@pytest.fixture
def in_blocks(tmp_path: Path) -> Path:
    """A model whose matrices consist of complete blocks of 128 x 128."""
    return write_folder("qwen3_moe", tmp_path / "in_blocks", torch.bfloat16, sizes=whole_blocks("qwen3_moe"))


def test_dtype_and_fp8_are_proven_too(in_blocks: Path, tmp_path: Path) -> None:
    assert command("hf-to-megatron", in_blocks, tmp_path / "megatron", "--dtype", "float32", "--verify") == 0
    assert (
        command("megatron-to-hf", tmp_path / "megatron", tmp_path / "half", "--dtype", "float16", "--verify")
        == 0
    )
    assert HfFolder.open(tmp_path / "half").dtype == torch.float16
    assert command("megatron-to-hf", tmp_path / "megatron", tmp_path / "fp8", "--fp8", "--verify") == 0
    assert "quantization_config" in json.loads((tmp_path / "fp8/config.json").read_text())


def test_a_folder_with_fp8_weights_is_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers multiplies the scales of blocks itself. For those of rows it needs compressed-tensors, which is not installed."""
    source = write_folder("qwen3", tmp_path / "hf", torch.bfloat16, sizes=whole_blocks("qwen3"))
    blocks, rows = (shutil.copytree(source, tmp_path / name) for name in ("blocks", "rows"))
    quantize_folder(blocks, FP8_BLOCKS, in_blocks_of(torch.float32))
    quantize_folder(rows, COMPRESSED_ROWS, with_rows)
    assert command("hf-to-megatron", blocks, tmp_path / "one", "--verify") == 0
    assert "logits of " in capsys.readouterr().out
    assert command("hf-to-megatron", rows, tmp_path / "two", "--verify") == 0
    assert "logits not compared" in capsys.readouterr().out


def test_fp8_of_a_model_that_is_not_whole_blocks_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("hf-to-megatron", model, tmp_path / "megatron") == 0
    capsys.readouterr()
    assert command("megatron-to-hf", tmp_path / "megatron", tmp_path / "fp8", "--fp8") == 2
    error = capsys.readouterr().err
    assert "q_proj.weight is 64 x 48" in error
    assert error.count("\n") == 1 and not (tmp_path / "fp8").exists()


def test_weights_that_are_not_finite_are_refused_without_verify_and_found_by_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(model, tmp_path / "model")
    state = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    state[name][0, 0] = float("nan")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    assert command("hf-to-megatron", broken, tmp_path / "megatron") == 1
    printed = capsys.readouterr().err
    assert name in printed and printed.count("\n") == 1 and not (tmp_path / "megatron").exists()
    monkeypatch.setattr(conversion, "is_finite", lambda tensor: True)
    assert command("hf-to-megatron", broken, tmp_path / "megatron", "--verify") == 1
    assert re.search(rf"{re.escape(name)} .*not finite", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("direction", "more", "code", "named"),
    [
        ("hf-to-megatron", ["--workers", "0"], 2, ["--workers"]),
        ("megatron-to-hf", ["--max-shard-gb", "0"], 2, ["--max-shard-gb"]),
        ("megatron-to-hf", ["--fp8", "--dtype", "float16"], 2, ["--fp8", "--dtype"]),
        ("hf-to-megatron", ["--query-groups", "1"], 2, ["--rasft-query-groups 1"]),
        ("megatron-to-hf", [], 1, ["latest_checkpointed_iteration.txt", "metadata.json"]),
        ("hf-to-megatron", ["--bridge", "megatron-bridge"], 2, ["--bridge", "Qwen3MoeForCausalLM"]),
    ],
)
def test_wrong_arguments_end_in_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    direction: str,
    more: list[str],
    code: int,
    named: list[str],
) -> None:
    assert command(direction, model, tmp_path / "out", *more) == code
    error = capsys.readouterr().err
    assert all(name in error for name in named) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_model_description_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("hf-to-megatron", model, tmp_path / "megatron") == 0
    shutil.rmtree(tmp_path / "megatron/hugging_face")
    assert command("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 2
    assert "--hf-model" in capsys.readouterr().err
    assert command("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--hf-model", str(model)) == 0


def test_checkpoint_without_an_embedding_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("hf-to-megatron", model, tmp_path / "megatron") == 0
    other = TorchDistFolder.open(tmp_path / "megatron")
    del other.tensors["embedding.word_embeddings.weight"]
    monkeypatch.setattr(TorchDistFolder, "open", lambda path: other)
    assert command("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(other.path) in error and "embedding.word_embeddings.weight" in error
    assert not (tmp_path / "back").exists()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of a model whose family has no table."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps({"architectures": ["NemotronForCausalLM"]}))
    return tmp_path / "foreign"


def test_bridge_that_is_not_installed_says_so(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    assert command("hf-to-megatron", foreign, tmp_path / "out", "--bridge", "megatron-bridge") == 2
    assert "make bridge" in capsys.readouterr().err


def pretend_bridge(monkeypatch: pytest.MonkeyPatch, auto_bridge: type, **modules: object) -> None:
    training = {"megatron.bridge.training.model_load_save": types.ModuleType("model_load_save")} | modules
    for name, module in training.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "megatron.bridge", types.SimpleNamespace(AutoBridge=auto_bridge))
    monkeypatch.setitem(sys.modules, "megatron.bridge.training", types.ModuleType("training"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_module_that_bridge_imports_only_when_it_saves_is_checked_first(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_bridge(monkeypatch, object, **{"megatron.bridge.training.model_load_save": None})
    assert command("hf-to-megatron", foreign, tmp_path / "out", "--bridge", "megatron-bridge") == 2
    assert "model_load_save" in capsys.readouterr().err


def test_bridge_without_a_gpu_is_refused(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_bridge(monkeypatch, object)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command("hf-to-megatron", foreign, tmp_path / "out", "--bridge", "megatron-bridge") == 2
    assert "NVIDIA GPU" in capsys.readouterr().err


def test_bridge_writes_to_a_temporary_name_until_it_is_done(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class AutoBridge:
        fails = True

        @classmethod
        def import_ckpt(cls, model: str, target: str) -> None:
            Path(target).mkdir()
            assert model == str(foreign)
            if cls.fails:
                raise KeyError("no such family")

    pretend_bridge(monkeypatch, AutoBridge)
    assert command("hf-to-megatron", foreign, tmp_path / "out", "--bridge", "megatron-bridge") == 1
    assert "no such family" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["foreign"]
    AutoBridge.fails = False
    with monkeypatch.context() as disk:
        disk.setattr(Path, "rename", lambda path, target: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert command("hf-to-megatron", foreign, tmp_path / "out", "--bridge", "megatron-bridge") == 1
    assert ".out.partial" in capsys.readouterr().err
    assert (tmp_path / ".out.partial").is_dir()
    assert command("hf-to-megatron", foreign, tmp_path / "out", "--bridge", "megatron-bridge") == 0
    assert (tmp_path / "out").is_dir()
