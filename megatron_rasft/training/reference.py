"""The frozen reference: a host copy of the initial weights, and a disk cache of its log-probabilities."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rasft.errors import RasftError
from megatron_rasft.types import TrainingSample
from megatron_rasft.weights.folder import checkpoint_fingerprint, weights_fingerprint

LOCK_TIMEOUT_S = 60.0
"""Longest wait for the cache, which other runs may be using. After that the run ends with an error."""


class FrozenReference:
    """The reference policy's weights, sharded like the model, in (pinned) host memory.

    Args:
        chunks: this rank's model chunks; they must hold the reference's weights when this is called.
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
        """Puts the reference's weights into the model while the context is open. The policy's weights are restored bit for bit."""
        policy = [self._to_host(p) for p in self._parameters()]
        try:
            self._put(self._frozen)
            yield
        finally:
            self._put(policy)

    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters(), values, strict=True):
            parameter.copy_(value, non_blocking=True)
        # The host buffers may be freed after this method, so the copies from them must be finished.
        torch.cuda.synchronize()

    def output_weight(self, chunk: Any) -> Tensor:
        """Returns a copy of the reference's output projection, [v/tp, h], on the model's device; for the last pipeline stage."""
        # On a stage with both embeddings, Megatron's shared_embedding_or_output_weight() returns the input embedding even if
        # the two are not tied.
        tied = chunk.share_embeddings_and_output_weights
        target = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        for parameter, frozen in zip(self._parameters(), self._frozen, strict=True):
            if parameter.data_ptr() == target.data_ptr():
                return frozen.to(parameter.device, copy=True)
        raise AssertionError("the output projection is not among the parameters of this stage")


def initial_fingerprint(folder: Path, converted: Path | None) -> str:
    """Identifies the weights that a run began with, which are its reference's. Reads files, so it is for rank 0.

    Args:
        folder: --hf-model.
        converted: the converted weights that the run began with instead, if any.
    """
    return weights_fingerprint(folder, "") if converted is None else checkpoint_fingerprint(converted)


def logprobs_fingerprint(
    initial_weights: str, params_dtype: object, fp8: object, fp8_recipe: object, *, is_scaled: bool
) -> str:
    """Identifies log-probabilities of the reference, which depend on its weights and on the precision of its passes.

    Args:
        initial_weights: as ``initial_fingerprint`` returns it.
        params_dtype, fp8, fp8_recipe: Megatron's arguments, or their texts in config.json.
        is_scaled: whether tensors are scaled by the largest values of earlier passes.
    """
    scaled = " scaled" if is_scaled else ""
    return f"{params_dtype} {fp8} {fp8_recipe if fp8 else ''}{scaled} {initial_weights}"


class LogprobCache:
    """The reference's log-probabilities on disk, found by the reference's weights and a sample's tokens.

    Rank 0 only. Values are stored in fp32, as they were calculated, so a stored value equals a calculated one.

    Args:
        path: an SQLite file, created if it is missing; None keeps the cache in memory.
        fingerprint: identifies the reference's weights and the precision of its passes.

    Raises:
        RasftError: the file is not a database, or cannot be read or written. Methods raise it too.
    """

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint.encode()
        with self._explained():
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                ":memory:" if path is None else str(path), timeout=LOCK_TIMEOUT_S
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS logprobs_fp32 (key BLOB PRIMARY KEY, value BLOB)"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise RasftError(
                f"the cache of reference log-probabilities, {self._path}, cannot be used: {error}. Name another file with "
                "--rasft-ref-cache, or move this one away: the run creates a new one."
            ) from error

    def _key(self, sample: TrainingSample) -> bytes:
        digest = hashlib.sha256(self._fingerprint)
        for ids in ([len(sample.prompt_ids)], sample.prompt_ids, sample.response_ids):
            digest.update(np.asarray(ids, np.int32).data)
        return digest.digest()

    def fill(self, samples: Iterable[TrainingSample]) -> list[TrainingSample]:
        """Sets ``ref_logprobs`` of the samples in the cache.

        Returns:
            The samples that the cache lacks. If several have the same tokens, only the first is returned.
        """
        missing: dict[bytes, TrainingSample] = {}
        for sample in samples:
            key = self._key(sample)
            with self._explained():
                row = self._database.execute(
                    "SELECT value FROM logprobs_fp32 WHERE key = ?", (key,)
                ).fetchone()
            if row is None:
                missing.setdefault(key, sample)
            else:
                sample.ref_logprobs = memoryview(row[0]).cast("f")
        return list(missing.values())

    def add(self, samples: Iterable[TrainingSample], logprobs: Iterable[Sequence[float]]) -> None:
        """Stores the reference's log-probabilities of these samples' responses."""
        pairs = zip(samples, logprobs, strict=True)
        rows = [(self._key(s), np.asarray(values, np.float32).tobytes()) for s, values in pairs]
        with self._explained(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO logprobs_fp32 VALUES (?, ?)", rows)
