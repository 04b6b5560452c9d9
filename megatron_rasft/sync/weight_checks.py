"""Proves that a server has the weights it was sent: compares its checksums, or values read back, with the trainer's."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.sync.buckets import Bucket
from megatron_rasft.sync.wire_format import name_on_server

ProofKind = Literal["checksum", "read_back", "none"]

_VOCABULARY_UNIT = 64
"""SGLang pads the vocabulary to a multiple of this with rows of zeros."""

_ROWS_READ = 4
"""Number of rows of a tensor that are read back."""
_TENSORS_READ = 8
"""Number of tensors of a pipeline stage that are read back."""

_LARGEST_READ = 2**24
"""Largest number of elements of a tensor that is read back. SGLang turns the whole tensor into Python floats to return a few rows.
For this many it takes a second and half a GiB; for an embedding it would take minutes and exhaust the server's memory."""


@dataclass
class Evidence:
    """Evidence of the weights that servers must have, from one or more pipeline stages."""

    checksums: dict[int, list[dict[str, str]]] = field(default_factory=dict)
    """Tensor-parallel size of a server -> for each of its ranks a dictionary: the server's tensor name -> checksum."""
    rows: dict[str, list[Any]] = field(default_factory=dict)
    """Hugging Face name -> first rows of the tensor."""

    def merge(self, other: "Evidence") -> None:
        """Adds another stage's evidence."""
        for size, ranks in other.checksums.items():
            mine = self.checksums.setdefault(size, [{} for _ in ranks])
            for known, more in zip(mine, ranks, strict=True):
                known.update(more)
        self.rows.update(other.rows)


class EvidenceCollector:
    """Collects the checksums or values of one stage, bucket by bucket, for comparison with the servers'.

    Args:
        kind: the kind of proof.
        tp_sizes: the servers' tensor-parallel sizes.
        num_heads: query heads and key-value heads of the model.
        shapes: Hugging Face name -> shape of the stage's tensors. Some of these tensors are read back.
    """

    def __init__(
        self,
        kind: ProofKind,
        tp_sizes: Sequence[int],
        num_heads: tuple[int, int],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._num_heads = num_heads
        self._hashes: dict[tuple[int, int, str], Any] = {}
        self._tp_sizes = sorted(set(tp_sizes)) if kind == "checksum" else []
        self._rows: dict[str, list[Any]] = {}
        names = [n for n, shape in shapes.items() if can_be_read(n, shape, max(tp_sizes), num_heads)]
        last = len(names) - 1
        chosen = {round(i * last / (_TENSORS_READ - 1)) for i in range(_TENSORS_READ)}
        self._read = {names[i] for i in chosen} if kind == "read_back" and names else set()

    def add(self, bucket: Bucket, memory: Tensor) -> None:
        """Adds the tensors of a bucket ([num_bytes] uint8)."""
        for name, tensor in bucket.views(memory).items():
            for size in self._tp_sizes:
                for rank in range(size):
                    key = (size, rank, name_on_server(name))
                    digest = self._hashes.setdefault(key, hashlib.sha256())
                    part, num_padding_rows = held_part(name, tensor, rank, size, self._num_heads)
                    digest.update(_raw(part))
                    digest.update(bytes(num_padding_rows * tensor[:1].nbytes))
            if name in self._read:
                self._rows[name] = tensor[:_ROWS_READ].float().tolist()

    def evidence(self) -> Evidence:
        """Returns the evidence of all buckets added so far."""
        checksums: dict[int, list[dict[str, str]]] = {
            size: [{} for _ in range(size)] for size in self._tp_sizes
        }
        for (size, rank, name), digest in self._hashes.items():
            checksums[size][rank][name] = digest.digest()[:8].hex()
        return Evidence(checksums, self._rows)


def can_be_read(name: str, shape: tuple[int, ...], tp_size: int, num_heads: tuple[int, int]) -> bool:
    """Whether /get_weights_by_name returns the right rows of a tensor (get_weights_by_name in srt/models/llama.py)."""
    if math.prod(shape) > _LARGEST_READ:
        return False
    if name.rpartition(".")[0].rpartition(".")[2] not in ("k_proj", "v_proj"):
        return True
    # SGLang finds k and v behind the query heads, whose size it derives from the hidden size, and reads wrong rows if ranks
    # share a key-value head
    num_query_heads, num_kv_heads = num_heads
    is_plain = len(shape) == 2 and shape[0] == num_kv_heads * (shape[1] // num_query_heads)
    return is_plain and tp_size <= num_kv_heads


def held_part(
    name: str, tensor: Tensor, rank: int, size: int, num_heads: tuple[int, int]
) -> tuple[Tensor, int]:
    """Returns the part of a tensor that one tensor-parallel rank of a server has, and the number of rows of zeros behind it.

    Args:
        num_heads: query heads and key-value heads. A server with more ranks than key-value heads copies these.
    """
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    if last in ("embed_tokens", "lm_head"):
        rows = tensor.shape[0]
        unit = _VOCABULARY_UNIT
        if -(-rows // unit) * unit % size:
            unit *= size
        share = -(-rows // unit) * unit // size
        part = tensor[min(rows, rank * share) : min(rows, (rank + 1) * share)]
        return part, share - part.shape[0]
    num_query_heads, num_kv_heads = num_heads
    if last in ("qkv_proj", "gate_up_proj"):  # such a layer is fused in the Hugging Face folder too (Phi-3)
        attention = {"q_proj": num_query_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
        layers = attention if last == "qkv_proj" else {"gate_proj": 1, "up_proj": 1}
        unit = tensor.shape[0] // sum(layers.values())
        parts = tensor.split([unit * count for count in layers.values()])
        held = [
            held_part(f"{layer}.{leaf}", part, rank, size, num_heads)[0]
            for layer, part in zip(layers, parts, strict=True)
        ]
        return torch.cat(held), 0
    if last in ("k_proj", "v_proj") and size > num_kv_heads:
        share = tensor.shape[0] // num_kv_heads
        head = rank // (size // num_kv_heads)
        return tensor[head * share : (head + 1) * share], 0
    if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3"):
        return tensor.chunk(size)[rank], 0
    if last in ("o_proj", "down_proj", "w2") and leaf == "weight":
        return tensor.chunk(size, dim=1)[rank], 0
    return tensor, 0


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def check_checksums(server: ServerClient, expected: Sequence[dict[str, str]], deadline_s: float) -> None:
    """Compares the checksums of every tensor on every rank of a server.

    Args:
        expected: for each rank of the server, its tensor name -> checksum.

    Raises:
        ServerError: a tensor differs, is missing, or does not exist in the trainer's model.
    """
    found = server.checksums(deadline_s)
    if len(found) != len(expected):
        raise ServerError(server.url, f"returned checksums of {len(found)} ranks, but has {len(expected)}")
    for rank, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        theirs = dict(theirs)
        # tied embeddings: some versions of SGLang list the tensor under both names
        if "lm_head.weight" not in ours:
            ours = ours | {"lm_head.weight": ours["model.embed_tokens.weight"]}
            theirs.setdefault("lm_head.weight", ours["lm_head.weight"])
        wrong = [name for name, checksum in ours.items() if theirs.get(name) != checksum]
        unknown = [name for name in theirs if name not in ours]
        if wrong or unknown:
            example = f"{wrong[0]} differs" if wrong else f"{unknown[0]} is not in the trainer's model"
            raise ServerError(
                server.url,
                f"does not have the weights it was sent: the checksums of {len(wrong) + len(unknown)} of {len(ours)} "
                f"tensors on its rank {rank} differ; for example, {example}",
            )


def check_rows(server: ServerClient, expected: Mapping[str, list[Any]], deadline_s: float) -> None:
    """Reads some tensors back (/get_weights_by_name) and compares them exactly.

    Args:
        expected: Hugging Face name -> first rows.

    Raises:
        ServerError: a value differs, or cannot be read.
    """
    for name, ours in expected.items():
        theirs = server.weights_by_name(name, _ROWS_READ, deadline_s)
        if theirs != ours:
            raise ServerError(
                server.url, f"does not have the weights it was sent: {name} reads back differently"
            )
