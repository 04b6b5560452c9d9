"""The frozen reference: a host copy of the initial weights, and a disk cache of what it thinks of tokens."""

import contextlib
import hashlib
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rasft.errors import RasftError
from megatron_rasft.types import TrainingSample

_LOCK_TIMEOUT_S = 60.0
"""Other runs may write to the same cache; one that waits longer than this for it gives up."""


class FrozenReference:
    """The reference policy's weights, sharded like the model, in (pinned) host memory.

    Args:
        chunks: model chunks of this rank while they hold the reference's weights.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._frozen = [self._to_host(p) for p in self._parameters()]

    def _parameters(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            for _, parameter in sorted(chunk.named_parameters()):
                yield parameter.data

    @staticmethod
    def _to_host(value: Tensor) -> Tensor:
        host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
        return host.copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the reference's weights into the model for the duration; the live ones come back bit for bit."""
        live = [self._to_host(p) for p in self._parameters()]
        try:
            self._put(self._frozen)
            yield
        finally:
            self._put(live)

    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters(), values, strict=True):
            parameter.copy_(value, non_blocking=True)
        torch.cuda.synchronize()

    def output_weight(self, chunk: Any) -> Tensor:
        """[v/tp, h] reference copy of the output projection, on the model's device; last stage only."""
        # Of a stage with both ends Megatron's shared_embedding_or_output_weight() is the input embedding, tied or not.
        tied = chunk.share_embeddings_and_output_weights
        target = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        for parameter, frozen in zip(self._parameters(), self._frozen, strict=True):
            if parameter.data_ptr() == target.data_ptr():
                return frozen.to(parameter.device, copy=True)
        raise AssertionError("the output projection is not among the parameters of this stage")


class LogprobCache:
    """Reference log-probabilities on disk, by content: a property of (reference weights, tokens).

    Rank 0 only. Values are stored as they were computed (fp64 of an fp32 result), so a hit is exact.

    Args:
        path: SQLite file, made if missing; None keeps the cache in memory.
        fingerprint: names the reference weights and the precision they run in.

    Raises:
        RasftError: the file is no database, or cannot be read or written; methods raise it too.
    """

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint.encode()
        with self._explained():
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                ":memory:" if path is None else str(path), timeout=_LOCK_TIMEOUT_S
            )
            self._database.execute("CREATE TABLE IF NOT EXISTS logprobs (key BLOB PRIMARY KEY, value BLOB)")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise RasftError(
                f"the cache of reference log-probabilities, {self._path}, cannot be used: {error}. Name another file with "
                "--rasft-ref-cache, or move this one away: it is made anew."
            ) from error

    def _key(self, sample: TrainingSample) -> bytes:
        digest = hashlib.sha256(self._fingerprint)
        digest.update(
            array("q", [len(sample.prompt_ids), *sample.prompt_ids, *sample.response_ids]).tobytes()
        )
        return digest.digest()

    def fill(self, samples: Iterable[TrainingSample]) -> list[TrainingSample]:
        """Set ``ref_logprobs`` of the samples that are known.

        Returns:
            Those that are not, each content once.
        """
        unknown: dict[bytes, TrainingSample] = {}
        for sample in samples:
            key = self._key(sample)
            with self._explained():
                row = self._database.execute("SELECT value FROM logprobs WHERE key = ?", (key,)).fetchone()
            if row is None:
                unknown.setdefault(key, sample)
            else:
                values = array("d")
                values.frombytes(row[0])
                sample.ref_logprobs = values.tolist()
        return list(unknown.values())

    def add(self, samples: Iterable[TrainingSample], logprobs: Iterable[list[float]]) -> None:
        """Remember the reference's log-probabilities of these samples' responses."""
        rows = [(self._key(s), array("d", v).tobytes()) for s, v in zip(samples, logprobs, strict=True)]
        with self._explained(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO logprobs VALUES (?, ?)", rows)
