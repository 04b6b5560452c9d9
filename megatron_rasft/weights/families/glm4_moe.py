"""GLM-4.5, GLM-4.6 and GLM-4.7: grouped-query attention with partial rotary embedding, and shared experts."""

from typing import Any

from megatron_rasft.weights.config_values import count, flag
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import ATTENTION, QK_NORM, QKV_BIAS, Entry
from megatron_rasft.weights.families.shape import ModelShape
from megatron_rasft.weights.families.shared_experts import (
    MIXTURE,
    is_after_last_layer,
    mixture_args,
    mixture_sizes,
    mlp_entries,
)


def _layer(shape: ModelShape, layer: int) -> tuple[Entry, ...]:
    attention = ATTENTION + QKV_BIAS * shape.has_qkv_bias + QK_NORM * shape.has_qk_norm
    return attention + mlp_entries(shape, layer)


def _sizes(config: Config) -> dict[str, Any]:
    return {
        "has_qkv_bias": flag(config, "attention_bias"),
        "has_qk_norm": flag(config, "use_qk_norm"),
        **mixture_sizes(
            config,
            num_dense_layers=count(config, "first_k_dense_replace", default=1),
            size=1408,
            num_experts=128,
        ),
    }


def _args(config: Config, shape: ModelShape) -> dict[str, Any]:
    return mixture_args(config, shape, top_k=8, scaling=1.0, num_groups=1, top_groups=1)


GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    attention=ATTENTION + QKV_BIAS + QK_NORM,
    mlp=MIXTURE,
    mixed_layers=_layer,
    default_query_groups=8,
    default_max_position_embeddings=131072,
    default_norm_eps=1e-5,
    default_partial_rotary=0.5,
    is_carried=is_after_last_layer,
    fixed_flags=(("mlp_bias", False, False),),
    own_sizes=_sizes,
    own_args=_args,
)
