"""gpt-oss: attention sinks, windows in every second layer, biases in every layer, and experts with a clamped activation."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rasft.weights.config_values import positive_int, positive_number, unsupported
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import ATTENTION, QKV_BIAS, Entry, JoinedExperts, norm_entry
from megatron_rasft.weights.families.experts import mixture, read_num_experts, router_args
from megatron_rasft.weights.families.layouts import Piece, ShardLayout, padded_share, replicated
from megatron_rasft.weights.families.shape import ModelShape

_ALPHA = 1.702
"""Factor in the experts' activation, as in Megatron's quick_gelu (core/fusions/fused_bias_geglu.py)."""


def _bias(megatron: str, hf: str, size: Callable[[ModelShape], int]) -> Entry:
    """A bias of which every tensor-parallel rank holds all elements."""
    return norm_entry((megatron,), hf, size)


def _of_heads(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
    """One element for each of the rank's heads. The heads of added query groups come last."""
    length = None if shard is None else shard[0]
    length, start, stop = padded_share(shape.num_attention_heads, length, tp_rank, tp_size)
    return ShardLayout(0, length, (Piece(0, start, stop),) if start < stop else ())


_SINKS = Entry(
    ("self_attention.core_attention.softmax_offset",),
    ("self_attn.sinks",),
    lambda s: ((s.num_attention_heads,),),
    _of_heads,
)
_NORM, _ROUTER, _FC1, _FC2 = mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj")


def _bias_of(entry: Entry) -> Entry:
    """The bias of an expert's layer. Experts with biases are not split."""
    return entry._replace(
        megatron=tuple(name.replace("weight", "bias") for name in entry.megatron),
        hf=tuple(name.replace("weight", "bias") for name in entry.hf),
        hf_shape=lambda s: tuple(size[:1] for size in entry.hf_shape(s)),
    )


_MIXTURE = (
    _NORM,
    _ROUTER._replace(hf=("mlp.router.weight",)),
    _bias("mlp.router.bias", "mlp.router.bias", lambda s: s.num_experts),
    _FC1,
    _bias_of(_FC1),
    _FC2,
    _bias_of(_FC2)._replace(layout=replicated(lambda s: s.hidden_size), is_sharded=False),
)


def _joined(name: str, kind: str, *parts: str) -> JoinedExperts:
    names = tuple(f"mlp.experts.{{e}}.{part}.{kind}" for part in parts)
    return JoinedExperts(f"mlp.experts.{name}", names, is_alternating=True)


def _args(config: Config, shape: ModelShape) -> dict[str, Any]:
    alpha = positive_number(config, "swiglu_alpha", _ALPHA)
    if alpha != _ALPHA:
        raise unsupported(f"swiglu_alpha {alpha} is not supported: Megatron fixes it at {_ALPHA}")
    return {
        **router_args(config, shape, 4, is_normalized=True),
        "add_bias_linear": True,
        "expert_tensor_parallel_size": 1,
        "softmax_type": "learnable",
        "swiglu": False,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": positive_number(config, "swiglu_limit", 7.0),
        # Transformer Engine's grouped experts add their biases themselves.
        "bias_dropout_fusion": False,
        # Megatron's fused activation has the name of GELU's flag.
        "bias_gelu_fusion": False,
    }


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    attention=(
        *ATTENTION,
        *QKV_BIAS,
        _bias("self_attention.linear_proj.bias", "self_attn.o_proj.bias", lambda s: s.hidden_size),
        _SINKS,
    ),
    mlp=_MIXTURE,
    joined_experts=(
        _joined("gate_up_proj", "weight", "gate_proj", "up_proj"),
        _joined("gate_up_proj_bias", "bias", "gate_proj", "up_proj"),
        _joined("down_proj", "weight", "down_proj"),
        _joined("down_proj_bias", "bias", "down_proj"),
    ),
    writes_joined_experts=True,
    default_head_dim=64,
    default_query_groups=8,
    default_max_position_embeddings=131072,
    default_rope_theta=150000.0,
    default_rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    default_norm_eps=1e-5,
    default_sliding_window=128,
    reads_layer_types=True,
    windowed_layers=lambda config: [
        layer % 2 == 0 for layer in range(positive_int(config, "num_hidden_layers"))
    ],
    fixed_flags=(("attention_bias", True, True),),
    own_sizes=lambda config: {"num_experts": read_num_experts(config, 128)},
    own_args=_args,
)
