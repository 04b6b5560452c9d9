"""One table per model family: Hugging Face tensor names and layouts <-> Megatron's, for both directions.

A rank's shard of a Megatron parameter consists of pieces of Hugging Face tensors, concatenated along one dimension. Loading
copies the pieces in and exporting copies them out, so each layout is described once.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model, as its config.json gives them."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner size of the MLP, or of one expert."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the folder. Megatron's embedding may have more rows, as padding."""
    is_tied: bool
    """Whether the output layer shares the embedding's weights. If so, the folder has no lm_head."""
    has_qkv_bias: bool
    has_qk_norm: bool
    num_experts: int = 0
    """Number of experts per layer; 0 if every layer has a single MLP."""


class Piece(NamedTuple):
    """Rows (or columns) ``start:stop`` of an entry's Hugging Face tensor number ``tensor``."""

    tensor: int
    start: int
    stop: int


class ShardLayout(NamedTuple):
    """The layout of one rank's shard."""

    dim: int
    """Dimension along which the pieces are concatenated."""
    length: int
    """Size of the shard along ``dim``. If the pieces are shorter, zeros pad the rest."""
    pieces: tuple[Piece, ...]


Layout = Callable[[ModelShape, int, int, Sequence[int] | None], ShardLayout]
"""A function of the model's shape, tp_rank, tp_size and the shape of the shard in the model, which returns the shard's layout.

Only layouts that allow padding (vocabulary, query groups) use the last argument; None means no padding.
"""


def _share(total: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    if total % tp_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size} does not divide {total}, the size of a weight."
        )
    return total // tp_size * tp_rank, total // tp_size * (tp_rank + 1)


def _padded_share(total: int, size: int | None, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
    """Returns the size of a rank's shard, and the part of ``total`` that it holds. The padding comes after ``total``.

    If ``size`` times ``tp_size`` is less than ``total``, the size is wrong. The result is then the layout without padding, so
    that the caller's comparison of shapes reports the mismatch.
    """
    if size is None or size * tp_size < total:
        start, stop = _share(total, tp_rank, tp_size)
        return stop - start, start, stop
    return size, min(size * tp_rank, total), min(size * (tp_rank + 1), total)


def _replicated(size: Callable[[ModelShape], int]) -> Layout:
    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        return ShardLayout(0, size(shape), (Piece(0, 0, size(shape)),))

    return layout


def _input_split(size: Callable[[ModelShape], int]) -> Layout:
    """A row-parallel weight: every rank holds a range of columns. The columns of added query groups come last."""

    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        width = None if shard is None else shard[1]
        length, start, stop = _padded_share(size(shape), width, tp_rank, tp_size)
        return ShardLayout(1, length, (Piece(0, start, stop),) if start < stop else ())

    return layout


def _gate_then_up(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
    """The rank's rows of the gate projection, followed by its rows of the up projection."""
    start, stop = _share(shape.ffn_hidden_size, tp_rank, tp_size)
    return ShardLayout(0, 2 * (stop - start), (Piece(0, start, stop), Piece(1, start, stop)))


def _query_key_value(
    shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None
) -> ShardLayout:
    """Each query group consists of its queries, its key and its value; ranks split the sequence of groups evenly.

    With fewer groups than ranks a group is split between ranks, and Megatron gathers it in the forward pass
    (SelfAttention.get_query_key_value_tensors). If the model has more groups than the folder, the added groups are padding
    at the end.
    """
    d = shape.head_dim
    q = shape.num_attention_heads // shape.num_query_groups * d
    rows = None if shard is None else shard[0]
    length, start, stop = _padded_share(shape.num_query_groups * (q + 2 * d), rows, tp_rank, tp_size)
    pieces, position = [], 0
    for group in range(shape.num_query_groups):
        for tensor, size in ((0, q), (1, d), (2, d)):
            low, high = max(start, position), min(stop, position + size)
            if low < high:
                offset = group * size - position
                pieces.append(Piece(tensor, low + offset, high + offset))
            position += size
    return ShardLayout(0, length, tuple(pieces))


def _fused(layout: Layout, sizes: Callable[[ModelShape], tuple[int, ...]]) -> Layout:
    """Returns the layout of the same shard if one Hugging Face tensor stacks the tensors that ``layout`` refers to."""

    def fused(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        starts = [0, *accumulate(sizes(shape))]
        plain = layout(shape, tp_rank, tp_size, shard)
        pieces = (Piece(0, starts[p.tensor] + p.start, starts[p.tensor] + p.stop) for p in plain.pieces)
        return plain._replace(pieces=tuple(pieces))

    return fused


def _vocabulary(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
    """A range of token rows. The vocabulary is padded at its end, so the last ranks may hold padding only."""
    rows = None if shard is None else shard[0]
    if rows is not None and rows * tp_size < shape.vocab_size:
        raise ValueError(
            f"--padded-vocab-size {rows * tp_size} is smaller than the folder's vocabulary "
            f"of {shape.vocab_size}."
        )
    length, start, stop = _padded_share(shape.vocab_size, rows, tp_rank, tp_size)
    return ShardLayout(0, length, (Piece(0, start, stop),) if start < stop else ())


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
    is_expert: bool = False


def _norm(megatron: tuple[str, ...], hf: str, size: Callable[[ModelShape], int]) -> Entry:
    return Entry(megatron, (hf,), lambda s: ((size(s),),), _replicated(size), is_sharded=False)


def _q_size(s: ModelShape) -> int:
    return s.num_attention_heads * s.head_dim


def _kv_size(s: ModelShape) -> int:
    return s.num_query_groups * s.head_dim


_EMBEDDING = Entry(
    ("embedding.word_embeddings.weight",),
    ("model.embed_tokens.weight",),
    lambda s: ((s.vocab_size, s.hidden_size),),
    _vocabulary,
)
_FINAL_NORM = _norm(("decoder.final_layernorm.weight",), "model.norm.weight", lambda s: s.hidden_size)
_OUTPUT = _EMBEDDING._replace(megatron=("output_layer.weight",), hf=("lm_head.weight",))
_TIED_OUTPUT = _EMBEDDING._replace(megatron=("output_layer.weight",))

_ATTENTION = (
    _norm(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        "input_layernorm.weight",
        lambda s: s.hidden_size,
    ),
    Entry(
        ("self_attention.linear_qkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        lambda s: ((_q_size(s), s.hidden_size), (_kv_size(s), s.hidden_size), (_kv_size(s), s.hidden_size)),
        _query_key_value,
    ),
    Entry(
        ("self_attention.linear_proj.weight",),
        ("self_attn.o_proj.weight",),
        lambda s: ((s.hidden_size, _q_size(s)),),
        _input_split(_q_size),
    ),
)
_MLP = (
    _norm(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        "post_attention_layernorm.weight",
        lambda s: s.hidden_size,
    ),
    Entry(
        ("mlp.linear_fc1.weight",),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        lambda s: ((s.ffn_hidden_size, s.hidden_size),) * 2,
        _gate_then_up,
    ),
    Entry(
        ("mlp.linear_fc2.weight",),
        ("mlp.down_proj.weight",),
        lambda s: ((s.hidden_size, s.ffn_hidden_size),),
        _input_split(lambda s: s.ffn_hidden_size),
    ),
)
_FUSED_QKV = _ATTENTION[1]._replace(
    hf=("self_attn.qkv_proj.weight",),
    hf_shape=lambda s: ((_q_size(s) + 2 * _kv_size(s), s.hidden_size),),
    layout=_fused(_query_key_value, lambda s: (_q_size(s), _kv_size(s), _kv_size(s))),
)
_FUSED_GATE_UP = _MLP[1]._replace(
    hf=("mlp.gate_up_proj.weight",),
    hf_shape=lambda s: ((2 * s.ffn_hidden_size, s.hidden_size),),
    layout=_fused(_gate_then_up, lambda s: (s.ffn_hidden_size, s.ffn_hidden_size)),
)


def _mixture(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """Entries of a router and its experts, which replace the MLP. Families name the tensors of an expert differently."""
    norm, fc1, fc2 = _MLP
    return (
        norm._replace(megatron=("pre_mlp_layernorm.weight",)),
        Entry(
            ("mlp.router.weight",),
            (f"{block}.gate.weight",),
            lambda s: ((s.num_experts, s.hidden_size),),
            _replicated(lambda s: s.num_experts),
            is_sharded=False,
        ),
        fc1._replace(
            megatron=(
                "mlp.experts.local_experts.{e}.linear_fc1.weight",
                "mlp.experts.linear_fc1.weight{e}",
            ),
            hf=(f"{block}.experts.{{e}}.{gate}.weight", f"{block}.experts.{{e}}.{up}.weight"),
            is_expert=True,
        ),
        fc2._replace(
            megatron=(
                "mlp.experts.local_experts.{e}.linear_fc2.weight",
                "mlp.experts.linear_fc2.weight{e}",
            ),
            hf=(f"{block}.experts.{{e}}.{down}.weight",),
            is_expert=True,
        ),
    )


_QKV_BIAS = (
    Entry(
        ("self_attention.linear_qkv.bias",),
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        lambda s: ((_q_size(s),), (_kv_size(s),), (_kv_size(s),)),
        _query_key_value,
    ),
)
_QK_NORM = (
    _norm(("self_attention.q_layernorm.weight",), "self_attn.q_norm.weight", lambda s: s.head_dim),
    _norm(("self_attention.k_layernorm.weight",), "self_attn.k_norm.weight", lambda s: s.head_dim),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its name in transformers, and its differences from the other families.

    The defaults are those of transformers' configuration classes, because a config.json may omit keys that equal them.
    tests/unit/weights/test_architecture.py compares the two.
    """

    architecture: str
    attention: tuple[Entry, ...] = _ATTENTION
    mlp: tuple[Entry, ...] = _MLP
    default_head_dim: int | None = None
    """head_dim if config.json omits it; None means hidden_size / num_attention_heads."""
    default_max_position_embeddings: int
    default_rope_theta: float = 10000.0
    default_norm_eps: float = 1e-6
    default_sliding_window: int | None = None
    has_window_switch: bool = False
    """True if config.json's sliding_window applies only when use_sliding_window is true."""
    has_max_window_layers: bool = False
    """True if the first max_window_layers layers have no window; False: all layers have it."""
    always_normalizes_experts: bool = False
    """True if the weights of a token's experts always sum to 1; False: norm_topk_prob in config.json decides."""

    @property
    def layer_entries(self) -> tuple[Entry, ...]:
        return self.attention + self.mlp

    @property
    def has_qkv_bias(self) -> bool:
        return any(entry in self.attention for entry in _QKV_BIAS)

    @property
    def has_qk_norm(self) -> bool:
        return any(entry in self.attention for entry in _QK_NORM)

    @property
    def has_experts(self) -> bool:
        return any(entry.is_expert for entry in self.mlp)


FAMILIES = {
    family.architecture: family
    for family in (
        Family(architecture="LlamaForCausalLM", default_max_position_embeddings=2048),
        Family(
            architecture="MistralForCausalLM",
            default_max_position_embeddings=131072,
            default_sliding_window=4096,
        ),
        Family(
            architecture="Qwen2ForCausalLM",
            attention=_ATTENTION + _QKV_BIAS,
            default_max_position_embeddings=32768,
            default_sliding_window=4096,
            has_window_switch=True,
            has_max_window_layers=True,
        ),
        Family(
            architecture="Qwen3ForCausalLM",
            attention=_ATTENTION + _QK_NORM,
            default_head_dim=128,
            default_max_position_embeddings=32768,
            default_sliding_window=4096,
            has_window_switch=True,
            has_max_window_layers=True,
        ),
        Family(
            architecture="Phi3ForCausalLM",
            attention=(_ATTENTION[0], _FUSED_QKV, _ATTENTION[2]),
            mlp=(_MLP[0], _FUSED_GATE_UP, _MLP[2]),
            default_max_position_embeddings=4096,
            default_norm_eps=1e-5,
        ),
        Family(
            architecture="MixtralForCausalLM",
            mlp=_mixture("block_sparse_moe", gate="w1", up="w3", down="w2"),
            default_max_position_embeddings=131072,
            default_rope_theta=1e6,
            default_norm_eps=1e-5,
            always_normalizes_experts=True,
        ),
        Family(
            architecture="Qwen3MoeForCausalLM",
            attention=_ATTENTION + _QK_NORM,
            mlp=_mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
            default_max_position_embeddings=32768,
            default_sliding_window=4096,
            has_window_switch=True,
        ),
    )
}

REFUSED = {
    "Gemma2ForCausalLM": "its attention and output logits are capped softly, its layers have norms after attention "
    "and MLP, and every other layer has a sliding window; Megatron's GPTModel has no such caps and norms",
    "Gemma3ForCausalLM": "its layers have norms after attention and MLP, and two rotary bases; Megatron's GPTModel "
    "has neither",
    "Qwen2MoeForCausalLM": "its shared expert is gated, and only its successor Qwen3-MoE has a table",
    "DeepseekV3ForCausalLM": "there is no table for its latent attention and grouped routing",
}
"""Well-known families that cannot be converted, each with the reason."""

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_IN_EXPERT = re.compile(r"(mlp\.experts\.)(?:local_experts\.(\d+)\.(.+)|(linear_fc[12]\.weight)(\d+))")


class Binding(NamedTuple):
    """An entry for one parameter of the model: full Hugging Face names and shapes."""

    entry: Entry
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    is_copy: bool
    """Whether this is a tied output layer. Megatron stores it separately on the last stage: it is loaded but not exported."""
    prefix: str
    """Prefix of the layer in the Hugging Face names; empty outside layers."""
    expert: int
    """Index of the expert among all experts of the layer; 0 outside experts."""

    def shard_shape(self, layout: ShardLayout) -> tuple[int, ...]:
        """Shape of the Megatron parameter on the rank that ``layout`` belongs to."""
        sizes = list(self.hf_shapes[0])
        sizes[layout.dim] = layout.length
        return tuple(sizes)


class StoredParameter(NamedTuple):
    """Location of a parameter in Megatron's checkpoints, which stack layers, and the experts of a layer, in one tensor."""

    key: str
    single_key: str
    """Key if layers are not stacked (Megatron's non_homogeneous_layers). In that case position[0] is not used."""
    position: tuple[int, ...]
    """Index in the stack: (), (layer,) or (layer, expert)."""
    stack: tuple[int, ...]
    """Sizes of the dimensions that ``position`` indexes."""
    binding: Binding


class NameTable:
    """The table of one model: every Hugging Face tensor, and the Megatron parameter that it belongs to."""

    def __init__(self, family: Family, shape: ModelShape) -> None:
        self.shape = shape
        self._entries = family.layer_entries
        self._layer = {name: entry for entry in self._entries for name in entry.megatron}
        self._top = {
            "embedding.word_embeddings.weight": _EMBEDDING,
            "decoder.final_layernorm.weight": _FINAL_NORM,
        }
        self._top["output_layer.weight"] = _TIED_OUTPUT if shape.is_tied else _OUTPUT
        self.hf_shapes: dict[str, tuple[int, ...]] = {
            name: size
            for parameter in self.stored_parameters()
            for name, size in zip(parameter.binding.hf_names, parameter.binding.hf_shapes, strict=True)
        }
        """Every tensor that the folder must contain, in the order of the model."""

    def bind(self, megatron_name: str, layer_offset: int, expert_offset: int = 0) -> Binding | None:
        """Returns the entry of a parameter, or None if this family has no such parameter.

        Args:
            megatron_name: name in GPTModel, without the prefixes of wrapper modules.
            layer_offset: global index of the first decoder layer in the parameter's model chunk.
            expert_offset: global index of the first expert on the parameter's expert-parallel rank.
        """
        match = _IN_LAYER.fullmatch(megatron_name)
        if match is None:
            entry = self._top.get(megatron_name)
            return None if entry is None else self._bind(entry, "", 0)
        layer, name, expert = int(match[1]) + layer_offset, match[2], 0
        if match := _IN_EXPERT.fullmatch(name):
            number = match[2] or match[5]
            name = f"{match[1]}local_experts.{{e}}.{match[3] or match[4]}"
            expert = int(number) + expert_offset
        entry = self._layer.get(name)
        if entry is None or not 0 <= layer < self.shape.num_layers:
            return None
        if entry.is_expert and not 0 <= expert < self.shape.num_experts:
            return None
        return self._bind(entry, f"model.layers.{layer}.", expert)

    def stored_parameters(self) -> Iterator[StoredParameter]:
        """Yields every parameter with its location in a checkpoint, in the order of the model."""
        yield self._store_top(_EMBEDDING)
        for layer in range(self.shape.num_layers):
            for entry in self._entries:
                for expert in range(self.shape.num_experts) if entry.is_expert else (0,):
                    yield self._store(entry, layer, expert)
        yield self._store_top(_FINAL_NORM)
        if not self.shape.is_tied:
            yield self._store_top(_OUTPUT)

    def _store_top(self, entry: Entry) -> StoredParameter:
        return StoredParameter(entry.megatron[0], entry.megatron[0], (), (), self._bind(entry, "", 0))

    def _store(self, entry: Entry, layer: int, expert: int) -> StoredParameter:
        name = entry.megatron[-1]
        position: tuple[int, ...] = (layer,)
        stack: tuple[int, ...] = (self.shape.num_layers,)
        if entry.is_expert:
            name = name.replace("mlp.experts.", "mlp.experts.experts.").removesuffix("{e}")
            position, stack = (layer, expert), (*stack, self.shape.num_experts)
        return StoredParameter(
            f"decoder.layers.{name}",
            f"decoder.layers.{layer}.{name}",
            position,
            stack,
            self._bind(entry, f"model.layers.{layer}.", expert),
        )

    def _bind(self, entry: Entry, prefix: str, expert: int) -> Binding:
        names = tuple(prefix + name.format(e=expert) for name in entry.hf)
        return Binding(entry, names, entry.hf_shape(self.shape), entry is _TIED_OUTPUT, prefix, expert)

    def same_on(self, binding: Binding, expert: int) -> Binding:
        """Returns the binding of the same parameter in another expert of the layer."""
        return self._bind(binding.entry, binding.prefix, expert)
