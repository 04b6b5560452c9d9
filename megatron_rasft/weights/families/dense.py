"""Families whose layers have one MLP and full attention."""

from dataclasses import replace
from typing import Any

from megatron_rasft.weights.config_values import count, list_of, positive_int, refusal
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import ATTENTION, MLP, QK_NORM, QKV_BIAS, kv_size, q_size
from megatron_rasft.weights.families.layouts import gate_then_up, query_key_value, stacked
from megatron_rasft.weights.families.shape import ModelShape

LLAMA = Family(architecture="LlamaForCausalLM", default_max_position_embeddings=2048)

MISTRAL = Family(
    architecture="MistralForCausalLM",
    default_query_groups=8,
    default_max_position_embeddings=131072,
    default_sliding_window=4096,
)

MINISTRAL3 = Family(
    architecture="Ministral3ForCausalLM",
    default_query_groups=8,
    default_head_dim=128,
    default_max_position_embeddings=262144,
    default_norm_eps=1e-5,
    default_rope={
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    scales_late_queries=True,
)


def _is_of_vision(name: str, shape: ModelShape) -> bool:
    return name.startswith(("vision_tower.", "multi_modal_projector."))


_WITH_VISION: dict[str, Any] = {
    "architecture": "Mistral3ForConditionalGeneration",
    "prefix": "language_model.model.",
    "output": "language_model.lm_head.weight",
    "is_carried": _is_of_vision,
    "is_served": False,
}

MISTRAL3 = replace(
    MISTRAL,
    text_model_type="mistral",
    text_variants=(replace(MINISTRAL3, text_model_type="ministral3", **_WITH_VISION),),
    **_WITH_VISION,
)
"""The language model of Mistral-Small 3.1 and later ones, which also see images, and that of Ministral 3."""


def after_max_window_layers(config: Config) -> list[bool]:
    """Returns which layers have the window of Qwen2 and Qwen3: those after the first max_window_layers."""
    first = count(config, "max_window_layers", default=28)
    return [layer >= first for layer in range(positive_int(config, "num_hidden_layers"))]


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    attention=ATTENTION + QKV_BIAS,
    default_max_position_embeddings=32768,
    default_sliding_window=4096,
    has_window_switch=True,
    reads_layer_types=True,
    windowed_layers=after_max_window_layers,
)

MIMO = replace(
    QWEN2,
    architecture="MiMoForCausalLM",
    is_own_code=True,
    is_carried=lambda name, shape: name.startswith("model.mtp_layers."),
    fixed_flags=(("attention_bias", True, True), ("mlp_bias", False, False)),
)
"""MiMo-7B: Qwen2, and layers for multi-token prediction."""

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    attention=ATTENTION + QK_NORM,
    default_head_dim=128,
    default_max_position_embeddings=32768,
    default_sliding_window=4096,
    has_window_switch=True,
    reads_layer_types=True,
    windowed_layers=after_max_window_layers,
)

_STACKED_QKV = ATTENTION[1]._replace(
    hf=("self_attn.qkv_proj.weight",),
    hf_shape=lambda s: ((q_size(s) + 2 * kv_size(s), s.hidden_size),),
    layout=stacked(query_key_value, lambda s: (q_size(s), kv_size(s), kv_size(s))),
)
_STACKED_GATE_UP = MLP[1]._replace(
    hf=("mlp.gate_up_proj.weight",),
    hf_shape=lambda s: ((2 * s.ffn_hidden_size, s.hidden_size),),
    layout=stacked(
        gate_then_up(lambda s: s.ffn_hidden_size), lambda s: (s.ffn_hidden_size, s.ffn_hidden_size)
    ),
)
STACKED_MLP = (MLP[0], _STACKED_GATE_UP, MLP[2])
"""An MLP whose gate and up projection are one tensor."""

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    attention=(ATTENTION[0], _STACKED_QKV, ATTENTION[2]),
    mlp=STACKED_MLP,
    default_max_position_embeddings=4096,
    default_norm_eps=1e-5,
    reads_partial_rotary=True,
    long_rope_types=(
        "longrope",
        "su",
        "yarn",
    ),  # transformers takes the last two, of early folders, for the first
)

ERNIE4_5 = Family(
    architecture="Ernie4_5ForCausalLM",
    default_head_dim=128,
    default_query_groups=2,
    default_is_tied=True,
    default_max_position_embeddings=131072,
    default_rope_theta=500000.0,
    default_norm_eps=1e-5,
    rotates_neighbours=True,
    fixed_flags=(("use_bias", False, False),),
)

SEED_OSS = Family(
    architecture="SeedOssForCausalLM",
    attention=ATTENTION + QKV_BIAS,
    default_head_dim=128,
    default_query_groups=8,
    default_max_position_embeddings=524288,
    fixed_flags=(
        ("attention_bias", True, True),
        ("attention_out_bias", False, False),
        ("mlp_bias", False, False),
    ),
)


def _rotated_layers(config: Config) -> list[bool]:
    """Reads for each layer whether it has a rotary embedding. config.json has 1 for such layers."""
    num_layers = positive_int(config, "num_hidden_layers")
    rotates = list_of(config, "no_rope_layers", int)
    if config.get("no_rope_layers") is None:
        interval = positive_int(config, "no_rope_layer_interval", 4)
        rotates = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if len(rotates) < num_layers or not set(rotates) <= {0, 1}:
        raise refusal("no_rope_layers", f"a list of {num_layers} values 0 or 1 as", rotates)
    return [bool(rotated) for rotated in rotates[:num_layers]]


SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    default_query_groups=4,
    default_is_tied=True,
    default_max_position_embeddings=32768,
    default_rope_theta=2000000.0,
    has_window_switch=True,
    reads_layer_types=True,
    windowed_layers=lambda config: [not rotated for rotated in _rotated_layers(config)],
    own_args=lambda config, shape: {
        "no_rope_freq": [
            int(not rotated) for rotated in _rotated_layers(config)
        ]  # Megatron has 1 for layers without
    },
)
