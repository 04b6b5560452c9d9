"""Training samples as arrays: how rank 0 queues them, hands them out and saves them.

Python lists take 36 bytes a token and are pickled number by number; arrays take 4 and are copied whole.
"""

import itertools
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rasft.types import TrainingSample

Array = NDArray[Any]
LOGPROBS = ("ref_logprobs", "old_logprobs")


@dataclass(kw_only=True, frozen=True)
class SampleArrays:
    """Samples side by side, t tokens and r response tokens in all.

    Log-probabilities are fp32 as the model computes them, so nothing is rounded.
    """

    tokens: Array
    """[t] int32: each sample's prompt and response, sample after sample."""
    prompt_lengths: Array
    """[n] int32."""
    response_lengths: Array
    """[n] int32."""
    weights: Array
    """[n] fp64: A of each sample."""
    are_rollouts: Array
    """[n] bool: sampled from the policy; the others are demonstrations."""
    ref_logprobs: Array | None = None
    """[r] fp32, or None if any sample lacks them."""
    old_logprobs: Array | None = None
    """[r] fp32, or None if any sample lacks them."""

    @classmethod
    def of(cls, samples: Sequence[TrainingSample], *, with_logprobs: bool = True) -> "SampleArrays":
        """Copies the samples' tokens, and their log-probabilities unless these are to be calculated."""
        prompts = np.array([len(s.prompt_ids) for s in samples], np.int32)
        responses = np.array([len(s.response_ids) for s in samples], np.int32)
        logprobs: dict[str, Array | None] = dict.fromkeys(LOGPROBS)
        for name in LOGPROBS if with_logprobs else ():
            parts = [getattr(s, name) for s in samples]
            if samples and all(part is not None for part in parts):
                logprobs[name] = _joined(parts, np.float32)
        return cls(
            tokens=_joined([ids for s in samples for ids in (s.prompt_ids, s.response_ids)], np.int32),
            prompt_lengths=prompts,
            response_lengths=responses,
            weights=np.array([s.weight for s in samples], np.float64),
            are_rollouts=np.array([s.kind == "rollout" for s in samples], np.bool_),
            **logprobs,
        )

    def arrays(self) -> dict[str, Array]:
        """The fields that are present, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def lengths(self) -> Array:
        """[n] int64: tokens of each sample."""
        return self.prompt_lengths.astype(np.int64) + self.response_lengths

    def slice(self, start: int, stop: int) -> "SampleArrays":
        """Samples ``start`` to ``stop`` as views."""
        tokens, responses = _starts(self.lengths), _starts(self.response_lengths)
        there, answers = slice(tokens[start], tokens[stop]), slice(responses[start], responses[stop])
        return SampleArrays(
            tokens=self.tokens[there],
            prompt_lengths=self.prompt_lengths[start:stop],
            response_lengths=self.response_lengths[start:stop],
            weights=self.weights[start:stop],
            are_rollouts=self.are_rollouts[start:stop],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[answers],
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[answers],
        )

    def take(self, indices: Sequence[int]) -> "SampleArrays":
        """Copies the samples with these indices, in their order."""
        tokens, responses = _starts(self.lengths).tolist(), _starts(self.response_lengths).tolist()

        def picked(flat: Array | None, bounds: list[int]) -> Array | None:
            if flat is None:
                return None
            parts = [flat[bounds[i] : bounds[i + 1]] for i in indices]
            return np.concatenate(parts) if parts else flat[:0]

        chosen = np.array(indices, np.int64)
        taken = picked(self.tokens, tokens)
        assert taken is not None
        return SampleArrays(
            tokens=taken,
            prompt_lengths=self.prompt_lengths[chosen],
            response_lengths=self.response_lengths[chosen],
            weights=self.weights[chosen],
            are_rollouts=self.are_rollouts[chosen],
            ref_logprobs=picked(self.ref_logprobs, responses),
            old_logprobs=picked(self.old_logprobs, responses),
        )


@dataclass(kw_only=True)
class Batch:
    """One step's problems: samples may be fewer, or more, than problems."""

    num_problems: int
    samples: SampleArrays


class BatchQueue:
    """The global batches that wait to be trained. Rank 0 has them; the other ranks know only how many there are.

    Args:
        sizes: problems and samples of each batch, the same on every rank.
        samples: of all batches, in order; None on ranks other than 0.
    """

    def __init__(self, sizes: Iterable[Sequence[int]] = (), samples: SampleArrays | None = None) -> None:
        self._sizes = deque((problems, num) for problems, num in sizes)
        self._samples = samples

    def __len__(self) -> int:
        return len(self._sizes)

    def batch(self, place: int) -> Batch | None:
        """The batch that is trained after ``place`` others; None on ranks other than 0."""
        if self._samples is None:
            return None
        start = sum(num for _, num in list(self._sizes)[:place])
        num_problems, num = self._sizes[place]
        return Batch(num_problems=num_problems, samples=self._samples.slice(start, start + num))

    def popleft(self) -> None:
        """Drops the first batch, which has been trained."""
        _, num = self._sizes.popleft()
        if self._samples is not None:
            self._samples = self._samples.slice(num, len(self._samples))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Problems and samples of each batch: what JSON holds of the queue in a checkpoint."""
        return list(self._sizes)

    def arrays(self) -> dict[str, Array]:
        """The samples in a checkpoint; rank 0 only."""
        return {} if self._samples is None or not self._sizes else self._samples.arrays()


def views(flat: Array, lengths: Array) -> list[memoryview]:
    """The parts of a flat array: sequences of Python numbers that copy nothing."""
    ends = _starts(lengths)
    return [memoryview(flat[start:end]) for start, end in itertools.pairwise(ends)]


def _starts(lengths: Array) -> Array:
    """[n + 1] int64: where each part begins, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _joined(parts: Sequence[Any], dtype: Any) -> Array:
    """One array of lists, arrays and memoryviews; each is converted in place, without a copy in between."""
    flat = np.empty(sum(map(len, parts)), dtype)
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        if isinstance(part, list):
            # half of the time that numpy takes to find out what is in a list
            struct.pack_into(f"{len(part)}{flat.dtype.char}", flat, start * flat.itemsize, *part)
        else:
            flat[start:end] = part
    return flat
