"""GLM-4 without experts: pairs of neighbouring dimensions are rotated, in the first half of each head."""

from dataclasses import replace

from megatron_rasft.weights.families.declaration import Family
from megatron_rasft.weights.families.dense import STACKED_MLP
from megatron_rasft.weights.families.entries import ATTENTION, QKV_BIAS, post_norm_entry

GLM = Family(
    architecture="GlmForCausalLM",
    attention=ATTENTION + QKV_BIAS,
    mlp=STACKED_MLP,
    default_head_dim=128,
    default_query_groups=2,
    default_max_position_embeddings=131072,
    default_norm_eps=1.5625e-7,
    default_partial_rotary=0.5,
    rotates_neighbours=True,
    fixed_flags=(("attention_bias", True, True),),
)

GLM4 = replace(
    GLM,
    architecture="Glm4ForCausalLM",
    attention=(
        *GLM.attention,
        post_norm_entry("self_attention.linear_proj", "post_self_attn_layernorm.weight"),
    ),
    mlp=(*STACKED_MLP, post_norm_entry("mlp.linear_fc2", "post_mlp_layernorm.weight")),
    own_args=lambda config, shape: {"has_post_norms": True},
)
"""GLM-4-0414, which also has norms behind attention and MLP."""
