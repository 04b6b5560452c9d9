"""Qwen1.5-MoE and Qwen2-MoE: experts, and a shared expert behind a gate, in every layer."""

from typing import Any

from megatron_rasft.weights.config_values import count, flag, positive_int
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.delta_net import MIXTURE
from megatron_rasft.weights.families.entries import ATTENTION, QKV_BIAS
from megatron_rasft.weights.families.experts import expert_sizes, router_args
from megatron_rasft.weights.families.shape import ModelShape


def _sizes(config: Config) -> dict[str, Any]:
    return {
        **expert_sizes(config, size=1408, num_experts=60),
        "shared_ffn_hidden_size": positive_int(config, "shared_expert_intermediate_size", default=5632),
    }


def _args(config: Config, shape: ModelShape) -> dict[str, Any]:
    return {
        **router_args(config, shape, 4, is_normalized=flag(config, "norm_topk_prob")),
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size,
        "moe_shared_expert_gate": True,
    }


def _windowed_layers(config: Config) -> list[bool]:
    """Returns which layers have the window: every other one of the first max_window_layers."""
    end = count(config, "max_window_layers", default=28)
    return [layer % 2 == 0 and layer < end for layer in range(positive_int(config, "num_hidden_layers"))]


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    attention=ATTENTION + QKV_BIAS,
    mlp=MIXTURE,
    default_query_groups=16,
    default_max_position_embeddings=32768,
    default_sliding_window=4096,
    has_window_switch=True,
    reads_layer_types=True,
    windowed_layers=_windowed_layers,
    fixed_flags=(("qkv_bias", True, True),),
    own_sizes=_sizes,
    own_args=_args,
)
