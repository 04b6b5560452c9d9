"""Tensors that are not part of the trained model pass unchanged through exports and conversions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron_rasft.tools.conversion.conversion import TEMPLATE_DIR, hf_to_megatron, megatron_to_hf  # noqa: E402
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from tests.chunk_tensors import export  # noqa: E402
from tests.tiny_models import build_chunks, write_folder  # noqa: E402

NAMES = ("model.layers.4.eh_proj.weight", "model.layers.4.mlp.experts.0.up_proj.weight")


@pytest.fixture
def folder(tmp_path: Path) -> HfFolder:
    """A model of four layers whose folder also has a layer for multi-token prediction."""
    path = write_folder("glm4_moe", tmp_path / "in")
    state = load_file(path / "model.safetensors")
    extra = {name: torch.randn(6, 5).bfloat16() for name in NAMES}
    save_file(state | extra, path / "model.safetensors", {"format": "pt"})
    return HfFolder.open(path)


def assert_carried(path: Path, folder: HfFolder) -> None:
    made = HfFolder.open(path)
    assert made.carried.keys() == folder.carried.keys() == set(NAMES)
    for name in (*folder.carried, *folder.tensors):
        assert torch.equal(made.read(name), folder.read(name)), name
        assert made.read(name).dtype == folder.read(name).dtype, name


@pytest.mark.usefixtures("one_process")
def test_export_copies_them(folder: HfFolder, tmp_path: Path) -> None:
    chunks, offsets = build_chunks(folder, padded_vocab_size=128)
    load_into(chunks, folder, tp_rank=0, tp_size=1, layer_offsets=offsets)
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    assert_carried(tmp_path / "out", folder)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(NAMES) < set(index["weight_map"])


@pytest.mark.parametrize("has_source", [False, True])
def test_conversion_copies_them_in_both_directions(
    folder: HfFolder, tmp_path: Path, has_source: bool
) -> None:
    """The template is the description beside the checkpoint, or the folder that the run was started with."""
    hf_to_megatron(folder, tmp_path / "megatron")
    template = folder.path if has_source else tmp_path / "megatron" / TEMPLATE_DIR
    described = HfFolder.open(template, with_weights=False)
    assert described.carried.keys() == set(NAMES) and not described.tensors
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    megatron_to_hf(checkpoint, described, tmp_path / "out", max_shard_bytes=20_000)
    assert_carried(tmp_path / "out", folder)
    with pytest.raises(ValueError, match="--fp8"):
        megatron_to_hf(checkpoint, described, tmp_path / "fp8", is_fp8=True)


def test_a_template_without_weights_carries_nothing(folder: HfFolder, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(folder.config))
    assert not HfFolder.open(tmp_path, with_weights=False).carried
