"""Compares the tables and layouts with independent formulas."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rasft.weights import families
from megatron_rasft.weights.families import FAMILIES, Binding, ModelShape, NameTable
from megatron_rasft.weights.families.shape import DeltaShape, LatentShape
from tests.tiny_models import hf_class, hf_config, save_model

LATENT = LatentShape(query_rank=6, key_value_rank=4, plain_dim=3, rotary_dim=4, value_dim=4)
LAYER = "decoder.layers.1."
LAYER_TYPES = ["linear_attention", "full_attention", "linear_attention"]


DELTA = DeltaShape(
    num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=3, kernel_size=4, is_delta=(True, False, True)
)


def own_sizes(architecture: str) -> dict[str, Any]:
    """Sizes that only some families have."""
    family, sizes = FAMILIES[architecture], {}
    if "linear_attention" in family.layer_types:
        sizes["delta"] = DELTA
    if any("mlp.shared_experts.gate_weight" in entry.megatron for entry in family.mlp):
        sizes["shared_ffn_hidden_size"] = 12
    return sizes


def shape(heads: int = 4, groups: int = 2, tied: bool = False, **more: Any) -> ModelShape:
    sizes = {
        "num_layers": 3,
        "hidden_size": 8,
        "ffn_hidden_size": 12,
        "head_dim": 4,
        "vocab_size": 11,
        **more,
    }
    return ModelShape(
        num_attention_heads=heads,
        num_query_groups=groups,
        is_tied=tied,
        has_qkv_bias=False,
        has_qk_norm=False,
        **sizes,
    )


def table_of(architecture: str, sizes: ModelShape) -> NameTable:
    """Returns a table of the package families, executed again.

    mutmut changes functions after the first import, which has already called those of FAMILIES.
    """
    name = families.__name__
    first = {
        key: sys.modules.pop(key) for key in list(sys.modules) if key == name or key.startswith(name + ".")
    }
    try:
        module = importlib.import_module(name)
    finally:
        sys.modules.update(first)
    family = module.FAMILIES[architecture]
    return module.NameTable(family, replace(sizes, latent=LATENT) if family.has_latent_attention else sizes)


def bind(table: NameTable, name: str, layer_offset: int = 0) -> Binding:
    binding = table.bind(name, layer_offset)
    assert binding is not None, name
    return binding


def shards(
    table: NameTable,
    name: str,
    hf: list[torch.Tensor],
    tp_size: int,
    shard_shape: tuple[int, ...] | None = None,
) -> list:
    """Every rank's shard according to the table's layouts, without padding."""
    binding = bind(table, name)
    result = []
    for rank in range(tp_size):
        layout = binding.entry.layout(table.shape, rank, tp_size, shard_shape)
        assert all(piece.start < piece.stop for piece in layout.pieces), "an empty piece is left out"
        pieces = [hf[p.tensor].narrow(layout.dim, p.start, p.stop - p.start) for p in layout.pieces]
        result.append(torch.cat(pieces, layout.dim) if pieces else torch.empty(0))
    return result


@pytest.mark.parametrize("heads,groups", [(4, 2), (4, 4), (4, 1), (6, 2), (6, 3), (8, 2), (12, 6)])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_query_key_value_are_interleaved_by_group(heads: int, groups: int, tp_size: int) -> None:
    table = table_of("LlamaForCausalLM", shape(heads, groups))
    d, per_group = 4, heads // groups
    q, k, v = (torch.randn(n * d, 8) for n in (heads, groups, groups))
    by_group = torch.cat(
        [q.view(groups, per_group, d, 8), k.view(groups, 1, d, 8), v.view(groups, 1, d, 8)], 1
    )
    expected = by_group.reshape(-1, 8).chunk(tp_size)
    got = shards(table, LAYER + "self_attention.linear_qkv.weight", [q, k, v], tp_size)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_added_query_groups_are_padding_of_the_last_ranks() -> None:
    """A folder with 3 groups of 2 heads, in a model with 4 groups on 2 ranks."""
    table = table_of("LlamaForCausalLM", shape(6, 3))
    q, k, v, o = torch.randn(24, 8), torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 24)
    groups = [torch.cat([q[8 * g : 8 * g + 8], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]]) for g in range(3)]
    first, second = shards(table, LAYER + "self_attention.linear_qkv.weight", [q, k, v], 2, (32, 8))
    assert torch.equal(first, torch.cat(groups[:2])) and torch.equal(second, groups[2])
    first, second = shards(table, LAYER + "self_attention.linear_proj.weight", [o], 2, (8, 16))
    assert torch.equal(first, o[:, :16]) and torch.equal(second, o[:, 16:])
    first, second = shards(table, LAYER + "self_attention.linear_proj.weight", [o], 2, (8, 24))
    assert torch.equal(first, o) and second.numel() == 0


def test_gate_and_up_are_concatenated_per_rank() -> None:
    table = table_of("LlamaForCausalLM", shape())
    gate, up = torch.randn(12, 8), torch.randn(12, 8)
    got = shards(table, LAYER + "mlp.linear_fc1.weight", [gate, up], 2)
    assert torch.equal(got[1], torch.cat([gate[6:], up[6:]]))


def test_row_parallel_weights_are_cut_along_their_columns() -> None:
    table = table_of("LlamaForCausalLM", shape())
    down = torch.randn(8, 12)
    assert torch.equal(shards(table, LAYER + "mlp.linear_fc2.weight", [down], 3)[2], down[:, 8:])


def test_padding_rows_have_no_source() -> None:
    table = table_of("LlamaForCausalLM", shape())
    embedding = torch.randn(11, 8)
    assert torch.equal(
        shards(table, "embedding.word_embeddings.weight", [embedding], 1, (11, 8))[0], embedding
    )
    got = shards(table, "embedding.word_embeddings.weight", [embedding], 4, (4, 8))
    assert [g.shape[0] for g in got] == [4, 4, 3, 0]
    assert torch.equal(torch.cat(got[:3]), embedding)


def test_padded_vocabulary_may_not_be_smaller_than_the_model() -> None:
    table = table_of("LlamaForCausalLM", shape())
    with pytest.raises(ValueError, match="--padded-vocab-size 10"):
        shards(table, "output_layer.weight", [torch.randn(11, 8)], 1, (10, 8))


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_hf_tensor_has_exactly_one_parameter(architecture: str, is_tied: bool) -> None:
    family = FAMILIES[architecture]
    num_experts = 5 if family.has_experts else 0
    table = table_of(architecture, shape(tied=is_tied, num_experts=num_experts, **own_sizes(architecture)))
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    names += [] if is_tied else ["output_layer.weight"]
    for which in (0, -1):  # plain layers, fused layers
        layers = [
            f"decoder.layers.{layer}.{entry.megatron[which].format(e=expert)}"
            for layer in range(3)
            for entry in family.entries(table.shape, layer)
            for expert in (range(num_experts) if entry.is_expert else (0,))
        ]
        bound = [hf for name in names + layers for hf in bind(table, name).hf_names]
        assert sorted(bound) == sorted(table.hf_shapes)
    stored = [hf for parameter in table.stored_parameters() for hf in parameter.binding.hf_names]
    assert stored == list(table.hf_shapes)


def test_experts_count_from_their_rank() -> None:
    table = table_of("MixtralForCausalLM", shape(num_experts=4))
    for name in ("mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight1"):
        binding = table.bind(LAYER + name, 0, expert_offset=2)
        assert binding is not None
        assert binding.hf_names == ("model.layers.1.block_sparse_moe.experts.3.w2.weight",)
        assert table.bind(LAYER + name, 0, expert_offset=3) is None


@pytest.mark.parametrize("tp_size", [1, 2])
def test_fused_tensors_of_phi3_hold_the_sources_below_each_other(tp_size: int) -> None:
    plain = table_of("LlamaForCausalLM", shape(6, 2))
    fused = table_of("Phi3ForCausalLM", shape(6, 2))
    for name, rows in (("self_attention.linear_qkv.weight", (24, 8, 8)), ("mlp.linear_fc1.weight", (12, 12))):
        parts = [torch.randn(n, 8) for n in rows]
        expected = shards(plain, LAYER + name, parts, tp_size)
        got = shards(fused, LAYER + name, [torch.cat(parts)], tp_size)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_fused_norm_names_of_transformer_engine_are_known() -> None:
    table = table_of("Qwen3ForCausalLM", shape())
    for fused, plain in [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ]:
        assert table.bind(LAYER + fused, 1) == table.bind(LAYER + plain, 1)
    assert bind(table, LAYER + fused, 1).hf_names == ("model.layers.2.post_attention_layernorm.weight",)


def test_unknown_parameters_and_layers_are_not_bound() -> None:
    table = table_of("LlamaForCausalLM", shape())
    assert table.bind(LAYER + "mlp.linear_fc1.bias", 0) is None
    assert table.bind(LAYER + "self_attention.linear_qkv.bias", 0) is None
    assert table.bind("decoder.layers.2.mlp.linear_fc1.weight", 1) is None


def test_tied_output_layer_is_a_copy_of_the_embedding() -> None:
    binding = bind(table_of("LlamaForCausalLM", shape(tied=True)), "output_layer.weight")
    assert binding.is_copy and binding.hf_names == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_tables_have_the_names_and_shapes_that_transformers_saves(
    architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    num_experts = 5 if FAMILIES[architecture].has_experts else 0
    values: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 12,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "q_lora_rank": LATENT.query_rank,
        "kv_lora_rank": LATENT.key_value_rank,
        "qk_nope_head_dim": LATENT.plain_dim,
        "qk_rope_head_dim": LATENT.rotary_dim,
        "v_head_dim": LATENT.value_dim,
        "shared_expert_intermediate_size": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 3,
        "layer_types": LAYER_TYPES if "delta" in own_sizes(architecture) else None,
        "pad_token_id": None,
        "tie_word_embeddings": is_tied,
    }
    config = hf_config(architecture.removesuffix("ForCausalLM"), values)
    save_model(hf_class(architecture)(config), tmp_path)
    family = FAMILIES[architecture]
    tensors = load_file(tmp_path / "model.safetensors").items()
    more = {"dense_ffn_hidden_size": 12, "shared_ffn_hidden_size": 12, **own_sizes(architecture)}
    more["num_dense_layers"] = getattr(config, "mlp_layer_types", []).count("dense")
    more["num_dense_layers"] += getattr(config, "first_k_dense_replace", 0)
    sizes = shape(tied=is_tied, hidden_size=16, num_experts=num_experts, **more)
    saved = {name: tuple(t.shape) for name, t in tensors if not family.is_carried(name, sizes)}
    has_more = family.text_model_type is not None or family.is_own_code  # vision, multi-token prediction
    assert (len(saved) < len(tensors)) is has_more
    table = table_of(architecture, sizes)
    joined = {name: tensor for name, tensor in table.joined.items() if name in saved}
    assert bool(joined) is family.writes_joined_experts
    for name, tensor in joined.items():
        assert tensor.shape == saved.pop(name)
        saved |= {part: table.hf_shapes[part] for part in tensor.parts}
    assert table.hf_shapes == saved


WHOLE = ("norm", "router", "gate_weight", "linear_proj.bias", "linear_fc2.bias")
"""Parts of the names of parameters that every rank holds."""


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_shards_of_all_ranks_are_the_whole_tensors(architecture: str, tp_size: int) -> None:
    """Norms, routers and some biases are whole on every rank; every element of the others is on exactly one."""
    num_experts = 5 if FAMILIES[architecture].has_experts else 0
    sizes = shape(vocab_size=12, num_experts=num_experts, **own_sizes(architecture))
    table = table_of(architecture, sizes)
    for parameter in table.stored_parameters():
        entry, shapes = parameter.binding.entry, parameter.binding.hf_shapes
        is_whole = any(name in parameter.key for name in WHOLE)
        assert entry.is_sharded is not is_whole, parameter.key
        counts = [torch.zeros(size) for size in shapes]
        for rank in range(tp_size):
            layout = entry.layout(table.shape, rank, tp_size, None)
            held = torch.zeros(parameter.binding.shard_shape(layout))
            assert layout.length == sum(piece.stop - piece.start for piece in layout.pieces)
            assert held.numel() == sum(map(math.prod, shapes)) / (1 if is_whole else tp_size)
            for piece in layout.pieces:
                counts[piece.tensor].narrow(layout.dim, piece.start, piece.stop - piece.start).add_(1)
        assert all((count == (tp_size if is_whole else 1)).all() for count in counts), parameter.key


@pytest.mark.parametrize(
    ("architecture", "name", "key", "position", "stack", "is_expert"),
    [
        (
            "Qwen3ForCausalLM",
            "mlp.linear_fc2.weight",
            "decoder.layers.mlp.linear_fc2.weight",
            (1,),
            (3,),
            False,
        ),
        (
            "MixtralForCausalLM",
            "mlp.experts.linear_fc2.weight4",
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            (1, 4),
            (3, 5),
            True,
        ),
    ],
)
def test_stored_parameters_are_stacked_by_layer_and_expert(
    architecture: str, name: str, key: str, position: tuple, stack: tuple, is_expert: bool
) -> None:
    table = table_of(architecture, shape(num_experts=5 if is_expert else 0))
    (stored,) = [p for p in table.stored_parameters() if p.key == key and p.position == position]
    assert stored.stack == stack
    assert stored.single_key == key.replace("layers.", "layers.1.")
    assert stored.binding == table.bind(LAYER + name, 0)
    assert stored.binding.entry.is_expert is is_expert
    assert (stored.binding.prefix, stored.binding.expert) == ("model.layers.1.", position[-1] * is_expert)
    assert not stored.binding.is_copy
    if is_expert:
        other = table.bind(LAYER + "mlp.experts.linear_fc2.weight2", 0)
        assert other is not None and table.same_on(other, 4) == stored.binding
    (top,) = [p for p in table.stored_parameters() if p.key == "decoder.final_layernorm.weight"]
    assert (top.single_key, top.position, top.stack) == (top.key, (), ())
    assert (top.binding.prefix, top.binding.expert) == ("", 0)


@pytest.mark.parametrize("architecture", ["Qwen3_5ForCausalLM", "Qwen3NextForCausalLM"])
def test_layers_for_multi_token_prediction_are_carried(architecture: str) -> None:
    sizes = shape(**own_sizes(architecture), num_experts=2)
    assert FAMILIES[architecture].is_carried("mtp.fc.weight", sizes)
    table = table_of(architecture, sizes)
    assert not any(FAMILIES[architecture].is_carried(name, sizes) for name in table.hf_shapes)
