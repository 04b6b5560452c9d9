"""Folders in which one tensor has all experts of a layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron_rasft.tools.conversion.conversion import hf_to_megatron, megatron_to_hf  # noqa: E402
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from tests.chunk_tensors import export  # noqa: E402
from tests.tiny_models import build_chunks, write_folder  # noqa: E402

LAYER = "model.layers.1.mlp.experts."


def rewrite(path: Path, state: dict[str, torch.Tensor]) -> HfFolder:
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return HfFolder.open(path)


@pytest.fixture
def joined(tmp_path: Path) -> HfFolder:
    """transformers saves each expert of this class in its own tensors. Here they are joined."""
    path = write_folder("qwen3_5_moe", tmp_path / "in")
    state = load_file(path / "model.safetensors")
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = [
            [state.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(4)]
            for name in ("gate", "up", "down")
        ]
        gate, up, down = map(torch.stack, parts)
        state |= {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    return rewrite(path, state)


def assert_same_files(a: Path, b: Path) -> None:
    states = [load_file(path / "model.safetensors") for path in (a, b)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.usefixtures("one_process")
def test_a_folder_is_exported_in_its_own_form(joined: HfFolder, tmp_path: Path) -> None:
    chunks, offsets = build_chunks(joined, padded_vocab_size=128)
    load_into(chunks, joined, tp_rank=0, tp_size=1, layer_offsets=offsets)
    export(chunks, joined, tmp_path / "out", layer_offsets=offsets)
    assert_same_files(joined.path, tmp_path / "out")


def test_a_folder_is_converted_in_its_own_form(joined: HfFolder, tmp_path: Path) -> None:
    hf_to_megatron(joined, tmp_path / "megatron")
    megatron_to_hf(TorchDistFolder.open(tmp_path / "megatron"), joined, tmp_path / "out")
    assert_same_files(joined.path, tmp_path / "out")


@pytest.mark.parametrize("max_shard_bytes", [1, 30_000])
def test_a_joined_tensor_is_never_split_between_files(
    joined: HfFolder, tmp_path: Path, max_shard_bytes: int
) -> None:
    hf_to_megatron(joined, tmp_path / "megatron")
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    megatron_to_hf(checkpoint, joined, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    out = HfFolder.open(tmp_path / "out")
    assert out.joined == joined.joined
    assert all(torch.equal(out.read(name), joined.read(name)) for name in joined.tensors)


def test_rows_and_columns_of_an_expert_are_read(joined: HfFolder) -> None:
    state = load_file(joined.path / "model.safetensors")
    down, both = state[f"{LAYER}down_proj"], state[f"{LAYER}gate_up_proj"]
    up = f"{LAYER}2.up_proj.weight"
    assert torch.equal(joined.read(f"{LAYER}3.down_proj.weight", 1, 5, 9), down[3, :, 5:9])
    assert torch.equal(joined.read(up), both[2, 24:])
    assert torch.equal(joined.read(up, 0, 3, 7), both[2, 27:31])
    assert torch.equal(joined.read(up, 1, 3, 7), both[2, 24:, 3:7])


def test_a_joined_tensor_of_another_size_is_refused(joined: HfFolder) -> None:
    state = load_file(joined.path / "model.safetensors")
    state[f"{LAYER}down_proj"] = state[f"{LAYER}down_proj"][:3].clone()
    with pytest.raises(ModelFolderError, match=f"{LAYER}down_proj"):
        rewrite(joined.path, state)


def test_both_forms_of_an_expert_are_refused(joined: HfFolder) -> None:
    """Which of them the model was trained with is unknown."""
    state = load_file(joined.path / "model.safetensors")
    state[f"{LAYER}2.down_proj.weight"] = state[f"{LAYER}down_proj"][2].clone()
    with pytest.raises(ModelFolderError, match=f"{LAYER}2.down_proj.weight"):
        rewrite(joined.path, state)
