"""Families in which most layers have a gated delta net, and the others attention with an output gate."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.config_values import flag, list_of, positive_int
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import (
    ATTENTION,
    MLP,
    QK_NORM,
    Entry,
    JoinedExperts,
    gated_mlp,
    kv_size,
    norm_entry,
    q_size,
)
from megatron_rasft.weights.families.experts import expert_sizes, mixture, router_args
from megatron_rasft.weights.families.layouts import (
    Layout,
    Piece,
    ShardLayout,
    input_split,
    padded_share,
    replicated,
    share,
)
from megatron_rasft.weights.families.shape import DeltaShape, ModelShape

_KINDS = ("linear_attention", "full_attention")


def gated_query_key_value(
    shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None
) -> ShardLayout:
    """Each query group consists of its queries, the gates of their outputs, its key and its value.

    In the Hugging Face tensor the gate of each head follows its query. The groups are split and padded as in ``query_key_value``.
    """
    d, per_group = shape.head_dim, shape.num_attention_heads // shape.num_query_groups
    rows = None if shard is None else shard[0]
    total = shape.num_query_groups * (2 * per_group + 2) * d
    length, start, stop = padded_share(total, rows, tp_rank, tp_size)
    blocks = []
    for group in range(shape.num_query_groups):
        heads = range(group * per_group, (group + 1) * per_group)
        blocks += [Piece(0, 2 * head * d, (2 * head + 1) * d) for head in heads]
        blocks += [Piece(0, (2 * head + 1) * d, (2 * head + 2) * d) for head in heads]
        blocks += [Piece(1, group * d, (group + 1) * d), Piece(2, group * d, (group + 1) * d)]
    return ShardLayout(0, length, _cut(blocks, start, stop))


def _cut(blocks: Sequence[Piece], start: int, stop: int) -> tuple[Piece, ...]:
    """Returns the rows from ``start`` to ``stop`` of the concatenated blocks."""
    pieces, position = [], 0
    for tensor, first, last in blocks:
        low, high = max(start, position), min(stop, position + last - first)
        if low < high:
            pieces.append(Piece(tensor, first + low - position, first + high - position))
        position += last - first
    return tuple(pieces)


def _by_rank(parts: Callable[[DeltaShape], tuple[Piece, ...]]) -> Layout:
    """A parameter in which every rank has its share of each part, one part after the other."""

    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        pieces = []
        for tensor, first, last in parts(delta_of(shape)):
            start, stop = share(last - first, tp_rank, tp_size)
            pieces.append(Piece(tensor, first + start, first + stop))
        return ShardLayout(0, sum(p.stop - p.start for p in pieces), tuple(pieces))

    return layout


def delta_of(shape: ModelShape) -> DeltaShape:
    assert shape.delta is not None, "the family's own_sizes has set it"
    return shape.delta


def _query_key_value_parts(d: DeltaShape) -> tuple[Piece, ...]:
    """The queries, keys and values in a tensor that has them one below the other."""
    return (Piece(0, 0, d.keys), Piece(0, d.keys, 2 * d.keys), Piece(0, 2 * d.keys, 2 * d.keys + d.values))


def _projection_parts(d: DeltaShape) -> tuple[Piece, ...]:
    heads = d.num_value_heads
    return (*_query_key_value_parts(d), Piece(1, 0, d.values), Piece(2, 0, heads), Piece(3, 0, heads))


def _sections(*names: str) -> Callable[[ModelShape], tuple[tuple[str, int], ...]]:
    def sections(shape: ModelShape) -> tuple[tuple[str, int], ...]:
        d = delta_of(shape)
        rows = (d.keys, d.keys, d.values, d.values, d.num_value_heads, d.num_value_heads)
        return tuple((f".{name}", size) for name, size in zip(names, rows, strict=False))

    return sections


_ALL_HEADS = _by_rank(lambda d: (Piece(0, 0, d.num_value_heads),))

GATED_ATTENTION = (
    ATTENTION[0],
    ATTENTION[1]._replace(
        hf_shape=lambda s: (
            (2 * q_size(s), s.hidden_size),
            (kv_size(s), s.hidden_size),
            (kv_size(s), s.hidden_size),
        ),
        layout=gated_query_key_value,
    ),
    ATTENTION[2],
    *QK_NORM,
)

_IN_PROJ = Entry(
    ("self_attention.in_proj.weight",),
    tuple(f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")),
    lambda s: tuple(
        (sum(p.stop - p.start for p in parts), s.hidden_size) for parts in _projection_tensors(s)
    ),
    _by_rank(_projection_parts),
    sections=_sections("query", "key", "value", "z", "beta", "alpha"),
)


def _projection_tensors(shape: ModelShape) -> list[list[Piece]]:
    parts = _projection_parts(delta_of(shape))
    return [[p for p in parts if p.tensor == tensor] for tensor in range(4)]


_REST_OF_DELTA = (
    Entry(
        ("self_attention.conv1d.weight",),
        ("linear_attn.conv1d.weight",),
        lambda s: ((2 * delta_of(s).keys + delta_of(s).values, 1, delta_of(s).kernel_size),),
        _by_rank(_query_key_value_parts),
        sections=_sections("query", "key", "value"),
    ),
    Entry(
        ("self_attention.dt_bias",),
        ("linear_attn.dt_bias",),
        lambda s: ((delta_of(s).num_value_heads,),),
        _ALL_HEADS,
    ),
    Entry(
        ("self_attention.A_log",),
        ("linear_attn.A_log",),
        lambda s: ((delta_of(s).num_value_heads,),),
        _ALL_HEADS,
    ),
    norm_entry(
        ("self_attention.out_norm.weight",), "linear_attn.norm.weight", lambda s: delta_of(s).value_dim
    ),
    Entry(
        ("self_attention.out_proj.weight",),
        ("linear_attn.out_proj.weight",),
        lambda s: ((s.hidden_size, delta_of(s).values),),
        input_split(lambda s: delta_of(s).values),
    ),
)

_DELTA_NORM = ATTENTION[0]._replace(
    megatron=("input_layernorm.weight", "self_attention.in_proj.layer_norm_weight")
)

DELTA_NET = (_DELTA_NORM, _IN_PROJ, *_REST_OF_DELTA)


def _key_head_parts(d: DeltaShape, first: int, last: int) -> tuple[Piece, ...]:
    """The rows of the key heads from ``first`` to ``last`` in tensors that have the parts of each key head together.

    Tensor 0 has a key head's query and key, and the values and gates of its value heads. Tensor 1 has beta and alpha of these.
    """
    repeats = d.num_value_heads // d.num_key_heads
    values = repeats * d.value_dim
    block = 2 * (d.key_dim + values)
    parts = [(0, block, 0, d.key_dim), (0, block, d.key_dim, d.key_dim)]
    parts += [(0, block, 2 * d.key_dim, values), (0, block, 2 * d.key_dim + values, values)]
    parts += [(1, 2 * repeats, 0, repeats), (1, 2 * repeats, repeats, repeats)]
    return tuple(
        Piece(tensor, head * rows + offset, head * rows + offset + size)
        for tensor, rows, offset, size in parts
        for head in range(first, last)
    )


def _grouped_projection(
    shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None
) -> ShardLayout:
    d = delta_of(shape)
    pieces = _key_head_parts(d, *share(d.num_key_heads, tp_rank, tp_size))
    return ShardLayout(0, sum(p.stop - p.start for p in pieces), pieces)


GROUPED_DELTA_NET = (
    _DELTA_NORM,
    _IN_PROJ._replace(
        hf=("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"),
        hf_shape=lambda s: (
            (2 * (delta_of(s).keys + delta_of(s).values), s.hidden_size),
            (2 * delta_of(s).num_value_heads, s.hidden_size),
        ),
        layout=_grouped_projection,
    ),
    *_REST_OF_DELTA,
)
"""The gated delta net of Qwen3-Next."""

MIXTURE = (
    *mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *gated_mlp("mlp.shared_experts", "mlp.shared_expert", lambda s: s.shared_ffn_hidden_size),
    Entry(
        ("mlp.shared_experts.gate_weight",),
        ("mlp.shared_expert_gate.weight",),
        lambda s: ((1, s.hidden_size),),
        replicated(lambda s: 1),
        is_sharded=False,
    ),
)
"""Experts, and a shared expert whose output is multiplied by a gate."""


def mixed(delta: tuple[Entry, ...], mlp: tuple[Entry, ...]) -> Callable[[ModelShape, int], tuple[Entry, ...]]:
    """Returns the function that gives the entries of each layer."""
    kinds = (GATED_ATTENTION + mlp, delta + mlp)
    return lambda shape, layer: kinds[delta_of(shape).is_delta[layer]]


def delta_sizes(config: Config) -> dict[str, Any]:
    """Reads the sizes of the gated delta nets, and which layers have one."""
    num_layers = positive_int(config, "num_hidden_layers")
    kinds = list_of(config, "layer_types", str)
    if not kinds:
        interval = positive_int(config, "full_attention_interval", default=4)
        kinds = [_KINDS[(layer + 1) % interval == 0] for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise ModelFolderError(
            f"layer_types has {len(kinds)} entries for {num_layers} layers (num_hidden_layers)"
        )
    delta = DeltaShape(
        num_key_heads=positive_int(config, "linear_num_key_heads", default=16),
        num_value_heads=positive_int(config, "linear_num_value_heads", default=32),
        key_dim=positive_int(config, "linear_key_head_dim", default=128),
        value_dim=positive_int(config, "linear_value_head_dim", default=128),
        kernel_size=positive_int(config, "linear_conv_kernel_dim", default=4),
        is_delta=tuple(kind == _KINDS[0] for kind in kinds),
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise ModelFolderError(
            f"linear_num_value_heads {delta.num_value_heads} is not a multiple of linear_num_key_heads {delta.num_key_heads}"
        )
    return {"delta": delta}


def delta_args(config: Config, shape: ModelShape) -> dict[str, Any]:
    """Returns Megatron's arguments for gated delta nets, gated attention and zero-centred norms."""
    delta = delta_of(shape)
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(is_delta) for is_delta in delta.is_delta],
        "linear_num_key_heads": delta.num_key_heads,
        "linear_num_value_heads": delta.num_value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.kernel_size,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
    }


def _mixture_sizes(config: Config, num_experts: int = 512) -> dict[str, Any]:
    return {
        **expert_sizes(config, size=512, num_experts=num_experts),
        "shared_ffn_hidden_size": positive_int(config, "shared_expert_intermediate_size", default=512),
        **delta_sizes(config),
    }


def _mixture_args(config: Config, shape: ModelShape, top_k: int, *, is_normalized: bool) -> dict[str, Any]:
    return {
        **delta_args(config, shape),
        **router_args(config, shape, top_k, is_normalized=is_normalized),
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size,
        "moe_shared_expert_gate": True,
    }


QWEN3_5 = Family(
    architecture="Qwen3_5ForCausalLM",
    attention=GATED_ATTENTION,
    mixed_layers=mixed(DELTA_NET, MLP),
    layer_types=_KINDS,
    default_head_dim=256,
    default_query_groups=4,
    default_max_position_embeddings=32768,
    default_partial_rotary=0.25,
    is_carried=lambda name, shape: name.startswith("mtp."),
    own_sizes=delta_sizes,
    own_args=delta_args,
)

QWEN3_5_VISION = replace(
    QWEN3_5,
    architecture="Qwen3_5ForConditionalGeneration",
    text_model_type="qwen3_5_text",
    prefix="model.language_model.",
    is_carried=lambda name, shape: name.startswith(("model.visual.", "mtp.")),
)
"""Qwen3.5 as it is published: the model also sees images, which this project does not train."""

QWEN3_5_MOE = replace(
    QWEN3_5,
    architecture="Qwen3_5MoeForCausalLM",
    mlp=MIXTURE,
    mixed_layers=mixed(DELTA_NET, MIXTURE),
    joined_experts=(
        JoinedExperts(
            "mlp.experts.gate_up_proj",
            parts=("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        ),
        JoinedExperts("mlp.experts.down_proj", parts=("mlp.experts.{e}.down_proj.weight",)),
    ),
    default_query_groups=2,
    own_sizes=lambda config: _mixture_sizes(config, num_experts=256),
    own_args=lambda config, shape: _mixture_args(config, shape, 8, is_normalized=True),
)

QWEN3_5_MOE_VISION = replace(
    QWEN3_5_MOE,
    architecture="Qwen3_5MoeForConditionalGeneration",
    text_model_type="qwen3_5_moe_text",
    prefix=QWEN3_5_VISION.prefix,
    is_carried=QWEN3_5_VISION.is_carried,
    writes_joined_experts=True,
)

QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    architecture="Qwen3NextForCausalLM",
    joined_experts=(),
    mixed_layers=mixed(GROUPED_DELTA_NET, MIXTURE),
    own_sizes=_mixture_sizes,
    own_args=lambda config, shape: _mixture_args(
        config, shape, 10, is_normalized=flag(config, "norm_topk_prob", default=True)
    ),
)
