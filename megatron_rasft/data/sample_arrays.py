"""Training samples as arrays: the form in which rank 0 queues, sends and saves them.

A token takes 36 bytes in a Python list, which is pickled number by number. In an array it takes 4, and the array is
copied in one piece.
"""

import itertools
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rasft.types import BatchSize, TrainingSample

Array = NDArray[Any]
LOGPROBS = ("ref_logprobs", "old_logprobs", "teacher_logprobs")


@dataclass(kw_only=True, frozen=True)
class SampleArrays:
    """n samples in flat arrays, with t tokens and r response tokens in total.

    The model computes log-probabilities in fp32, so storing them as fp32 does not round them.
    """

    tokens: Array
    """[t] int32: prompt and response of each sample, one sample after the other."""
    prompt_lengths: Array
    """[n] int32: tokens of each prompt."""
    response_lengths: Array
    """[n] int32: tokens of each response."""
    weights: Array
    """[n] fp64: objective weight A of each sample."""
    are_rollouts: Array
    """[n] bool: True for rollouts, False for demonstrations."""
    are_counted: Array
    """[n] bool: whether each sample's response tokens count in the denominator of the loss."""
    ref_logprobs: Array | None = None
    """[r] fp32 under the frozen reference; None if any sample lacks them."""
    old_logprobs: Array | None = None
    """[r] fp32 under the policy at the last refresh; None if any sample lacks them."""
    teacher_logprobs: Array | None = None
    """[r] fp32 under the teacher; None if any sample lacks them."""

    @classmethod
    def of(cls, samples: Sequence[TrainingSample], *, with_logprobs: bool = True) -> "SampleArrays":
        """Copies samples into arrays.

        Args:
            with_logprobs: False leaves log-probabilities out, for samples that are about to be scored.
        """
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
            are_counted=np.array([s.is_counted for s in samples], np.bool_),
            **logprobs,
        )

    @classmethod
    def load(cls, arrays: dict[str, Array]) -> "SampleArrays":
        """Restores samples from ``arrays()``. In checkpoints without ``are_counted`` all samples count."""
        return cls(**{"are_counted": np.ones(len(arrays["weights"]), np.bool_)} | arrays)

    def arrays(self) -> dict[str, Array]:
        """Field name -> array, without the fields that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def lengths(self) -> Array:
        """[n] int64: prompt and response tokens of each sample."""
        return self.prompt_lengths.astype(np.int64) + self.response_lengths

    def _logprobs(self) -> list[tuple[str, Array | None]]:
        """Name and values of each kind of log-probabilities."""
        return [(name, getattr(self, name)) for name in LOGPROBS]

    def slice(self, start: int, stop: int) -> "SampleArrays":
        """Samples ``start`` to ``stop`` - 1, as views of these arrays."""
        tokens, responses = _starts(self.lengths), _starts(self.response_lengths)
        in_tokens, in_responses = slice(tokens[start], tokens[stop]), slice(responses[start], responses[stop])
        return SampleArrays(
            tokens=self.tokens[in_tokens],
            prompt_lengths=self.prompt_lengths[start:stop],
            response_lengths=self.response_lengths[start:stop],
            weights=self.weights[start:stop],
            are_rollouts=self.are_rollouts[start:stop],
            are_counted=self.are_counted[start:stop],
            **{name: None if flat is None else flat[in_responses] for name, flat in self._logprobs()},
        )

    def take(self, indices: Sequence[int]) -> "SampleArrays":
        """Copies the samples with these indices, in the order of the indices."""
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
            are_counted=self.are_counted[chosen],
            **{name: picked(flat, responses) for name, flat in self._logprobs()},
        )


@dataclass(kw_only=True)
class Batch:
    """The samples of one training step. Filters and rollouts make their number differ from the number of problems."""

    num_problems: int
    samples: SampleArrays
    num_uncomputed: int = 0
    """See ``BatchSize``."""

    @classmethod
    def of(cls, samples: Iterable[TrainingSample], num_problems: int) -> "Batch":
        """The batch of all samples of these problems."""
        made = list(samples)
        return cls(
            num_problems=num_problems,
            samples=SampleArrays.of([sample for sample in made if sample.is_computed]),
            num_uncomputed=BatchSize.of([made]).num_uncomputed,
        )


class BatchQueue:
    """The global batches that are not trained on yet. Only rank 0 has the samples; all ranks know the sizes.

    Args:
        sizes: size of each batch, the same on every rank, as ``BatchSize`` or as a checkpoint's list of its numbers.
        samples: the samples of all batches, in order; None on ranks other than 0.
    """

    def __init__(self, sizes: Iterable[Sequence[int]] = (), samples: SampleArrays | None = None) -> None:
        self._sizes = deque(BatchSize(*size) for size in sizes)
        self._samples = samples

    def __len__(self) -> int:
        return len(self._sizes)

    def batch(self, place: int) -> Batch | None:
        """The batch at ``place`` of the queue, counted from 0; None on ranks other than 0."""
        if self._samples is None:
            return None
        start = sum(size.num_samples for size in list(self._sizes)[:place])
        size = self._sizes[place]
        return Batch(
            num_problems=size.num_problems,
            samples=self._samples.slice(start, start + size.num_samples),
            num_uncomputed=size.num_uncomputed,
        )

    def popleft(self) -> None:
        """Removes the first batch."""
        num = self._sizes.popleft().num_samples
        if self._samples is not None:
            self._samples = self._samples.slice(num, len(self._samples))

    @property
    def sizes(self) -> list[BatchSize]:
        """The size of each batch, as a checkpoint's JSON file stores them."""
        return list(self._sizes)

    def arrays(self) -> dict[str, Array]:
        """The arrays that rank 0 saves in a checkpoint; {} on other ranks and for an empty queue."""
        return {} if self._samples is None or not self._sizes else self._samples.arrays()


def views(flat: Array, lengths: Array) -> list[memoryview]:
    """Splits a flat array into parts of these lengths. The memoryviews copy nothing and yield Python numbers."""
    ends = _starts(lengths)
    return [memoryview(flat[start:end]) for start, end in itertools.pairwise(ends)]


def _starts(lengths: Array) -> Array:
    """[n + 1] int64: the start of each part, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _joined(parts: Sequence[Any], dtype: Any) -> Array:
    """Concatenates lists, arrays and memoryviews into one array, without intermediate copies."""
    flat = np.empty(sum(map(len, parts)), dtype)
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        if isinstance(part, list):
            # This is twice as fast as numpy, which first determines the type of each element.
            struct.pack_into(f"{len(part)}{flat.dtype.char}", flat, start * flat.itemsize, *part)
        else:
            flat[start:end] = part
    return flat
