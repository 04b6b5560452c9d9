"""DeepSeek-V3, DeepSeek-R1, Moonlight, Kimi-K2 and GLM-4.7-Flash: multi-latent attention, and shared experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_rasft.weights.config_values import count, flag, list_of, positive_int, unsupported
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import Entry, norm_entry
from megatron_rasft.weights.families.layouts import input_split, output_split
from megatron_rasft.weights.families.shape import LatentShape, ModelShape
from megatron_rasft.weights.families.shared_experts import (
    MIXTURE,
    is_after_last_layer,
    mixture_args,
    mixture_sizes,
    mlp_entries,
)


def _latent(shape: ModelShape) -> LatentShape:
    assert shape.latent is not None, "this family has multi-latent attention"
    return shape.latent


def _projection(
    megatron: str, hf: str, rows: Callable[[ModelShape], int], columns: Callable[[ModelShape], int]
) -> Entry:
    return Entry(
        (f"self_attention.{megatron}.weight",),
        (f"self_attn.{hf}.weight",),
        lambda s: ((rows(s), columns(s)),),
        output_split(rows),
    )


def _query_rank(s: ModelShape) -> int:
    return _latent(s).query_rank or 0


def _hidden(s: ModelShape) -> int:
    return s.hidden_size


def _queries(s: ModelShape) -> int:
    return s.num_attention_heads * _latent(s).key_dim


def _values(s: ModelShape) -> int:
    return s.num_attention_heads * _latent(s).value_dim


_QUERY = (_projection("linear_q_proj", "q_proj", _queries, _hidden),)
_QUERY_WITH_LATENT = (
    _projection("linear_q_down_proj", "q_a_proj", _query_rank, _hidden)._replace(may_be_whole=True),
    norm_entry(("self_attention.q_layernorm.weight",), "self_attn.q_a_layernorm.weight", _query_rank),
    _projection("linear_q_up_proj", "q_b_proj", _queries, _query_rank),
)
_REST = (
    norm_entry(("input_layernorm.weight",), "input_layernorm.weight", _hidden),
    _projection(
        "linear_kv_down_proj",
        "kv_a_proj_with_mqa",
        lambda s: _latent(s).key_value_rank + _latent(s).rotary_dim,
        _hidden,
    )._replace(may_be_whole=True),
    norm_entry(
        ("self_attention.kv_layernorm.weight",),
        "self_attn.kv_a_layernorm.weight",
        lambda s: _latent(s).key_value_rank,
    ),
    _projection(
        "linear_kv_up_proj",
        "kv_b_proj",
        lambda s: s.num_attention_heads * (_latent(s).plain_dim + _latent(s).value_dim),
        lambda s: _latent(s).key_value_rank,
    ),
    Entry(
        ("self_attention.linear_proj.weight",),
        ("self_attn.o_proj.weight",),
        lambda s: ((s.hidden_size, _values(s)),),
        input_split(_values),
    ),
)


def _layer(shape: ModelShape, layer: int) -> tuple[Entry, ...]:
    query = _QUERY if _latent(shape).query_rank is None else _QUERY_WITH_LATENT
    return _REST + query + mlp_entries(shape, layer)


def _attention_sizes(config: Config, defaults: LatentShape) -> dict[str, Any]:
    if not flag(config, "rope_interleave", default=True):
        raise unsupported(
            "rope_interleave is false, which is not supported: Megatron rotates neighbouring dimensions"
        )
    query_rank = defaults.query_rank
    if "q_lora_rank" in config:
        query_rank = None if config["q_lora_rank"] is None else positive_int(config, "q_lora_rank")
    shape = LatentShape(
        query_rank=query_rank,
        key_value_rank=positive_int(config, "kv_lora_rank", defaults.key_value_rank),
        plain_dim=positive_int(config, "qk_nope_head_dim", defaults.plain_dim),
        rotary_dim=positive_int(config, "qk_rope_head_dim", defaults.rotary_dim),
        value_dim=positive_int(config, "v_head_dim", defaults.value_dim),
    )
    heads = positive_int(config, "num_attention_heads")
    return {"latent": shape, "head_dim": shape.value_dim, "num_query_groups": heads}


def _args(
    config: Config, shape: ModelShape, *, scaling: float, top_k: int, num_groups: int, top_groups: int
) -> dict[str, Any]:
    latent = _latent(shape)
    return {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "qk_layernorm": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        **mixture_args(
            config, shape, top_k=top_k, scaling=scaling, num_groups=num_groups, top_groups=top_groups
        ),
    }


_DEEPSEEK = LatentShape(query_rank=1536, key_value_rank=512, plain_dim=128, rotary_dim=64, value_dim=128)
_GLM_FLASH = LatentShape(query_rank=768, key_value_rank=512, plain_dim=192, rotary_dim=64, value_dim=256)


def _deepseek_sizes(config: Config) -> dict[str, Any]:
    dense = count(config, "first_k_dense_replace", default=3)
    return {
        **_attention_sizes(config, _DEEPSEEK),
        **mixture_sizes(config, num_dense_layers=dense, size=2048, num_experts=256),
    }


def _glm_flash_sizes(config: Config) -> dict[str, Any]:
    return {
        **_attention_sizes(config, _GLM_FLASH),
        **mixture_sizes(config, num_dense_layers=_num_dense_layers(config), size=1536, num_experts=64),
    }


def _num_dense_layers(config: Config) -> int:
    """Reads mlp_layer_types. transformers ignores first_k_dense_replace in this family."""
    kinds = list_of(config, "mlp_layer_types", str)
    if not kinds:
        return 1
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (positive_int(config, "num_hidden_layers") - dense):
        raise unsupported(
            "mlp_layer_types with dense layers after sparse ones, or of another number than the layers, is not supported"
        )
    return dense


DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    attention=_REST + _QUERY_WITH_LATENT,
    mlp=MIXTURE,
    mixed_layers=_layer,
    default_max_position_embeddings=4096,
    is_carried=is_after_last_layer,
    own_sizes=_deepseek_sizes,
    own_args=partial(_args, scaling=2.5, top_k=8, num_groups=8, top_groups=4),
)

GLM4_MOE_LITE = Family(
    architecture="Glm4MoeLiteForCausalLM",
    attention=_REST + _QUERY_WITH_LATENT,
    mlp=MIXTURE,
    mixed_layers=_layer,
    default_max_position_embeddings=202752,
    default_norm_eps=1e-5,
    is_carried=is_after_last_layer,
    own_sizes=_glm_flash_sizes,
    own_args=partial(_args, scaling=1.8, top_k=4, num_groups=1, top_groups=1),
)
