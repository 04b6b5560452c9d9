"""Random architectures of every family: with any sizes and any split, loading and exporting restores every element."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from megatron_rasft.tools.conversion.conversion import hf_to_megatron, megatron_to_hf
from megatron_rasft.tools.conversion.round_trip import prove
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder
from megatron_rasft.weights.families import FAMILIES, Binding, Family, ModelShape, NameTable
from megatron_rasft.weights.families.shape import DeltaShape, LatentShape
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import assemble
from megatron_rasft.weights.loading import ExpertRanks, bound_parameters, read_shard

_QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def shapes(draw: st.DrawFn, family: Family, tp_size: int = 1) -> ModelShape:
    """Draws sizes, including odd sizes wherever ``tp_size`` need not divide them."""
    groups, num_layers, ffn = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        tp_size * draw(st.integers(1, 7)),
    )
    shape = ModelShape(
        num_layers=num_layers,
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=ffn,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        head_dim=2 * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 40)),
        is_tied=draw(st.booleans()),
        has_qkv_bias=family.has_qkv_bias,
        has_qk_norm=family.has_qk_norm,
        num_experts=draw(st.integers(1, 6)) if family.has_experts else 0,
        **draw(shared_sizes(tp_size, num_layers, ffn)) if has_shared_experts(family) else {},
        **{"shared_ffn_hidden_size": ffn} if has_gated_expert(family) else {},
        delta=draw(delta_shapes(tp_size, num_layers)) if has_delta(family) else None,
    )
    return draw(latent_sizes(shape, tp_size)) if family.has_latent_attention else shape


@st.composite
def delta_shapes(draw: st.DrawFn, tp_size: int, num_layers: int) -> DeltaShape:
    key_heads = tp_size * draw(st.integers(1, 2))
    return DeltaShape(
        num_key_heads=key_heads,
        num_value_heads=key_heads * draw(st.integers(1, 3)),
        key_dim=draw(st.integers(1, 4)),
        value_dim=draw(st.integers(1, 4)),
        kernel_size=draw(st.integers(1, 4)),
        is_delta=tuple(draw(st.booleans()) for _ in range(num_layers)),
    )


@st.composite
def latent_sizes(draw: st.DrawFn, shape: ModelShape, tp_size: int) -> ModelShape:
    """Replaces grouped attention by multi-latent attention, whose heads and latents ``tp_size`` divides."""
    heads, value_dim = tp_size * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    latent = LatentShape(
        query_rank=draw(st.none() | st.integers(1, 3).map(lambda n: n * tp_size)),
        key_value_rank=tp_size * draw(st.integers(1, 3)),
        plain_dim=draw(st.integers(1, 4)),
        rotary_dim=2 * tp_size * draw(st.integers(1, 2)),
        value_dim=value_dim,
    )
    return replace(
        shape, num_attention_heads=heads, num_query_groups=heads, head_dim=value_dim, latent=latent
    )


def has_shared_experts(family: Family) -> bool:
    """Whether a family has GLM's shared experts, which have no gate."""
    has_shared = any("shared_experts.linear" in name for entry in family.mlp for name in entry.megatron)
    return has_shared and not has_gated_expert(family)


def has_gated_expert(family: Family) -> bool:
    """Whether a family has Qwen's shared expert, which has a gate."""
    return any("mlp.shared_experts.gate_weight" in entry.megatron for entry in family.mlp)


def has_delta(family: Family) -> bool:
    return "linear_attention" in family.layer_types


@st.composite
def shared_sizes(draw: st.DrawFn, tp_size: int, num_layers: int, ffn: int) -> dict[str, int]:
    """Draws the sizes of shared experts, and of the MLP in first layers without experts."""
    return {
        "num_dense_layers": draw(st.integers(0, num_layers - 1)),
        "dense_ffn_hidden_size": tp_size * draw(st.integers(1, 7)),
        "shared_ffn_hidden_size": ffn * draw(st.integers(1, 2)),
    }


def distinct_tensors(table: NameTable) -> dict[str, Tensor]:
    """Makes tensors in which no two elements of the model are equal."""
    tensors, start = {}, 0
    for name, shape in table.hf_shapes.items():
        count = math.prod(shape)
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    return tensors


def shard_of(binding: Binding, table: NameTable, tensors: dict[str, Tensor], rank: int, size: int) -> Tensor:
    """Returns a rank's shard, with -1 as padding of the vocabulary and of the query groups."""
    whole = binding.shard_shape(binding.entry.layout(table.shape, 0, 1, None))
    dim = binding.entry.layout(table.shape, 0, 1, None).dim
    length = padded_length(binding, table.shape, whole[dim], size)
    shape = [*whole[:dim], length // size, *whole[dim + 1 :]] if binding.entry.is_sharded else whole
    layout = binding.entry.layout(table.shape, rank if binding.entry.is_sharded else 0, size, shape)
    shard = torch.full(binding.shard_shape(layout), -1.0)
    assert list(shard.shape) == list(shape)
    position = 0
    for tensor, start, stop in layout.pieces:
        piece = tensors[binding.hf_names[tensor]].narrow(layout.dim, start, stop - start)
        shard.narrow(layout.dim, position, stop - start).copy_(piece)
        position += stop - start
    return shard


def padded_length(binding: Binding, shape: ModelShape, length: int, size: int) -> int:
    name = binding.entry.megatron[0]
    if (
        name.startswith(("self_attention.linear", "self_attention.core_attention")) and shape.latent is None
    ):  # as with --rasft-query-groups
        return length // shape.num_query_groups * (-(-shape.num_query_groups // size) * size)
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return -(-length // size) * size
    return length


@pytest.mark.parametrize("architecture", FAMILIES)
@_QUIET
@given(data=st.data())
def test_ranks_hold_every_element_once_and_give_it_back(architecture: str, data: st.DataObject) -> None:
    family = FAMILIES[architecture]
    tp_size = data.draw(st.integers(1, 8), "tp_size")
    table = NameTable(family, data.draw(shapes(family, tp_size), "shape"))
    tensors = distinct_tensors(table)
    back: dict[str, Tensor] = {}
    for parameter in table.stored_parameters():
        binding = parameter.binding
        shards = [shard_of(binding, table, tensors, rank, tp_size) for rank in range(tp_size)]
        if binding.entry.is_sharded:
            held = torch.cat([s.flatten() for s in shards])
            wanted = torch.cat([tensors[name].flatten() for name in binding.hf_names])
            assert torch.equal(held[held >= 0].sort().values, wanted.sort().values)
        back |= dict(zip(binding.hf_names, assemble(shards, binding, table), strict=True))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


class Chunk:
    """Replaces the model chunk of a rank: names, and shards of the right shapes."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters.items()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()


class Folder:
    """Replaces an opened folder."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self.tensors[name].narrow(dim, start, stop - start)


def names_of(
    family: Family, shape: ModelShape, layers: range, num_local_experts: int, is_grouped: bool
) -> list[str]:
    """Names of the parameters in a middle chunk, as Megatron names them on the rank."""
    names = []
    for layer, index in enumerate(layers):
        for entry in family.entries(shape, index):
            name = entry.megatron[-1 if is_grouped or not entry.is_expert else 0]
            numbers = range(num_local_experts) if entry.is_expert else (0,)
            names += [f"decoder.layers.{layer}.{name.format(e=number)}" for number in numbers]
    return names


@pytest.mark.parametrize("architecture", FAMILIES)
@settings(_QUIET, max_examples=25)
@given(data=st.data())
def test_every_split_over_ranks_loads_all_and_gives_it_back(architecture: str, data: st.DataObject) -> None:
    """With TP, PP, VPP, EP and ETP at once the shards of all ranks make up the model exactly once."""
    family = FAMILIES[architecture]
    tp_size, etp_size = data.draw(st.integers(1, 4), "tp_size"), data.draw(st.integers(1, 3), "etp_size")
    shape = data.draw(shapes(family, tp_size * etp_size), "shape")
    ep_sizes = [n for n in range(1, shape.num_experts + 1) if shape.num_experts % n == 0]
    ep_size = data.draw(st.sampled_from(ep_sizes or [1]), "ep_size")
    cuts = sorted(data.draw(st.lists(st.integers(0, shape.num_layers), max_size=3), "cuts between chunks"))
    is_grouped = data.draw(st.booleans(), "grouped GEMM")
    table = NameTable(family, shape)
    tensors, num_local = distinct_tensors(table), shape.num_experts // ep_size
    shards: dict[tuple[str, ...], dict[int, Tensor]] = {}
    bindings: dict[tuple[str, ...], Binding] = {}
    for first, last in zip([0, *cuts], [*cuts, shape.num_layers], strict=True):
        names = names_of(family, shape, range(first, last), num_local, is_grouped)
        names += ["embedding.word_embeddings.weight"] * (first == 0)
        names += ["decoder.final_layernorm.weight"] * (last == shape.num_layers)
        names += ["output_layer.weight"] * (last == shape.num_layers and not shape.is_tied)
        for ep_rank, rank in product(range(ep_size), range(math.lcm(tp_size, etp_size))):
            experts = ExpertRanks(ep_rank, ep_size, rank % etp_size, etp_size)
            expected = {}
            for name in names:
                binding = table.bind(name, first, ep_rank * num_local)
                assert binding is not None
                cut = (rank % etp_size, etp_size) if binding.entry.is_expert else (rank % tp_size, tp_size)
                expected[name] = shard_of(binding, table, tensors, *cut)
            bound = bound_parameters([Chunk(expected)], table, [first], rank % tp_size, tp_size, experts)
            for param, binding, layout in bound:
                read = read_shard(Folder(tensors), binding, layout)
                assert torch.equal(read[read > 0], param[param > 0])
                number = rank % (etp_size if binding.entry.is_expert else tp_size)
                shards.setdefault(binding.hf_names, {})[number] = read
                bindings[binding.hf_names] = binding
    back: dict[str, Tensor] = {}
    for names, held in shards.items():
        in_order = [shard for _, shard in sorted(held.items())]
        back |= dict(zip(names, assemble(in_order, bindings[names], table), strict=True))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def config_of(family: Family, shape: ModelShape) -> dict:
    config: dict = {
        "architectures": [family.architecture],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.is_tied,
        "sliding_window": None,
        "dtype": "float32",
    }
    if family.has_experts:
        config |= {"num_local_experts": shape.num_experts, "num_experts_per_tok": 1}
        config["moe_intermediate_size"] = shape.ffn_hidden_size
    if has_shared_experts(family):
        config |= {
            "intermediate_size": shape.dense_ffn_hidden_size,
            "moe_intermediate_size": shape.ffn_hidden_size,
            "first_k_dense_replace": shape.num_dense_layers,
            "n_shared_experts": shape.shared_ffn_hidden_size // shape.ffn_hidden_size,
            "norm_topk_prob": False,  # there is one expert per token
            "attention_bias": shape.has_qkv_bias,
            "use_qk_norm": shape.has_qk_norm,
        }
    if shape.latent is not None:
        dense = shape.num_dense_layers
        config |= {
            "q_lora_rank": shape.latent.query_rank,
            "kv_lora_rank": shape.latent.key_value_rank,
            "qk_nope_head_dim": shape.latent.plain_dim,
            "qk_rope_head_dim": shape.latent.rotary_dim,
            "v_head_dim": shape.latent.value_dim,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (shape.num_layers - dense),
        }
    if has_gated_expert(family):
        config |= {
            "moe_intermediate_size": shape.ffn_hidden_size,
            "shared_expert_intermediate_size": shape.shared_ffn_hidden_size,
        }
    if shape.delta is not None:
        config |= delta_config_of(shape.delta)
    if family.text_model_type is not None:
        config = {"architectures": config.pop("architectures"), "text_config": config}
    return config


def delta_config_of(delta: DeltaShape) -> dict:
    return {
        "linear_num_key_heads": delta.num_key_heads,
        "linear_num_value_heads": delta.num_value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.kernel_size,
        "layer_types": ["linear_attention" if is_delta else "full_attention" for is_delta in delta.is_delta],
    }


@pytest.mark.parametrize("architecture", FAMILIES)
@settings(_QUIET, max_examples=8)
@given(data=st.data())
def test_random_models_come_back_from_the_disk_bit_equal(architecture: str, data: st.DataObject) -> None:
    family = FAMILIES[architecture]
    shape = data.draw(shapes(family), "shape")
    types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    dtype, vector_dtype = data.draw(types, "dtype"), data.draw(types, "type of norms and biases")
    more_groups = 0 if shape.latent else data.draw(st.integers(0, 3), "added query groups")
    with TemporaryDirectory() as name:
        root = Path(name)
        (root / "hf").mkdir()
        (root / "hf/config.json").write_text(
            json.dumps(config_of(family, shape) | {"dtype": str(dtype).removeprefix("torch.")})
        )
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
        tensors = {
            name: torch.randn(size, generator=generator).to(dtype if len(size) > 1 else vector_dtype)
            for name, size in NameTable(family, shape).hf_shapes.items()
        }
        save_file(tensors, root / "hf/model.safetensors", {"format": "pt"})
        folder = HfFolder.open(root / "hf")
        assert folder.shape == shape
        hf_to_megatron(folder, root / "megatron", query_groups=shape.num_query_groups + more_groups)
        checkpoint = TorchDistFolder.open(root / "megatron")
        assert prove(checkpoint, folder, is_export=False).faults == []
        megatron_to_hf(checkpoint, folder, root / "back", max_shard_bytes=data.draw(st.integers(1, 10_000)))
        back = HfFolder.open(root / "back")
        assert all(torch.equal(back.read(name), tensor) for name, tensor in tensors.items())
        assert all(back.tensors[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert back.tensors.keys() == tensors.keys()
