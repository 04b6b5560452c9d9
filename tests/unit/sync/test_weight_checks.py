"""Proofs of a sync: checksums of each server's shards under the server's own names, and values read back."""

import hashlib
from typing import Any

import pytest
import torch

from megatron_rasft.errors import ServerError
from megatron_rasft.sync.buckets import plan_buckets
from megatron_rasft.sync.weight_checks import (
    Evidence,
    EvidenceCollector,
    can_be_read,
    check_checksums,
    check_rows,
    held_part,
)
from megatron_rasft.sync.wire_format import WireFormat
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_buckets import model


def checksum(*tensors: torch.Tensor) -> str:
    raw = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(raw).digest()[:8].hex()


def evidence_of(weights: dict[str, torch.Tensor], kind: Any, tp_sizes: list[int]) -> Evidence:
    buckets = plan_buckets(model(), WireFormat(torch.bfloat16), 60_000)
    collector = EvidenceCollector(kind, tp_sizes, (4, 2), {n: tuple(t.shape) for n, t in weights.items()})
    for bucket in buckets:
        memory = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for name, view in bucket.views(memory).items():
            view.copy_(weights[name])
        collector.add(bucket, memory)
    return collector.evidence()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {t.name: torch.randn(t.shape).to(torch.bfloat16) for t in model()}


def test_checksums_are_those_of_the_fused_tensors(weights: dict[str, torch.Tensor]) -> None:
    (found,) = evidence_of(weights, "checksum", [1]).checksums[1]
    at = "model.layers.1.self_attn."
    assert found[at + "qkv_proj.weight"] == checksum(*(weights[f"{at}{p}_proj.weight"] for p in "qkv"))
    assert found[at + "qkv_proj.bias"] == checksum(*(weights[f"{at}{p}_proj.bias"] for p in "qkv"))
    embedding = weights["model.embed_tokens.weight"]
    padding = torch.zeros(24, 64, dtype=torch.bfloat16)  # 1000 rows are padded to 1024
    assert found["model.embed_tokens.weight"] == checksum(embedding, padding)


def test_each_rank_of_a_server_has_checksums_of_its_shard(weights: dict[str, torch.Tensor]) -> None:
    found = evidence_of(weights, "checksum", [2, 1]).checksums
    assert set(found) == {1, 2}
    at = "model.layers.0."
    gate, up = weights[at + "mlp.gate_proj.weight"], weights[at + "mlp.up_proj.weight"]
    down = weights[at + "mlp.down_proj.weight"]
    for rank in (0, 1):
        rows = slice(96 * rank, 96 * (rank + 1))
        assert found[2][rank][at + "mlp.gate_up_proj.weight"] == checksum(gate[rows], up[rows])
        assert found[2][rank][at + "mlp.down_proj.weight"] == checksum(down[:, rows])
        norm = weights["model.norm.weight"]
        assert found[2][rank]["model.norm.weight"] == checksum(norm)


@pytest.mark.parametrize("leaf,whole", [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")])
def test_experts_are_sharded_like_other_layers(leaf: str, whole: str) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    dim = 1 if leaf == "down_proj" else 0
    for name in (
        f"model.layers.0.mlp.experts.1.{leaf}.weight",
        f"m.block_sparse_moe.experts.1.{whole}.weight",
    ):
        part, padding = held_part(name, tensor, 1, 2, (4, 2))
        assert torch.equal(part, tensor.narrow(dim, tensor.shape[dim] // 2, tensor.shape[dim] // 2))
        assert padding == 0


def test_more_ranks_than_key_value_heads_hold_copies() -> None:
    key = torch.arange(8.0).reshape(8, 1)  # two heads of four rows
    parts = [
        held_part("model.layers.0.self_attn.k_proj.weight", key, r, 4, (4, 2))[0].flatten().tolist()
        for r in range(4)
    ]
    assert parts == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_fused_in_the_folder_are_sharded_one_by_one(size: int) -> None:
    at, heads = "model.layers.0.self_attn.", (4, 2)
    query, key, value = torch.randn(4 * 6, 5), torch.randn(2 * 6, 5), torch.randn(2 * 6, 5)
    gate, up = torch.randn(8, 5), torch.randn(8, 5)
    for rank in range(size):
        pieces = {"q": query, "k": key, "v": value}
        wanted = [held_part(f"{at}{n}_proj.weight", t, rank, size, heads)[0] for n, t in pieces.items()]
        fused = held_part(f"{at}qkv_proj.weight", torch.cat([query, key, value]), rank, size, heads)
        assert fused[1] == 0 and torch.equal(fused[0], torch.cat(wanted))
        fused = held_part("model.layers.0.mlp.gate_up_proj.weight", torch.cat([gate, up]), rank, size, heads)
        rows = slice(rank * 8 // size, (rank + 1) * 8 // size)
        assert fused[1] == 0 and torch.equal(fused[0], torch.cat([gate[rows], up[rows]]))


def test_vocabulary_shards_are_padded_at_the_end() -> None:
    rows = torch.ones(70, 2)  # -> 128 rows
    sizes = [(held_part("lm_head.weight", rows, rank, 2, (4, 2))) for rank in (0, 1)]
    assert [(part.shape[0], zeros) for part, zeros in sizes] == [(64, 0), (6, 58)]
    sizes = [(held_part("lm_head.weight", rows, rank, 3, (4, 2))) for rank in range(3)]  # 192 = 64 * 3
    assert [(part.shape[0], zeros) for part, zeros in sizes] == [(64, 0), (6, 58), (0, 64)]


def test_a_single_differing_tensor_is_named(weights: dict[str, torch.Tensor]) -> None:
    evidence = evidence_of(weights, "checksum", [1])
    server = StandIn("http://a:1")
    server.held = [evidence.checksums[1][0] | {"lm_head.weight": "tied"}]
    with pytest.raises(ServerError, match=r"lm_head.weight"):
        check_checksums(server, evidence.checksums[1], 1)
    server.held = [dict(evidence.checksums[1][0])]
    check_checksums(server, evidence.checksums[1], 1)
    server.held[0]["model.norm.weight"] = "0" * 16
    with pytest.raises(ServerError, match=r"a:1.*1 of .*model.norm.weight"):
        check_checksums(server, evidence.checksums[1], 1)
    server.held = [evidence.checksums[1][0] | {"model.extra.weight": "0" * 16}]
    with pytest.raises(ServerError, match=r"model.extra.weight"):
        check_checksums(server, evidence.checksums[1], 1)
    server.held = []
    with pytest.raises(ServerError, match=r"checksums of 0 ranks"):
        check_checksums(server, evidence.checksums[1], 1)


def test_rows_read_back_must_be_equal(weights: dict[str, torch.Tensor]) -> None:
    evidence = evidence_of(weights, "read_back", [1])
    names = list(weights)
    assert names[0] in evidence.rows and names[-1] in evidence.rows and 2 < len(evidence.rows) <= 8
    server = StandIn("http://a:1")
    server.rows = {name: tensor[:4].float().tolist() for name, tensor in weights.items()}
    check_rows(server, evidence.rows, 1)
    server.rows[names[-1]][0] += 1
    with pytest.raises(ServerError, match=r"model.norm.weight"):
        check_rows(server, evidence.rows, 1)


@pytest.mark.parametrize(
    ("name", "shape", "tp_size", "is_read"),
    [
        ("model.embed_tokens.weight", (128_256, 4096), 1, False),
        ("model.layers.0.mlp.gate_proj.weight", (14_336, 4096), 8, False),
        ("model.layers.0.self_attn.q_proj.weight", (4096, 4096), 16, True),
        ("model.layers.0.self_attn.k_proj.weight", (1024, 4096), 8, True),
        ("model.layers.0.self_attn.k_proj.weight", (1024, 4096), 16, False),
        ("model.layers.0.self_attn.v_proj.weight", (512, 4096), 1, False),
        ("model.layers.0.input_layernorm.weight", (4096,), 16, True),
    ],
    ids=[
        "embedding",
        "large",
        "query",
        "key",
        "a key head of several ranks",
        "heads of another size",
        "norm",
    ],
)
def test_only_tensors_that_sglang_reads_correctly_are_read_back(
    name: str, shape: tuple[int, ...], tp_size: int, is_read: bool
) -> None:
    assert can_be_read(name, shape, tp_size, (32, 8)) == is_read


def test_an_embedding_is_not_read_back(weights: dict[str, torch.Tensor]) -> None:
    shapes = {n: tuple(t.shape) for n, t in weights.items()} | {"model.embed_tokens.weight": (128_256, 4096)}
    read = EvidenceCollector("read_back", [1], (4, 2), shapes)._read
    assert read and "model.embed_tokens.weight" not in read
