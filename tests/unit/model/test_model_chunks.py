"""The layers of a model: their modules, and their parameters' names in a checkpoint."""

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.attention import SelfAttention

from megatron_rasft.model import delta_net, model_chunks
from megatron_rasft.model.attention import RMSNorm, SdpaCoreAttention
from megatron_rasft.model.delta_net import HeadNorm
from megatron_rasft.model.model_chunks import layer_spec


def config_of(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A configuration whose second pipeline stage, the present one, has three of five layers."""
    monkeypatch.setattr(model_chunks, "get_num_layers_to_build", lambda config, vp_stage: 3)
    monkeypatch.setattr(model_chunks, "get_transformer_layer_offset", lambda config, vp_stage: 2)
    values = {
        "transformer_impl": "local",
        "num_layers": 5,
        "moe_layer_freq": 1,
        "qk_layernorm": False,
        "multi_latent_attention": False,
        "num_moe_experts": None,
        "moe_grouped_gemm": False,
        "add_bias_linear": False,
        "experimental_attention_variant": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize("has_qk_norm", [False, True])
def test_plain_layers_have_this_packages_norms_and_attention(
    has_qk_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block: Any = layer_spec(config_of(monkeypatch, qk_layernorm=has_qk_norm))
    assert len(block.layer_specs) == 3 and block.layer_norm is RMSNorm
    layer = block.layer_specs[0].submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    attention = layer.self_attention.submodules
    assert attention.core_attention is SdpaCoreAttention
    assert (attention.q_layernorm is RMSNorm) == (attention.k_layernorm is RMSNorm) == has_qk_norm


@pytest.mark.parametrize(("num_experts", "is_renamed"), [(None, True), (4, False)])
def test_the_norm_before_experts_keeps_its_name_in_a_checkpoint(
    num_experts: int | None, is_renamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the norm before a dense MLP has the name of a fused layer."""
    block: Any = layer_spec(config_of(monkeypatch, num_moe_experts=num_experts))
    names = block.layer_specs[0].submodules.sharded_state_dict_keys_map
    assert ("pre_mlp_layernorm." in names) == is_renamed


@pytest.mark.parametrize(
    ("frequency", "expected"), [([0, 0, 0, 1, 1], [False, True, True]), (3, [False, True, False])]
)
def test_a_stage_has_experts_in_its_own_layers(
    frequency: list[int] | int, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    block: Any = layer_spec(config_of(monkeypatch, num_moe_experts=4, moe_layer_freq=frequency))
    made = [spec.submodules.sharded_state_dict_keys_map for spec in block.layer_specs]
    assert ["pre_mlp_layernorm." not in names for names in made] == expected


def test_transformer_engines_layers_are_megatrons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_chunks, "get_gpt_decoder_block_spec", lambda *args, **kind: (args, kind))
    config = config_of(monkeypatch, transformer_impl="transformer_engine")
    spec: Any = layer_spec(config, 1)
    assert spec == ((config,), {"use_transformer_engine": True, "vp_stage": 1})


DELTA = {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": [0, 0, 1, 0, 1]}


def test_gated_delta_nets_replace_the_attention_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = layer_spec(config_of(monkeypatch, qk_layernorm=True, **DELTA))
    layers = [layer.submodules for layer in block.layer_specs]
    assert [layer.self_attention.module is GatedDeltaNet for layer in layers] == [True, False, True]
    assert layers[0].self_attention.submodules.out_norm is HeadNorm
    fused = [layer.sharded_state_dict_keys_map["input_layernorm."].split(".")[1] for layer in layers]
    assert fused == ["in_proj", "linear_qkv", "in_proj"], "the norm is fused with what follows it"


def test_transformer_engines_delta_nets_get_the_norm_that_is_not_zero_centred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = [GatedDeltaNet, SelfAttention]
    specs = [
        SimpleNamespace(
            submodules=SimpleNamespace(
                self_attention=SimpleNamespace(module=kind, submodules=SimpleNamespace(out_norm="TENorm"))
            )
        )
        for kind in kinds
    ]
    monkeypatch.setattr(
        delta_net,
        "get_transformer_block_with_experimental_attention_variant_spec",
        lambda config, vp_stage: SimpleNamespace(layer_specs=specs),
    )
    block: Any = layer_spec(config_of(monkeypatch, transformer_impl="transformer_engine", **DELTA))
    norms = [layer.submodules.self_attention.submodules.out_norm for layer in block.layer_specs]
    assert norms == [HeadNorm, "TENorm"]
