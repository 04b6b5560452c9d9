"""Entries of the tables: the Megatron parameters that several families share, with their Hugging Face tensors."""

from collections.abc import Callable
from typing import NamedTuple

from megatron_rasft.weights.families.layouts import (
    Layout,
    gate_then_up,
    input_split,
    query_key_value,
    replicated,
)
from megatron_rasft.weights.families.shape import ModelShape


class Entry(NamedTuple):
    """One Megatron parameter and the Hugging Face tensors that it consists of.

    Names within a layer do not include the layer's prefix. Names within an expert contain {e} in place of its number.
    """

    megatron: tuple[str, ...]
    """Names in GPTModel: first the name in plain layers, then the name in Transformer Engine's fused layers. Checkpoints use
    the last name."""
    hf: tuple[str, ...]
    hf_shape: Callable[[ModelShape], tuple[tuple[int, ...], ...]]
    layout: Layout
    is_sharded: bool = True
    """False if every tensor-parallel rank holds the complete tensor."""
    may_be_whole: bool = False
    """True if every tensor-parallel rank of Transformer Engine's layers holds the complete tensor, and plain layers split it."""
    is_expert: bool = False
    is_buffer: bool = False
    """True if it is a buffer of the module, which training does not change and which stays in fp32."""
    sections: Callable[[ModelShape], tuple[tuple[str, int], ...]] | None = None
    """Returns suffix and rows of the tensors into which Megatron's checkpoints cut the parameter; None: it is one tensor there."""


class JoinedExperts(NamedTuple):
    """A tensor of a folder that has all experts of a layer, one after the other."""

    name: str
    """Name within the layer."""
    parts: tuple[str, ...]
    """The Hugging Face names, in the entries, of the matrices that lie below each other in each expert. They have equal sizes."""
    is_alternating: bool = False
    """True if the matrices are transposed and their columns alternate, instead."""

    def part_names(self, prefix: str, num_experts: int) -> tuple[str, ...]:
        """The names of all parts in their order, with ``prefix`` for the layer."""
        return tuple(prefix + part.format(e=expert) for expert in range(num_experts) for part in self.parts)


def norm_entry(megatron: tuple[str, ...], hf: str, size: Callable[[ModelShape], int]) -> Entry:
    return Entry(megatron, (hf,), lambda s: ((size(s),),), replicated(size), is_sharded=False)


def post_norm_entry(linear: str, hf: str) -> Entry:
    """The norm of the output of a linear layer (model/extended_model.py)."""
    return norm_entry((f"{linear}.post_norm.weight",), hf, lambda s: s.hidden_size)


def q_size(s: ModelShape) -> int:
    return s.num_attention_heads * s.head_dim


def kv_size(s: ModelShape) -> int:
    return s.num_query_groups * s.head_dim


ATTENTION = (
    norm_entry(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        "input_layernorm.weight",
        lambda s: s.hidden_size,
    ),
    Entry(
        ("self_attention.linear_qkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        lambda s: ((q_size(s), s.hidden_size), (kv_size(s), s.hidden_size), (kv_size(s), s.hidden_size)),
        query_key_value,
    ),
    Entry(
        ("self_attention.linear_proj.weight",),
        ("self_attn.o_proj.weight",),
        lambda s: ((s.hidden_size, q_size(s)),),
        input_split(q_size),
    ),
)


def gated_mlp(megatron: str, hf: str, size: Callable[[ModelShape], int]) -> tuple[Entry, Entry]:
    """Entries of the two layers of a gated MLP.

    Args:
        megatron: name of the module in Megatron's layer.
        hf: name of the module in the Hugging Face layer.
        size: inner size of the MLP.
    """
    return (
        Entry(
            (f"{megatron}.linear_fc1.weight",),
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            lambda s: ((size(s), s.hidden_size),) * 2,
            gate_then_up(size),
        ),
        Entry(
            (f"{megatron}.linear_fc2.weight",),
            (f"{hf}.down_proj.weight",),
            lambda s: ((s.hidden_size, size(s)),),
            input_split(size),
        ),
    )


MLP_NORM = norm_entry(
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "post_attention_layernorm.weight",
    lambda s: s.hidden_size,
)
MLP = (MLP_NORM, *gated_mlp("mlp", "mlp", lambda s: s.ffn_hidden_size))

QKV_BIAS = (
    Entry(
        ("self_attention.linear_qkv.bias",),
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        lambda s: ((q_size(s),), (kv_size(s),), (kv_size(s),)),
        query_key_value,
    ),
)
QK_NORM = (
    norm_entry(("self_attention.q_layernorm.weight",), "self_attn.q_norm.weight", lambda s: s.head_dim),
    norm_entry(("self_attention.k_layernorm.weight",), "self_attn.k_norm.weight", lambda s: s.head_dim),
)
