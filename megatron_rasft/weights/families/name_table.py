"""The table of one model: every Hugging Face tensor, and the Megatron parameter that it belongs to."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_rasft.weights.families.declaration import Family
from megatron_rasft.weights.families.entries import Entry, JoinedExperts, norm_entry
from megatron_rasft.weights.families.layouts import ShardLayout, vocabulary
from megatron_rasft.weights.families.shape import ModelShape

_EMBEDDING = Entry(
    ("embedding.word_embeddings.weight",),
    ("embed_tokens.weight",),
    lambda s: ((s.vocab_size, s.hidden_size),),
    vocabulary,
)
_FINAL_NORM = norm_entry(("decoder.final_layernorm.weight",), "norm.weight", lambda s: s.hidden_size)


_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_IN_EXPERT = re.compile(
    r"(mlp\.experts\.)(?:local_experts\.(\d+)\.(.+)|(linear_fc[12]\.(?:weight|bias))(\d+))"
)


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

    def is_split(self, shard: Sequence[int]) -> bool:
        """Returns whether the tensor-parallel ranks hold different parts of a parameter, of which one has the shape ``shard``."""
        is_whole = self.entry.may_be_whole and tuple(shard) == self.hf_shapes[0]
        return self.entry.is_sharded and not is_whole

    def shard_shape(self, layout: ShardLayout) -> tuple[int, ...]:
        """Shape of the Megatron parameter on the rank that ``layout`` belongs to."""
        sizes = list(self.hf_shapes[0])
        sizes[layout.dim] = layout.length
        return tuple(sizes)


class JoinedTensor(NamedTuple):
    """A tensor that a folder may have in place of the tensors ``parts``, which lie in it one after the other."""

    shape: tuple[int, ...]
    """The first dimension is the expert."""
    parts: tuple[str, ...]
    is_alternating: bool = False
    """True if the parts of an expert are transposed and their columns alternate, instead."""

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The parts in groups that lie in one piece."""
        size = len(self.parts) // self.shape[0] if self.is_alternating else 1
        return tuple(self.parts[i : i + size] for i in range(0, len(self.parts), size))


class StoredParameter(NamedTuple):
    """Location of a parameter in Megatron's checkpoints, which stack layers, and the experts of a layer, in one tensor."""

    key: str
    single_key: str
    """Key if layers are not stacked (Megatron's non_homogeneous_layers). In that case position[0] is not used."""
    position: tuple[int, ...]
    """Index in the stack: (), (layer,) or (layer, expert). Layers that differ are never stacked: () or (expert,)."""
    stack: tuple[int, ...]
    """Sizes of the dimensions that ``position`` indexes."""
    binding: Binding
    sections: tuple[tuple[str, int], ...] = ()
    """Suffix of the key, and rows, of each tensor into which the parameter is cut; empty if it is one tensor."""


class NameTable:
    """The table of one model: every Hugging Face tensor, and the Megatron parameter that it belongs to."""

    def __init__(self, family: Family, shape: ModelShape) -> None:
        self.shape = shape
        self._prefix = family.prefix
        self.embedding_name = f"{family.prefix}embed_tokens.weight"
        self.output_name = family.output
        self._embedding = _EMBEDDING._replace(hf=(self.embedding_name,))
        self._final_norm = _FINAL_NORM._replace(hf=(f"{family.prefix}norm.weight",))
        output = self.embedding_name if shape.is_tied else family.output
        self._output = _EMBEDDING._replace(megatron=("output_layer.weight",), hf=(output,))
        self._is_mixed = family.mixed_layers is not None
        self._entries = [family.entries(shape, layer) for layer in range(shape.num_layers)]
        by_name = {
            entries: {name: entry for entry in entries for name in entry.megatron}
            for entries in set(self._entries)
        }
        self._layers = [by_name[entries] for entries in self._entries]
        self._top = {entry.megatron[0]: entry for entry in (self._embedding, self._final_norm, self._output)}
        self.hf_shapes: dict[str, tuple[int, ...]] = {
            name: size
            for parameter in self.stored_parameters()
            for name, size in zip(parameter.binding.hf_names, parameter.binding.hf_shapes, strict=True)
        }
        """Every tensor that the folder must contain, in the order of the model."""
        self.buffers = frozenset(
            name for p in self.stored_parameters() if p.binding.entry.is_buffer for name in p.binding.hf_names
        )
        """The tensors of ``hf_shapes`` that are buffers. They keep their type when all weights are converted to another."""
        self.joined: dict[str, JoinedTensor] = {
            f"{prefix}{experts.name}": self._join(experts, prefix)
            for prefix in (f"{family.prefix}layers.{layer}." for layer in range(shape.num_layers))
            for experts in family.joined_experts
            if experts.part_names(prefix, 1)[0] in self.hf_shapes
        }
        """The tensors that a folder may have in place of tensors of ``hf_shapes``."""

    def _join(self, experts: JoinedExperts, prefix: str) -> JoinedTensor:
        parts = experts.part_names(prefix, self.shape.num_experts)
        rows, *columns = self.hf_shapes[parts[0]]
        rows *= len(experts.parts)
        size = (*columns, rows) if experts.is_alternating else (rows, *columns)
        return JoinedTensor((self.shape.num_experts, *size), parts, experts.is_alternating)

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
        entry = self._layers[layer].get(name) if 0 <= layer < self.shape.num_layers else None
        if entry is None:
            return None
        if entry.is_expert and not 0 <= expert < self.shape.num_experts:
            return None
        return self._bind(entry, f"{self._prefix}layers.{layer}.", expert)

    def stored_parameters(self) -> Iterator[StoredParameter]:
        """Yields every parameter with its location in a checkpoint, in the order of the model."""
        yield self._store_top(self._embedding)
        for layer in range(self.shape.num_layers):
            for entry in self._entries[layer]:
                for expert in range(self.shape.num_experts) if entry.is_expert else (0,):
                    yield self._store(entry, layer, expert)
        yield self._store_top(self._final_norm)
        if not self.shape.is_tied:
            yield self._store_top(self._output)

    def _store_top(self, entry: Entry) -> StoredParameter:
        return StoredParameter(entry.megatron[0], entry.megatron[0], (), (), self._bind(entry, "", 0))

    def _store(self, entry: Entry, layer: int, expert: int) -> StoredParameter:
        name = entry.megatron[-1]
        position: tuple[int, ...] = () if self._is_mixed else (layer,)
        stack: tuple[int, ...] = () if self._is_mixed else (self.shape.num_layers,)
        if entry.is_expert:
            name = name.replace("mlp.experts.", "mlp.experts.experts.").removesuffix("{e}")
            position, stack = (*position, expert), (*stack, self.shape.num_experts)
        single_key = f"decoder.layers.{layer}.{name}"
        return StoredParameter(
            single_key if self._is_mixed else f"decoder.layers.{name}",
            single_key,
            position,
            stack,
            self._bind(entry, f"{self._prefix}layers.{layer}.", expert),
            () if entry.sections is None else entry.sections(self.shape),
        )

    def _bind(self, entry: Entry, prefix: str, expert: int) -> Binding:
        names = tuple(prefix + name.format(e=expert) for name in entry.hf)
        return Binding(
            entry,
            names,
            entry.hf_shape(self.shape),
            self.shape.is_tied and entry is self._output,
            prefix,
            expert,
        )

    def same_on(self, binding: Binding, expert: int) -> Binding:
        """Returns the binding of the same parameter in another expert of the layer."""
        return self._bind(binding.entry, binding.prefix, expert)
