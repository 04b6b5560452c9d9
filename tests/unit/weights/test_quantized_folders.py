"""Folders with quantized weights are read in bfloat16, and exports of them have no trace of the quantization."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron_rasft.tools.conversion.conversion import hf_to_megatron, megatron_to_hf  # noqa: E402
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder  # noqa: E402
from megatron_rasft.weights.dequantizing import dequantize_mxfp4  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from megatron_rasft.weights.quantization import read_quantization  # noqa: E402
from tests.chunk_tensors import export  # noqa: E402
from tests.tiny_models import build_chunks, whole_blocks, write_folder  # noqa: E402
from tests.unit.weights.dequantizing import dequantize_blocks  # noqa: E402
from tests.unit.weights.quantized_folders import (  # noqa: E402
    COMPRESSED_ROWS,
    FP8_BLOCKS,
    WEIGHTS,
    Quantize,
    compressed,
    in_blocks,
    make_mxfp4_folder,
    quantize_folder,
    with_one_scale,
    with_rows,
)

FP8_WHOLE = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "dequantize": False,
}


COMPRESSED_BLOCKS = compressed("block", block_structure=[128, 128])
KINDS: dict[str, tuple[dict[str, Any], Quantize]] = {
    "blocks": (FP8_BLOCKS, in_blocks(torch.float32)),
    "blocks with bf16 scales": (FP8_BLOCKS, in_blocks(torch.bfloat16)),
    "one scale": (FP8_WHOLE, with_one_scale("_scale_inv", "activation_scale", ())),
    "compressed rows": (COMPRESSED_ROWS, with_rows),
    "compressed one scale": (compressed("tensor"), with_one_scale("_scale", "input_scale", (1,))),
    "compressed blocks": (COMPRESSED_BLOCKS, in_blocks(torch.bfloat16, "_scale")),
}


def expected_weights(path: Path) -> dict[str, Tensor]:
    """Dequantizes a folder with the formulas of transformers and compressed-tensors: value times scale."""
    state = load_file(path / WEIGHTS)
    made = {}
    for name, tensor in state.items():
        scales = state.get(f"{name}_scale_inv", state.get(f"{name}_scale"))
        if scales is None:
            made[name] = tensor
        elif scales.numel() > 1 and scales.shape != (tensor.shape[0], 1):
            made[name] = dequantize_blocks(tensor, scales.float()).bfloat16()
        else:
            made[name] = (tensor.float() * scales.float()).bfloat16()
    return {name: tensor for name, tensor in made.items() if "_scale" not in name}


def convert(folder: HfFolder, out: Path) -> None:
    """Exports a model that was loaded from the folder."""
    chunks, offsets = build_chunks(folder, padded_vocab_size=128)
    load_into(chunks, folder, tp_rank=0, tp_size=1, layer_offsets=offsets)
    export(chunks, folder, out, layer_offsets=offsets)


@pytest.fixture(params=KINDS)
def quantized_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = write_folder("qwen3", tmp_path / "in", torch.bfloat16, whole_blocks("qwen3"))
    return quantize_folder(path, *KINDS[request.param])


@pytest.mark.usefixtures("one_process")
def test_exports_have_the_dequantized_weights(quantized_path: Path, tmp_path: Path) -> None:
    folder = HfFolder.open(quantized_path)
    expected = expected_weights(quantized_path)
    assert len(expected) < len(load_file(quantized_path / WEIGHTS))
    convert(folder, tmp_path / "exported")
    hf_to_megatron(folder, tmp_path / "megatron")
    template = HfFolder.open(tmp_path / "megatron/hugging_face", with_weights=False)
    megatron_to_hf(TorchDistFolder.open(tmp_path / "megatron"), template, tmp_path / "converted")
    config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    for out in ("exported", "converted"):
        made = load_file(tmp_path / out / WEIGHTS)
        assert made.keys() == expected.keys()
        assert all(
            made[name].dtype == torch.bfloat16 and torch.equal(made[name], expected[name]) for name in made
        )
        assert json.loads((tmp_path / out / "config.json").read_text()) == config


@pytest.mark.parametrize("kind", ["blocks", "one scale"])
def test_weights_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    path = write_folder("llama", tmp_path / "in", torch.bfloat16, whole_blocks("llama"))
    folder = HfFolder.open(quantize_folder(path, *KINDS[kind]))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    state = model.state_dict()
    assert state.keys() == folder.tensors.keys()
    for name in folder.tensors:
        assert state[name].dtype == torch.bfloat16 and torch.equal(folder.read(name), state[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_slices_along_either_dimension_have_their_own_scales(tmp_path: Path, kind: str) -> None:
    path = write_folder("llama", tmp_path / "in", torch.bfloat16, whole_blocks("llama"))
    folder = HfFolder.open(quantize_folder(path, *KINDS[kind]))
    whole = folder.read("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(folder.read("model.layers.0.mlp.down_proj.weight", 0, 100, 230), whole[100:230])
    assert torch.equal(folder.read("model.layers.0.mlp.down_proj.weight", 1, 100, 230), whole[:, 100:230])


@pytest.mark.usefixtures("one_process")
def test_incomplete_blocks_experts_and_carried_layers_are_dequantized(tmp_path: Path) -> None:
    """DeepSeek-V3 has a projection of 576 rows, and a layer for multi-token prediction in FP8."""
    path = write_folder("deepseek_v3", tmp_path / "in", torch.bfloat16)
    state = load_file(path / WEIGHTS)
    extra = "model.layers.4.eh_proj.weight"
    state[extra] = torch.randn(130, 40).bfloat16()
    save_file(state, path / WEIGHTS, {"format": "pt"})
    quantize_folder(path, *KINDS["blocks"])
    folder = HfFolder.open(path)
    assert set(folder.carried) == {extra} and folder.carried[extra].dtype == torch.bfloat16
    convert(folder, tmp_path / "out")
    made, expected = HfFolder.open(tmp_path / "out"), expected_weights(path)
    assert not made.is_quantized and {*made.tensors, *made.carried} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made.read(name), tensor), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "pack-quantized"}, "'pack-quantized'"),
        ({"config_groups": {}}, "config_groups"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        (compressed("channel", num_bits=4), "config_groups.group_0"),
        (compressed("channel", symmetric=False), "config_groups.group_0"),
        (compressed("group"), "'group'"),
        (compressed("block", block_structure="128x128"), "block_structure"),
    ],
)
def test_other_schemes_of_compressed_tensors_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFolderError, match=re.escape(named)):
        read_quantization({"quantization_config": compressed("channel") | change})


def test_mxfp4_equals_that_of_transformers() -> None:
    """Of all 256 bytes, and of scales up to infinity."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    scales = torch.tensor([0, 1, 2, 100, 120, 126, 127, 128, 130, 140, 200, 250, 251, 252, 253, 254])
    scales = scales.to(torch.uint8).view(1, 4, 4)
    expected = convert_moe_packed_tensors(blocks, scales)[0].t()
    made = dequantize_mxfp4(blocks[0], scales[0])
    assert made.dtype == expected.dtype == torch.bfloat16 and torch.equal(made, expected)


@pytest.fixture
def mxfp4_path(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    return make_mxfp4_folder(write_folder("gpt_oss", tmp_path / "in", torch.bfloat16, sizes))


@pytest.mark.usefixtures("one_process")
def test_an_mxfp4_folder_is_exported_as_transformers_dequantizes_it(mxfp4_path: Path, tmp_path: Path) -> None:
    stored = load_file(mxfp4_path / WEIGHTS)
    expected = {
        name.removesuffix("_blocks"): convert_moe_packed_tensors(
            tensor, stored[name.replace("_blocks", "_scales")]
        )
        if name.endswith("_blocks")
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scales")
    }
    folder = HfFolder.open(mxfp4_path)
    convert(folder, tmp_path / "exported")
    hf_to_megatron(folder, tmp_path / "megatron")
    template = HfFolder.open(tmp_path / "megatron/hugging_face", with_weights=False)
    megatron_to_hf(TorchDistFolder.open(tmp_path / "megatron"), template, tmp_path / "converted")
    for out in ("exported", "converted"):
        made = load_file(tmp_path / out / WEIGHTS)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
        assert "quantization_config" not in json.loads((tmp_path / out / "config.json").read_text())
    with pytest.raises(ValueError, match="--fp8"):
        megatron_to_hf(TorchDistFolder.open(tmp_path / "megatron"), template, tmp_path / "fp8", is_fp8=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    source = transformers.AutoModelForCausalLM.from_pretrained(mxfp4_path).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_rows_and_columns_of_an_mxfp4_expert_are_read(mxfp4_path: Path, part: str) -> None:
    folder, name = HfFolder.open(mxfp4_path), f"model.layers.1.mlp.experts.2.{part}.weight"
    whole = folder.read(name)
    assert torch.equal(folder.read(name, 0, 5, 30), whole[5:30])
    assert torch.equal(folder.read(name, 1, 5, 30), whole[:, 5:30])


@pytest.mark.parametrize(
    "change",
    [
        lambda s, name: s.pop(f"{name}_scales"),
        lambda s, name: s.update({f"{name}_scales": s[f"{name}_scales"][:, :3].clone()}),
        lambda s, name: s.update({f"{name}_blocks": s[f"{name}_blocks"].int()}),
        lambda s, name: s.update({f"{name}_blocks": s[f"{name}_blocks"][..., :8].clone()}),
    ],
)
def test_mxfp4_scales_that_do_not_fit_are_named(
    mxfp4_path: Path, change: Callable[[dict[str, Tensor], str], Any]
) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    damage(lambda state: change(state, name))(mxfp4_path)
    with pytest.raises(ModelFolderError) as caught:
        HfFolder.open(mxfp4_path)
    assert f"{name}_blocks" in str(caught.value) and str(mxfp4_path) in str(caught.value)


def damage(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = load_file(path / WEIGHTS)
        change(state)
        save_file(state, path / WEIGHTS, {"format": "pt"})

    return apply


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop(f"{NAME}_scale_inv"), f"{NAME}_scale_inv"),
        (lambda s: s.update({f"{NAME}_scale_inv": torch.ones(2, 2)}), f"{NAME}_scale_inv has shape [2, 2]"),
        (lambda s: s.update({NAME: s[NAME][None].clone()}), NAME),
        (lambda s: s.update({NAME: s[NAME].view(torch.uint8)}), "U8"),
    ],
)
def test_scales_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    path = write_folder("llama", tmp_path / "in", torch.bfloat16, whole_blocks("llama"))
    damage(change)(quantize_folder(path, *KINDS["blocks"]))
    with pytest.raises(ModelFolderError) as caught:
        HfFolder.open(path)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_fp8_weights_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    path = write_folder("llama", tmp_path / "in", torch.bfloat16, whole_blocks("llama"))
    quantize_folder(path, *KINDS["blocks"])
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="quantization_config"):
        HfFolder.open(path)
