"""Calculates the log-probabilities of samples under the trainer's weights, or under the frozen reference's."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_rasft.data.sample_arrays import Array, Batch, SampleArrays, views
from megatron_rasft.model.fp8_scales import DelayedScales
from megatron_rasft.monitoring import live
from megatron_rasft.ranks import gather_to_rank_zero, kept_by_rank_zero, on_rank_zero
from megatron_rasft.training.batch_preparation import BatchPreparer, PreparedBatch
from megatron_rasft.training.batches import MicroBatch, response_values
from megatron_rasft.training.reference import FrozenReference
from megatron_rasft.types import TrainingSample

_SCORED_BATCHES = 4
"""Number of global batches scored between two checks for a stop of the run."""


class Scorer:
    """Scores samples for rank 0. Every method is a collective of the world.

    Args:
        preparer: distributes the samples to the ranks.
        forward: runs a forward pass over this rank's micro-batches; returns on the last pipeline stage the log-probabilities of
            each, [b * s/cp] fp32 in nats, and [] on the others.
        scales: scales of FP8's delayed recipe, set from the first samples if they are missing.
        reference: the frozen reference's weights; None if the objective needs none.
        gathered: opens a context in which every rank has all parameters.
        check_stop: raises Stopped if the run is to stop.
        global_batch_size: samples of a global batch.
    """

    def __init__(
        self,
        preparer: BatchPreparer,
        forward: Callable[[list[MicroBatch]], list[torch.Tensor]],
        scales: DelayedScales,
        reference: FrozenReference | None,
        gathered: Callable[[], AbstractContextManager[None]],
        check_stop: Callable[[], None],
        global_batch_size: int,
    ) -> None:
        self._preparer = preparer
        self._forward = forward
        self._scales = scales
        self._reference = reference
        self._gathered = gathered
        self._check_stop = check_stop
        self._global_batch_size = global_batch_size

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> list[memoryview]:
        """Returns on rank 0 the fp32 log-probabilities of each sample's response, in nats; [] on the other ranks.

        Args:
            samples: on rank 0; not read on the others.
            with_reference: whether the frozen reference scores them instead of the trainer's weights.

        Raises:
            Stopped: the run is to stop.
        """
        # The log-probabilities that samples already have belong to training. Scoring does not send them to the other ranks.
        arrays = kept_by_rank_zero(lambda: SampleArrays.of(samples, with_logprobs=False), None)
        num = on_rank_zero(lambda: len(samples))
        if not num:
            return []

        def part(start: int, length: int) -> Batch | None:
            if arrays is None:
                return None
            return Batch(num_problems=0, samples=arrays.slice(start, min(num, start + length)))

        def first_batch() -> list[MicroBatch]:
            return self._preparer.on_device(self._preparer.prepare(part(0, self._global_batch_size)))

        # Small parts would waste time on exchanges between the ranks, large ones would delay a stop.
        size = _SCORED_BATCHES * self._global_batch_size
        scored: list[memoryview] = []
        label = "scoring under the reference" if with_reference else "scoring"
        shown = live.work(label, "samples", num, lambda: len(scored))
        with shown, self._gathered(), contextlib.ExitStack() as reference:
            self._scales.set_from(first_batch, is_whole=num >= self._global_batch_size)
            if with_reference:
                assert self._reference is not None, (
                    "the objective has no reference, so nothing can be scored under it"
                )
                reference.enter_context(self._reference.in_place())
            # While a part is scored, a thread cuts the next one.
            for prepared in self._preparer.one_ahead(part(start, size) for start in range(0, num, size)):
                self._check_stop()
                scored += self._score(prepared)
        return scored

    def _score(self, prepared: PreparedBatch) -> list[memoryview]:
        batches = self._preparer.on_device(prepared)
        outputs = self._forward(batches)
        mine: dict[int, Array] = {}
        cp_group = parallel_state.get_context_parallel_group()
        # Only the last pipeline stage has outputs; the other stages' list is empty.
        for output, batch in zip(outputs, batches[: len(outputs)], strict=True):
            mine |= response_values(output, batch, cp_group)
        # All tensor- and context-parallel ranks of a replica have the same values; only the first of them sends them.
        is_sender = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        # The values are joined, because pickling an array for each sample takes longer than pickling the values.
        indices, lengths = np.array(list(mine), np.int64), np.array([len(v) for v in mine.values()], np.int64)
        joined = (indices, lengths, np.concatenate(list(mine.values()))) if is_sender and mine else None
        merged: dict[int, memoryview] = {}
        for part, counts, values in gather_to_rank_zero(joined):
            merged |= zip(part.tolist(), views(values, counts), strict=True)
        return [merged[i] for i in range(len(merged))]
