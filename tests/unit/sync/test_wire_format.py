"""The format that follows from the config.json of a served model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rasft.sync.wire_format import WireFormat, WireTensor, fused_name, name_on_server
from megatron_rasft.tools.conversion.fp8_folders import quantization_config
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.fp8_blocks import is_linear_layer
from tests.tiny_models import write_folder

FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def test_fused_layers_share_a_name() -> None:
    names = [f"model.layers.3.self_attn.{p}_proj.bias" for p in "qkv"]
    assert {name_on_server(name) for name in names} == {"model.layers.3.self_attn.qkv_proj.bias"}
    assert name_on_server("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.gate_up_proj.weight"
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"):
        assert name_on_server(name) == name


@pytest.mark.parametrize(
    "block,gate,up,down",
    [("mlp", "gate_proj", "up_proj", "down_proj"), ("block_sparse_moe", "w1", "w3", "w2")],
)
def test_experts_are_stacked_but_sent_one_by_one(block: str, gate: str, up: str, down: str) -> None:
    at = f"model.layers.2.{block}.experts."
    for layer in (gate, up):
        assert name_on_server(f"{at}5.{layer}.weight") == at + "w13_weight"
    assert name_on_server(f"{at}5.{down}.weight") == at + "w2_weight"
    assert fused_name(f"{at}5.{gate}.weight") == fused_name(f"{at}5.{up}.weight")
    assert fused_name(f"{at}5.{gate}.weight") != fused_name(f"{at}6.{gate}.weight")
    router = f"model.layers.2.{block}.gate.weight"
    assert name_on_server(router) == fused_name(router) == router


def test_projections_to_latents_share_a_name() -> None:
    """SGLang ignores an update that has only one of them."""
    at = "model.layers.2.self_attn"
    assert fused_name(f"{at}.q_a_proj.weight") == fused_name(f"{at}.kv_a_proj_with_mqa.weight")
    assert fused_name(f"{at}.q_b_proj.weight") == f"{at}.q_b_proj.weight"


@pytest.mark.parametrize(
    ("config", "flag", "dtype"),
    [
        ({}, "auto", torch.bfloat16),
        ({"dtype": "float16"}, "auto", torch.float16),
        ({"torch_dtype": "float32"}, "auto", torch.float16),
        ({"torch_dtype": "torch.bfloat16"}, "auto", torch.bfloat16),
        ({"dtype": "float32"}, "float32", torch.float32),
        ({"dtype": "bfloat16"}, "half", torch.float16),
    ],
)
def test_the_type_is_that_of_the_servers_flag_or_of_the_folder(
    config: dict[str, Any], flag: str, dtype: torch.dtype
) -> None:
    assert WireFormat.read(config, flag) == WireFormat(dtype)


def test_linear_weights_go_as_fp8_with_their_scales() -> None:
    wire_format = WireFormat.read({"quantization_config": FP8})
    name = "model.layers.0.mlp.down_proj.weight"
    assert wire_format.wire_tensors(name, (130, 256)) == (
        WireTensor(name, (130, 256), torch.float8_e4m3fn),
        WireTensor(name + "_scale_inv", (2, 2), torch.float32),
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (512, 256)),
        ("lm_head.weight", (512, 256)),
        ("model.norm.weight", (256,)),
        ("model.layers.0.self_attn.q_norm.weight", (64,)),
        ("model.layers.0.self_attn.q_proj.bias", (256,)),
        ("model.layers.0.mlp.gate.weight", (128, 256)),
        ("model.layers.0.block_sparse_moe.gate.weight", (128, 256)),
    ],
)
def test_other_tensors_are_not_quantized(name: str, shape: tuple[int, ...]) -> None:
    wire_format = WireFormat.read({"quantization_config": FP8})
    assert wire_format.wire_tensors(name, shape) == (WireTensor(name, shape, torch.bfloat16),)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_a_sync_quantizes_the_same_tensors_as_an_export(family: str, tmp_path: Path) -> None:
    shapes = HfFolder.open(write_folder(family, tmp_path / "hf")).table.hf_shapes
    wire_format = WireFormat.read({"quantization_config": quantization_config(shapes)})
    assert {n for n, s in shapes.items() if is_linear_layer(n, s)} == {
        n for n, s in shapes.items() if wire_format.is_quantized(n, s)
    }


@pytest.mark.parametrize(
    ("kept", "is_quantized"),
    [
        ("model.layers.0.mlp.down_proj", False),
        ("layers.0.mlp.down_proj", False),
        ("model.layers.0", False),
        ("down_proj", False),
        ("model.layers.1.mlp.down_proj", True),
        ("mlp.down", True),
        ("lm_head", True),
    ],
)
@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_modules_of_the_ignore_lists_are_not_quantized(key: str, kept: str, is_quantized: bool) -> None:
    wire_format = WireFormat.read({"quantization_config": {**FP8, key: [kept]}})
    assert wire_format.is_quantized("model.layers.0.mlp.down_proj.weight", (256, 256)) == is_quantized


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [1, 32]}, "weight_block_size"),
        ({"activation_scheme": "static"}, "static"),
        ({"scale_fmt": "ue8m0"}, "ue8m0"),
    ],
)
def test_a_quantization_that_the_trainer_cannot_produce_is_refused(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        WireFormat.read({"quantization_config": {**FP8, **change}})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_biases_of_routers_are_sent_in_fp32(dtype: str) -> None:
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    (wire,) = WireFormat.read({"dtype": dtype}).wire_tensors(bias, (8,))
    assert wire.dtype == torch.float32
