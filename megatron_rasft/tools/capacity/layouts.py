"""The layouts of a model over GPUs, and the parameters that each rank of a layout holds, as Megatron builds them."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from megatron_rasft.tools.capacity.config import CapacityConfig
from megatron_rasft.weights.architecture import ModelDescription, megatron_args, splits_attention
from megatron_rasft.weights.families import Entry, Family, ModelShape, NameTable

_CONTEXT_SHARE = 4096
"""Minimum tokens of a sequence on a context-parallel rank, unless the user gives the size. Every sample of a packed sequence is
cut into as many parts, and short parts waste time."""

Recompute = Literal["none", "selective", "full"]

_VOCABULARY_UNIT = 128
"""Megatron's --make-vocab-size-divisible-by. Megatron pads the vocabulary to a multiple of this times the tensor-parallel size."""

_MAX_CHUNKS = 5
"""Maximum number of model chunks per stage to consider; published layouts of 70B models have 5."""


@dataclass(frozen=True)
class Model:
    """The sizes of a model, from its config.json."""

    path: str
    family: Family
    stored: ModelShape
    """The sizes of the model in the folder."""
    shape: ModelShape
    """The sizes of Megatron's model, including the query groups that --rasft-query-groups adds."""
    top_k: int
    """Number of experts per token; 0 for a model without experts."""
    max_positions: int
    rotary_percent: float = 1.0
    """Share of a head's elements that is rotated."""
    windows: tuple[int | None, ...] = ()
    """Tokens that each layer sees, if layers have a sliding window; None in a layer without. Empty: no layer has one."""

    @classmethod
    def read(cls, path: Path, query_groups: int | None = None) -> "Model":
        """Reads the folder's config.json.

        Raises:
            ModelFolderError, ValueError: one line with the mistake and the way out.
        """
        described = ModelDescription.read(path)
        args = megatron_args(described, query_groups)
        shape = replace(
            described.shape,
            num_attention_heads=args["num_attention_heads"],
            num_query_groups=args["num_query_groups"],
        )
        return cls(
            path=str(path),
            family=described.family,
            stored=described.shape,
            shape=shape,
            top_k=args.get("moe_router_topk", 0),
            max_positions=args["max_position_embeddings"],
            rotary_percent=args["rotary_percent"],
            windows=_windows(args),
        )

    @property
    def num_parameters(self) -> int:
        """Number of parameters in the folder."""
        return self._count(self.stored.num_experts)

    @property
    def layers_with_experts(self) -> range:
        """The layers that have experts; the layers before them, or all, have one MLP."""
        num_layers = self.shape.num_layers
        return range(self.shape.num_dense_layers if self.shape.num_experts else num_layers, num_layers)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that one token uses: those outside experts, and top_k experts."""
        return self._count(self.top_k)

    def _count(self, num_experts: int) -> int:
        layers = sum(
            sum(math.prod(size) for size in entry.hf_shape(self.stored))
            * (num_experts if entry.is_expert else 1)
            for layer in range(self.stored.num_layers)
            for entry in self.family.entries(self.stored, layer)
        )
        embedding = self.stored.vocab_size * self.stored.hidden_size
        ends = embedding * (1 if self.stored.is_tied else 2) + self.stored.hidden_size
        return layers + ends


def _windows(args: dict[str, Any]) -> tuple[int | None, ...]:
    if args["window_size"] is None:
        return ()
    return tuple(args["window_size"][0] + 1 if on else None for on in args["window_attn_skip_freq"])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel sizes of the trainer, and its recomputation."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int = 1
    expert_tp: int
    """Number of ranks over which each expert is split."""
    chunks: int = 1
    """Model chunks per pipeline stage; more than 1 means the interleaved schedule."""
    recompute: Recompute = "none"

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_replicas(self) -> int:
        """Number of ranks that share the optimizer's states of parameters outside experts."""
        return self.dp * self.cp

    @property
    def num_expert_replicas(self) -> int:
        return self.num_gpus // (self.pp * self.ep * self.expert_tp)


class LayerShards(NamedTuple):
    """Number of elements of each parameter of a layer on one rank."""

    plain: tuple[int, ...]
    """Parameters of the layer, without its experts."""
    expert: tuple[int, ...]
    """Parameters of one expert; empty if the layer has none."""
    linear: int
    """Sum over the matrices of the layer, without its experts."""


class Shards(NamedTuple):
    """Number of elements of each parameter on one rank."""

    layers: tuple[LayerShards, ...]
    embedding: int
    final_norm: int


@lru_cache(maxsize=64)
def shards(model: Model, tp: int, expert_tp: int) -> Shards:
    """The parameters that one of ``tp`` ranks holds of each layer, the embedding and the final norm.

    Raises:
        ValueError: a weight does not divide by ``tp``.
    """
    shape = replace(model.shape, vocab_size=padded_vocabulary(model, tp))
    top = NameTable(model.family, replace(shape, num_layers=1))
    embedding = top.bind("embedding.word_embeddings.weight", 0)
    final_norm = top.bind("decoder.final_layernorm.weight", 0)
    assert embedding is not None and final_norm is not None, "every model has them"
    kinds = [model.family.entries(shape, layer) for layer in range(shape.num_layers)]
    held = {entries: _layer_shards(entries, shape, tp, expert_tp) for entries in set(kinds)}
    return Shards(
        layers=tuple(held[entries] for entries in kinds),
        embedding=_numel(embedding.entry, shape, tp),
        final_norm=_numel(final_norm.entry, shape, tp),
    )


def _layer_shards(entries: tuple[Entry, ...], shape: ModelShape, tp: int, expert_tp: int) -> LayerShards:
    parameters = [e for e in entries if not e.is_buffer]
    plain = [e for e in parameters if not e.is_expert]
    return LayerShards(
        plain=tuple(_numel(e, shape, tp) for e in plain),
        expert=tuple(_numel(e, shape, expert_tp) for e in parameters if e.is_expert),
        linear=sum(_numel(e, shape, tp) for e in plain if e.is_sharded and len(e.hf_shape(shape)[0]) == 2),
    )


def _numel(entry: Entry, shape: ModelShape, tp: int) -> int:
    layout = entry.layout(shape, 0, 1 if entry.may_be_whole else tp, None)
    sizes = list(entry.hf_shape(shape)[0])
    sizes[layout.dim] = layout.length
    return math.prod(sizes)


def padded_vocabulary(model: Model, tp: int) -> int:
    """Rows of Megatron's embedding, with the padding."""
    unit = _VOCABULARY_UNIT * tp
    return -(-model.shape.vocab_size // unit) * unit


class Chunk(NamedTuple):
    """Parameters of one model chunk on one rank: number of elements of a parameter -> number of such parameters."""

    layers: range
    """Global indices of the layers."""
    dense: Counter[int]
    expert: Counter[int]

    @property
    def num_dense(self) -> int:
        """Elements of all parameters outside experts."""
        return sum(size * count for size, count in self.dense.items())

    @property
    def num_expert(self) -> int:
        """Elements of all parameters of experts."""
        return sum(size * count for size, count in self.expert.items())


def stage_chunks(model: Model, layout: Layout, stage: int) -> list[Chunk]:
    """The model chunks of a rank of this pipeline stage."""
    held = shards(model, layout.tp, layout.expert_tp)
    num_experts = model.shape.num_experts // layout.ep
    last_stage = layout.pp - 1
    made = []
    for place, layers in enumerate(chunk_layers(model, layout, stage)):
        is_first = stage == 0 and place == 0
        is_last = stage == last_stage and place == layout.chunks - 1
        # Megatron keeps a second copy of a tied embedding on the last stage unless the embedding is on it too
        has_output = is_last and not (model.shape.is_tied and is_first)
        dense, expert = Counter[int](), Counter[int]()
        for layer in layers:
            dense.update(held.layers[layer].plain)
            for size in held.layers[layer].expert:
                expert[size] += num_experts
        dense[held.embedding] += is_first + has_output
        dense[held.final_norm] += is_last
        made.append(Chunk(layers, +dense, expert))
    return made


def chunk_layers(model: Model, layout: Layout, stage: int) -> list[range]:
    """The layers of each model chunk of a pipeline stage. Consecutive chunks of the model are on consecutive stages."""
    length = model.shape.num_layers // (layout.pp * layout.chunks)
    starts = ((place * layout.pp + stage) * length for place in range(layout.chunks))
    return [range(start, start + length) for start in starts]


def candidates(model: Model, config: CapacityConfig, num_gpus: int) -> Iterator[Layout]:
    """Yields every layout of ``num_gpus`` GPUs that pretrain_rasft.py accepts, with every kind of recomputation."""
    for tp, pp, cp in _sizes(model, config, num_gpus):
        dp = num_gpus // (tp * pp * cp)
        for ep in _expert_sizes(model, config, tp * cp * dp):
            for chunks in _chunk_counts(model, config, pp):
                for recompute in get_args(Recompute) if config.recompute == "any" else [config.recompute]:
                    yield Layout(
                        tp=tp,
                        pp=pp,
                        cp=cp,
                        dp=dp,
                        ep=ep,
                        expert_tp=tp if ep == 1 and not model.family.has_expert_biases else 1,
                        chunks=chunks,
                        recompute=recompute,
                    )


def _sizes(model: Model, config: CapacityConfig, num_gpus: int) -> Iterator[tuple[int, int, int]]:
    """Yields tensor-, pipeline- and context-parallel sizes."""
    for tp in _divisors(config.gpus_per_node, config.tensor_model_parallel_size):
        if not splits_heads(model, tp):
            continue
        for pp in _divisors(model.shape.num_layers, config.pipeline_model_parallel_size):
            for cp in _context_sizes(config):
                if num_gpus % (tp * pp * cp) or (cp > 1 and config.seq_length % (2 * cp * tp)):
                    continue
                if not splits_delta_heads(model, tp * cp):
                    continue
                dp = num_gpus // (tp * pp * cp)
                if config.global_batch_size % (config.micro_batch_size * dp) == 0:
                    yield tp, pp, cp


def _context_sizes(config: CapacityConfig) -> list[int]:
    if config.context_parallel_size is not None:
        return [config.context_parallel_size]
    return [cp for cp in (1, 2, 4, 8) if cp == 1 or config.seq_length >= cp * _CONTEXT_SHARE]


def splits_heads(model: Model, tp: int) -> bool:
    """Whether Megatron can split the attention, and the MLP, over ``tp`` ranks."""
    heads, groups = model.shape.num_attention_heads, model.shape.num_query_groups
    s = model.shape
    inner = (s.ffn_hidden_size, s.dense_ffn_hidden_size, s.shared_ffn_hidden_size)
    if not splits_attention(heads, groups, tp) or any(size % tp for size in inner):
        return False
    return (groups * (heads // groups + 2) * model.shape.head_dim) % tp == 0


def splits_delta_heads(model: Model, num_ranks: int) -> bool:
    """Whether Megatron can spread the heads of gated delta nets over the tensor- and context-parallel ranks."""
    delta = model.shape.delta
    return delta is None or (delta.num_key_heads % num_ranks == delta.num_value_heads % num_ranks == 0)


def _divisors(number: int, fixed: int | None) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0 and fixed in (None, n)]


def _expert_sizes(model: Model, config: CapacityConfig, num_ranks: int) -> list[int]:
    """Expert-parallel sizes that divide the ``num_ranks`` ranks of a pipeline stage."""
    sizes = _divisors(max(1, model.shape.num_experts), config.expert_model_parallel_size)
    return [ep for ep in sizes if num_ranks % ep == 0]


def _chunk_counts(model: Model, config: CapacityConfig, pp: int) -> list[int]:
    """Numbers of model chunks per stage. More than one needs a pipeline."""
    layers = model.shape.num_layers // pp
    fixed = config.num_layers_per_virtual_pipeline_stage
    if fixed is not None:
        if fixed == 0:
            return [1]
        return [layers // fixed] if pp > 1 and layers % fixed == 0 and layers // fixed > 1 else []
    return [n for n in range(1, _MAX_CHUNKS + 1) if layers % n == 0 and (n == 1 or pp > 1)]
