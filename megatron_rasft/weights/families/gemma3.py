"""Gemma 3: norms also behind attention and MLP, and two rotary bases, one of them for the layers with a sliding window."""

from dataclasses import replace
from typing import Any

from megatron_rasft.weights.config_values import positive_int, positive_number, short, unsupported
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import ATTENTION, MLP, QK_NORM, post_norm_entry
from megatron_rasft.weights.families.shape import ModelShape

_ATTENTION = (
    *ATTENTION,
    *QK_NORM,
    post_norm_entry("self_attention.linear_proj", "post_attention_layernorm.weight"),
)
_MLP = (
    MLP[0]._replace(hf=("pre_feedforward_layernorm.weight",)),
    *MLP[1:],
    post_norm_entry("mlp.linear_fc2", "post_feedforward_layernorm.weight"),
)


def _windowed_layers(config: Config) -> list[bool]:
    """Returns which layers have the window: all but every sliding_window_pattern-th one."""
    pattern = positive_int(config, "sliding_window_pattern", default=6)
    return [(layer + 1) % pattern != 0 for layer in range(positive_int(config, "num_hidden_layers"))]


def _own_sizes(config: Config) -> dict[str, Any]:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            raise unsupported(
                f"{key} {short(config[key])} is not supported: Megatron's GPTModel has no soft caps"
            )
    return {}


def _own_args(config: Config, shape: ModelShape) -> dict[str, Any]:
    """Returns the arguments of Megatron and of model/extended_model.py."""
    return {
        "swiglu": False,
        "softmax_scale": positive_number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "layernorm_zero_centered_gamma": True,
        "has_post_norms": True,
        "has_gelu": True,
        "embedding_scale": shape.hidden_size**0.5,
    }


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    attention=_ATTENTION,
    mlp=_MLP,
    more_defaults=(
        ("vocab_size", 262208),
        ("hidden_size", 2304),
        ("intermediate_size", 9216),
        ("num_hidden_layers", 26),
        ("num_attention_heads", 8),
    ),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    default_head_dim=256,
    default_query_groups=4,
    default_max_position_embeddings=131072,
    default_is_tied=True,
    default_rope_theta=1e6,
    default_local_rope_theta=10000.0,
    default_sliding_window=4096,
    reads_layer_types=True,
    windowed_layers=_windowed_layers,
    is_window_served=True,
    fixed_flags=(("attention_bias", False, False), ("use_bidirectional_attention", False, False)),
    own_sizes=_own_sizes,
    own_args=_own_args,
)

GEMMA3_VISION = replace(
    GEMMA3,
    architecture="Gemma3ForConditionalGeneration",
    text_model_type="gemma3_text",
    prefix="language_model.model.",
    output="language_model.lm_head.weight",
    is_carried=lambda name, shape: name.startswith(("vision_tower.", "multi_modal_projector.")),
    is_served=False,
)
"""The language model of Gemma 3 as it is published: the model also sees images, which this project does not train."""
