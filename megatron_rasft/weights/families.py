"""One table per model family: Hugging Face tensor names and layouts <-> Megatron's, for both directions.

A rank's shard of a Megatron parameter is, along one dimension, a row of pieces of Hugging Face tensors.
Loading copies the pieces in, exporting copies them out, so there is one description of each layout.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes a config.json implies."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the folder, without Megatron's padding."""
    is_tied: bool
    """The output layer is the embedding; the folder has no lm_head."""
    has_qkv_bias: bool
    has_qk_norm: bool


class Piece(NamedTuple):
    """Rows (or columns) ``start:stop`` of the ``source``-th Hugging Face tensor of an entry."""

    source: int
    start: int
    stop: int


class ShardLayout(NamedTuple):
    """How one rank's shard is laid out."""

    dim: int
    """Dimension along which the pieces follow each other."""
    length: int
    """Size of the shard along ``dim``; where the pieces end earlier the rest is padding (zeros)."""
    pieces: tuple[Piece, ...]


Layout = Callable[[ModelShape, int, int, Sequence[int] | None], ShardLayout]
"""(shape, tp_rank, tp_size, the shard's own shape or None) -> layout.

Only what can be padded (the vocabulary, the query groups) looks at the shard; None says that nothing is.
"""


def _share(total: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    if total % tp_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size} does not divide {total}, the size of a weight."
        )
    return total // tp_size * tp_rank, total // tp_size * (tp_rank + 1)


def _padded_share(total: int, size: int | None, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
    """Size of a shard of which ``tp_size`` make up ``total`` and padding after it, and the part it holds.

    Shards of a ``size`` too small for ``total`` get what they ought to have.
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
    """Row-parallel: every rank holds a range of columns; columns of added query groups come last."""

    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        width = None if shard is None else shard[1]
        length, start, stop = _padded_share(size(shape), width, tp_rank, tp_size)
        return ShardLayout(1, length, (Piece(0, start, stop),) if start < stop else ())

    return layout


def _gate_then_up(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
    """Every rank's gate rows, then the same rank's up rows."""
    start, stop = _share(shape.ffn_hidden_size, tp_rank, tp_size)
    return ShardLayout(0, 2 * (stop - start), (Piece(0, start, stop), Piece(1, start, stop)))


def _query_key_value(
    shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None
) -> ShardLayout:
    """Per query group its queries, its key, its value; ranks cut that row of groups evenly.

    With fewer groups than ranks the cut runs through a group; Megatron gathers it again in the
    forward pass (SelfAttention.get_query_key_value_tensors). A model with more groups than the folder
    has padding in their place, at the end.
    """
    d = shape.head_dim
    q = shape.num_attention_heads // shape.num_query_groups * d
    rows = None if shard is None else shard[0]
    length, start, stop = _padded_share(shape.num_query_groups * (q + 2 * d), rows, tp_rank, tp_size)
    pieces, position = [], 0
    for group in range(shape.num_query_groups):
        for source, size in ((0, q), (1, d), (2, d)):
            low, high = max(start, position), min(stop, position + size)
            if low < high:
                offset = group * size - position
                pieces.append(Piece(source, low + offset, high + offset))
            position += size
    return ShardLayout(0, length, tuple(pieces))


def _vocabulary(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
    """A range of token rows; the vocabulary is padded at its end, so the last ranks hold padding rows."""
    rows = None if shard is None else shard[0]
    if rows is not None and rows * tp_size < shape.vocab_size:
        raise ValueError(
            f"--padded-vocab-size {rows * tp_size} is smaller than the folder's vocabulary "
            f"of {shape.vocab_size}."
        )
    length, start, stop = _padded_share(shape.vocab_size, rows, tp_rank, tp_size)
    return ShardLayout(0, length, (Piece(0, start, stop),) if start < stop else ())


class Entry(NamedTuple):
    """One Megatron parameter and the Hugging Face tensors it is made of; names of a layer lack its prefix."""

    megatron: tuple[str, ...]
    """Names in GPTModel: the plain layers' first, then that of Transformer Engine's fused layers."""
    hf: tuple[str, ...]
    hf_shape: Callable[[ModelShape], tuple[tuple[int, ...], ...]]
    layout: Layout
    is_sharded: bool = True
    """False where every tensor-parallel rank holds the same whole tensor."""


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

_LAYER = (
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
    """A model family: what transformers calls it, and what sets it apart from its siblings."""

    architecture: str
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    default_head_dim: int | None = None
    """head_dim where config.json has none; None means hidden_size / num_attention_heads."""
    default_max_position_embeddings: int

    @property
    def layer_entries(self) -> tuple[Entry, ...]:
        return _LAYER + (_QKV_BIAS if self.has_qkv_bias else ()) + (_QK_NORM if self.has_qk_norm else ())


FAMILIES = {
    family.architecture: family
    for family in (
        Family(architecture="LlamaForCausalLM", default_max_position_embeddings=2048),
        Family(architecture="Qwen2ForCausalLM", has_qkv_bias=True, default_max_position_embeddings=32768),
        Family(
            architecture="Qwen3ForCausalLM",
            has_qk_norm=True,
            default_head_dim=128,
            default_max_position_embeddings=32768,
        ),
    )
}

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class Binding(NamedTuple):
    """An entry bound to one parameter: full Hugging Face names and shapes."""

    entry: Entry
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    is_copy: bool
    """True for the tied output layer on a stage without the embedding: loaded, but not exported again."""

    def shard_shape(self, layout: ShardLayout) -> tuple[int, ...]:
        """Shape of the Megatron parameter on the rank ``layout`` was made for."""
        sizes = list(self.hf_shapes[0])
        sizes[layout.dim] = layout.length
        return tuple(sizes)


class NameTable:
    """The names of one model: every Hugging Face tensor, and which of them make up a Megatron parameter."""

    def __init__(self, family: Family, shape: ModelShape) -> None:
        self.shape = shape
        self._layer = {name: entry for entry in family.layer_entries for name in entry.megatron}
        self._top = {
            "embedding.word_embeddings.weight": _EMBEDDING,
            "decoder.final_layernorm.weight": _FINAL_NORM,
        }
        self._top["output_layer.weight"] = _TIED_OUTPUT if shape.is_tied else _OUTPUT
        self.hf_shapes: dict[str, tuple[int, ...]] = {}
        """Every tensor the folder must hold, in the order of the model."""
        self._add(_EMBEDDING, "")
        for layer in range(shape.num_layers):
            for entry in family.layer_entries:
                self._add(entry, f"model.layers.{layer}.")
        self._add(_FINAL_NORM, "")
        if not shape.is_tied:
            self._add(_OUTPUT, "")

    def _add(self, entry: Entry, prefix: str) -> None:
        for name, size in zip(entry.hf, entry.hf_shape(self.shape), strict=True):
            self.hf_shapes[prefix + name] = size

    def bind(self, megatron_name: str, layer_offset: int) -> Binding | None:
        """The entry of a parameter, or None if this family has no such parameter.

        Args:
            megatron_name: name in GPTModel, without the prefixes of wrappers.
            layer_offset: global index of the first decoder layer of the parameter's model chunk.
        """
        match = _IN_LAYER.fullmatch(megatron_name)
        if match is None:
            entry, prefix = self._top.get(megatron_name), ""
        else:
            layer = int(match[1]) + layer_offset
            if not 0 <= layer < self.shape.num_layers:
                return None
            entry, prefix = self._layer.get(match[2]), f"model.layers.{layer}."
        if entry is None:
            return None
        names = tuple(prefix + name for name in entry.hf)
        return Binding(entry, names, entry.hf_shape(self.shape), entry is _TIED_OUTPUT)
