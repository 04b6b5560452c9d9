"""Parts that several families share: layers behind the last one, layers without positions, sizes of the cache, whole parameters."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.architecture import read_shape
from megatron_rasft.weights.families import FAMILIES, NameTable
from megatron_rasft.weights.families.shape import DeltaShape, LatentShape
from tests.unit.weights.test_architecture import transformers_config
from tests.unit.weights.test_families import LATENT, LAYER, LAYER_TYPES, bind, shape


@pytest.mark.parametrize(
    "architecture", ["Glm4MoeForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"]
)
def test_layers_behind_the_last_one_are_carried(architecture: str) -> None:
    is_carried = FAMILIES[architecture].is_carried
    sizes = shape()
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(5)]
    assert [is_carried(name, sizes) for name in names] == [False, False, False, True, True]
    assert not is_carried("model.norm.weight", sizes)


@pytest.mark.parametrize(
    ("config", "is_without"),
    [
        ({}, [0, 0, 0, 1, 0, 0, 0, 1]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 3}, [0, 0, 1, 0, 0, 1, 0, 0]),
        ({"no_rope_layers": [0, 1, 1, 0, 1, 1, 1, 1]}, [1, 0, 0, 1, 0, 0, 0, 0]),
        # A folder may list more layers than it has, as after layers were cut off.
        ({"no_rope_layers": [0, 1, 1, 0, 1, 1, 1, 1, 0]}, [1, 0, 0, 1, 0, 0, 0, 0]),
    ],
)
def test_layers_without_positions(config: dict[str, Any], is_without: list[int]) -> None:
    own = FAMILIES["SmolLM3ForCausalLM"].own_args
    assert own({"num_hidden_layers": 8, **config}, shape(num_layers=8)) == {"no_rope_freq": is_without}


def test_elements_of_the_cache_follow_from_heads_and_ranks() -> None:
    grouped = shape(8, 4)
    assert [grouped.cached_elements(tp) for tp in (1, 2, 4, 8)] == [32, 16, 8, 8], "a group is not divided"
    latent = LatentShape(query_rank=6, key_value_rank=4, plain_dim=3, rotary_dim=4, value_dim=5)
    assert [shape(8, 8, latent=latent).cached_elements(tp) for tp in (1, 2)] == [96, 48]


def test_parameters_that_every_rank_holds_are_not_split() -> None:
    table = NameTable(FAMILIES["LlamaForCausalLM"], shape())
    norm = bind(table, LAYER + "mlp.linear_fc1.layer_norm_weight")
    assert not norm.is_split((8,)) and not norm.is_split((4,))
    assert bind(table, LAYER + "mlp.linear_fc2.weight").is_split((8, 6))
    latent = NameTable(FAMILIES["DeepseekV3ForCausalLM"], shape(latent=LATENT))
    down = bind(latent, LAYER + "self_attention.linear_q_down_proj.weight")
    assert not down.is_split((6, 8)) and down.is_split((3, 8))


SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
}
LATENT_SIZES = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
EXPERT_SIZES = {
    "moe_intermediate_size": 14,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
}
ROUTING = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.25}
DELTA_SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 3,
}


def sigmoid_args(config: Any, layers: list[int]) -> dict[str, Any]:
    """Megatron's arguments for experts that are chosen by sigmoid scores, from transformers' configuration."""
    has_groups = config.topk_group < config.n_group
    return {
        "num_experts": config.n_routed_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "ffn_hidden_size": config.intermediate_size,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
        "moe_layer_freq": layers,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_num_groups": config.n_group if has_groups else None,
        "moe_router_group_topk": config.topk_group if has_groups else None,
    }


@pytest.mark.parametrize(
    "values",
    [{}, EXPERT_SIZES | ROUTING | {"first_k_dense_replace": 2, "attention_bias": True, "use_qk_norm": True}],
    ids=["absent", "given"],
)
def test_experts_of_glm4_moe_are_those_of_transformers(values: dict[str, Any]) -> None:
    family, given = FAMILIES["Glm4MoeForCausalLM"], SIZES | values
    config = transformers_config(family.architecture, **given)
    dense = config.first_k_dense_replace
    sizes = read_shape(given, family)
    assert (sizes.ffn_hidden_size, sizes.num_experts) == (
        config.moe_intermediate_size,
        config.n_routed_experts,
    )
    assert (sizes.has_qkv_bias, sizes.has_qk_norm) == (config.attention_bias, config.use_qk_norm)
    assert family.own_args(given, sizes) == sigmoid_args(config, [0] * dense + [1] * (8 - dense))


@pytest.mark.parametrize(
    "values",
    [{}, LATENT_SIZES | EXPERT_SIZES | ROUTING, LATENT_SIZES | {"q_lora_rank": None}],
    ids=["absent", "given", "no latent of queries"],
)
@pytest.mark.parametrize(
    ("architecture", "dense"),
    [
        ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 2}),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6}),
    ],
)
def test_latent_attention_is_that_of_transformers(
    architecture: str, dense: dict[str, Any], values: dict[str, Any]
) -> None:
    family, given = FAMILIES[architecture], SIZES | values | (dense if "n_group" in values else {})
    config = transformers_config(architecture, **given)
    sizes = read_shape(given, family)
    assert sizes.latent == LatentShape(
        query_rank=config.q_lora_rank,
        key_value_rank=config.kv_lora_rank,
        plain_dim=config.qk_nope_head_dim,
        rotary_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
    )
    assert (sizes.head_dim, sizes.num_query_groups) == (config.v_head_dim, 4)
    kinds = getattr(config, "mlp_layer_types", None)
    first = getattr(config, "first_k_dense_replace", 0) if kinds is None else kinds.count("dense")
    assert family.own_args(given, sizes) == {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "qk_layernorm": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        **sigmoid_args(config, [0] * first + [1] * (8 - first)),
    }


@pytest.mark.parametrize(
    "values",
    [{}, DELTA_SIZES, {"layer_types": LAYER_TYPES * 2 + LAYER_TYPES[:2]}],
    ids=["absent", "given", "layers"],
)
@pytest.mark.parametrize(
    "architecture", ["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"]
)
def test_gated_delta_nets_are_those_of_transformers(architecture: str, values: dict[str, Any]) -> None:
    family, given = FAMILIES[architecture], SIZES | values
    if family.has_experts and values:
        given |= {"moe_intermediate_size": 14, "num_experts": 16, "shared_expert_intermediate_size": 18}
    config = transformers_config(architecture, **given)
    is_delta = [kind == "linear_attention" for kind in config.layer_types]
    sizes = read_shape(given, family)
    assert sizes.delta == DeltaShape(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        kernel_size=config.linear_conv_kernel_dim,
        is_delta=tuple(is_delta),
    )
    expected = {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": list(map(int, is_delta)),
        "linear_num_key_heads": config.linear_num_key_heads,
        "linear_num_value_heads": config.linear_num_value_heads,
        "linear_key_head_dim": config.linear_key_head_dim,
        "linear_value_head_dim": config.linear_value_head_dim,
        "linear_conv_kernel_dim": config.linear_conv_kernel_dim,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
    }
    args = family.own_args(given, sizes)
    assert expected.items() <= args.items()
    if family.has_experts:
        assert (sizes.num_experts, sizes.ffn_hidden_size) == (
            config.num_experts,
            config.moe_intermediate_size,
        )
        assert args["moe_shared_expert_intermediate_size"] == config.shared_expert_intermediate_size
        assert args["moe_shared_expert_gate"] is True
    else:
        assert args == expected


def test_queries_without_a_latent_have_one_projection() -> None:
    family = FAMILIES["DeepseekV3ForCausalLM"]
    with_latent = NameTable(family, shape(latent=LATENT)).hf_shapes
    without = NameTable(family, shape(latent=replace(LATENT, query_rank=None))).hf_shapes
    assert with_latent.keys() - without.keys() and all(
        name.endswith(("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"))
        for name in with_latent.keys() - without.keys()
    )
    assert {name.split(".", 3)[3] for name in without.keys() - with_latent.keys()} == {
        "self_attn.q_proj.weight"
    }


def test_experts_may_have_the_name_of_other_families() -> None:
    sizes = read_shape(SIZES | {"num_local_experts": 16}, FAMILIES["DeepseekV3ForCausalLM"])
    assert sizes.num_experts == 16


def groups_of(num_groups: int, top_groups: int, top_k: int) -> dict[str, Any]:
    given = SIZES | {"n_routed_experts": 16, "first_k_dense_replace": 1, "num_experts_per_tok": top_k}
    given |= {"n_group": num_groups, "topk_group": top_groups}
    family = FAMILIES["DeepseekV3ForCausalLM"]
    return family.own_args(given, read_shape(given, family))


@pytest.mark.parametrize("groups", [(3, 3, 4), (4, 5, 4), (4, 1, 5)])
def test_groups_that_do_not_fit_the_experts_are_refused(groups: tuple[int, int, int]) -> None:
    with pytest.raises(ModelFolderError, match="n_group"):
        groups_of(*groups)


@pytest.mark.parametrize("groups", [(8, 1, 2), (4, 2, 5)])
def test_groups_scored_by_two_experts_are_accepted(groups: tuple[int, int, int]) -> None:
    """Megatron scores a group by the integer part of experts per group. In the first case a token takes all experts of its groups."""
    args = groups_of(*groups)
    assert (args["moe_router_num_groups"], args["moe_router_group_topk"]) == groups[:2]


@pytest.mark.parametrize("layers", [[1, 0, 1], [1, 0, 1, 2]])
def test_wrong_layers_without_positions_are_refused(layers: list[int]) -> None:
    with pytest.raises(ModelFolderError, match="no_rope_layers"):
        own = FAMILIES["SmolLM3ForCausalLM"].own_args
        own({"num_hidden_layers": 4, "no_rope_layers": layers}, shape(num_layers=4))


@pytest.mark.parametrize(
    "values", [{}, {"num_experts_per_tok": 3, "norm_topk_prob": True}], ids=["absent", "given"]
)
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("number", ["num_experts", "num_local_experts"])
def test_experts_with_softmax_are_those_of_transformers(
    architecture: str, number: str, values: dict[str, Any]
) -> None:
    family, given = FAMILIES[architecture], SIZES | values
    if values:
        given |= {number: 16, "moe_intermediate_size": 14}
    config = transformers_config(architecture, **given)
    sizes = read_shape(given, family)
    is_mixtral = architecture.startswith("Mixtral")
    size = config.intermediate_size if is_mixtral else config.moe_intermediate_size
    total = 16 if values else config.num_local_experts if is_mixtral else config.num_experts
    assert (sizes.ffn_hidden_size, sizes.num_experts) == (size, total)
    expected = {
        "num_experts": total,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": size,
        "moe_router_pre_softmax": not (is_mixtral or config.norm_topk_prob),
    }
    assert expected.items() <= family.own_args(given, sizes).items()


@pytest.mark.parametrize(
    ("values", "softmax_scale"),
    [({}, 1 / 16), ({"query_pre_attn_scalar": 144}, 1 / 12)],
    ids=["absent", "given"],
)
def test_arguments_of_gemma3(values: dict[str, Any], softmax_scale: float) -> None:
    assert FAMILIES["Gemma3ForCausalLM"].own_args(values, shape(hidden_size=36)) == {
        "swiglu": False,
        "softmax_scale": pytest.approx(softmax_scale),
        "layernorm_zero_centered_gamma": True,
        "has_post_norms": True,
        "has_gelu": True,
        "embedding_scale": 6.0,
    }


@pytest.mark.parametrize(
    ("values", "top_k", "limit"),
    [({}, 4, 7.0), ({"num_experts_per_tok": 2, "swiglu_limit": 5.5, "swiglu_alpha": 1.702}, 2, 5.5)],
    ids=["absent", "given"],
)
def test_arguments_of_gpt_oss(values: dict[str, Any], top_k: int, limit: float) -> None:
    assert FAMILIES["GptOssForCausalLM"].own_args(values, shape(num_experts=8)) == {
        "num_experts": 8,
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": 12,
        "moe_router_pre_softmax": False,
        "add_bias_linear": True,
        "expert_tensor_parallel_size": 1,
        "softmax_type": "learnable",
        "swiglu": False,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": limit,
        "bias_dropout_fusion": False,
        "bias_gelu_fusion": False,
    }
