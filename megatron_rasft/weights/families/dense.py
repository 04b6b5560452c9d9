"""Families whose layers have one MLP and full attention."""

from megatron_rasft.weights.families.declaration import Family
from megatron_rasft.weights.families.entries import ATTENTION, MLP, QK_NORM, QKV_BIAS, kv_size, q_size
from megatron_rasft.weights.families.layouts import gate_then_up, query_key_value, stacked

LLAMA = Family(architecture="LlamaForCausalLM", default_max_position_embeddings=2048)

MISTRAL = Family(
    architecture="MistralForCausalLM",
    default_query_groups=8,
    default_max_position_embeddings=131072,
    default_sliding_window=4096,
)

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    attention=ATTENTION + QKV_BIAS,
    default_max_position_embeddings=32768,
    default_sliding_window=4096,
    has_window_switch=True,
    has_max_window_layers=True,
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    attention=ATTENTION + QK_NORM,
    default_head_dim=128,
    default_max_position_embeddings=32768,
    default_sliding_window=4096,
    has_window_switch=True,
    has_max_window_layers=True,
)

_STACKED_QKV = ATTENTION[1]._replace(
    hf=("self_attn.qkv_proj.weight",),
    hf_shape=lambda s: ((q_size(s) + 2 * kv_size(s), s.hidden_size),),
    layout=stacked(query_key_value, lambda s: (q_size(s), kv_size(s), kv_size(s))),
)
_STACKED_GATE_UP = MLP[1]._replace(
    hf=("mlp.gate_up_proj.weight",),
    hf_shape=lambda s: ((2 * s.ffn_hidden_size, s.hidden_size),),
    layout=stacked(gate_then_up, lambda s: (s.ffn_hidden_size, s.ffn_hidden_size)),
)

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    attention=(ATTENTION[0], _STACKED_QKV, ATTENTION[2]),
    mlp=(MLP[0], _STACKED_GATE_UP, MLP[2]),
    default_max_position_embeddings=4096,
    default_norm_eps=1e-5,
)
