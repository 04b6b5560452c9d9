"""Distributes a global batch and cuts this rank's micro-batches on a thread, while the previous training step runs."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_rasft.data.sample_arrays import Batch
from megatron_rasft.ranks import gather_to_all, hand_out
from megatron_rasft.training.batches import (
    WIDTH_SLACK,
    BatchFacts,
    BatchLayout,
    BatchShard,
    MicroBatch,
    build_micro_batches,
    shard_batch,
)


@dataclass(kw_only=True)
class PreparedBatch:
    """A global batch that has been distributed to the ranks, and the thread's work of cutting this rank's micro-batches."""

    facts: BatchFacts
    micro_batches: Future[list[MicroBatch]]
    """This rank's micro-batches, in host memory."""


class BatchPreparer:
    """Prepares global batches for the ranks of the world.

    Args:
        layout: how this rank cuts a global batch.
        replicas: the ranks of each data-parallel replica.
        device: the model's device.
    """

    def __init__(self, layout: BatchLayout, replicas: Sequence[Sequence[int]], device: torch.device) -> None:
        self._layout = layout
        self._replicas = replicas
        self._device = device
        self._thread = ThreadPoolExecutor(1, "cut", _choose_device, (device,))

    def prepare(self, batch: Batch | None) -> PreparedBatch:
        """Distributes a global batch and starts to cut it. A collective of the world.

        The ranks of a replica receive only the replica's shard. The collectives run here and not on the thread: collectives of
        two threads could start in a different order on another rank.

        Args:
            batch: on rank 0; not read on the others.
        """

        def work() -> list[BatchShard]:
            assert batch is not None, "rank 0 has the batches"
            return shard_batch(batch, self._layout)

        shard = hand_out(work, self._replicas)
        return PreparedBatch(facts=shard.facts, micro_batches=self._thread.submit(self._cut, shard))

    def _cut(self, shard: BatchShard) -> list[MicroBatch]:
        batches = build_micro_batches(shard, self._layout)
        # Copies from pinned memory are faster. Pinning takes time, so the thread does it while the training step runs.
        return [batch.pinned() for batch in batches] if self._device.type == "cuda" else batches

    def on_device(self, prepared: PreparedBatch) -> list[MicroBatch]:
        """Waits for the thread and copies the micro-batches to the model's device."""
        return [batch.to(self._device) for batch in prepared.micro_batches.result()]

    def one_ahead(self, batches: Iterable[Batch | None]) -> Iterator[PreparedBatch]:
        """Prepares and yields every batch. Each is yielded after the preparation of the next has begun."""
        waiting = None
        for batch in batches:
            prepared = self.prepare(batch)
            if waiting is not None:
                yield waiting
            waiting = prepared
        if waiting is not None:
            yield waiting

    def pause(self) -> None:
        """Waits until the thread has cut all batches. It then holds no lock until the next ``prepare``."""
        # There is one thread, so this empty task runs after all batches are cut.
        self._thread.submit(int).result()


def batch_layout(args: argparse.Namespace, *, is_packed: bool) -> BatchLayout:
    """Returns how this rank cuts a global batch.

    Args:
        args: Megatron's arguments.
        is_packed: whether samples are packed into rows (--rasft-batch-layout packed) or padded to one length.
    """
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    is_on_gpu = torch.cuda.is_available() and args.distributed_backend == "nccl"
    is_interleaved = args.virtual_pipeline_model_parallel_size is not None
    return BatchLayout(
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        is_packed=is_packed,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=cp,
        token_multiple=cp
        * (tp if args.sequence_parallel else 1)
        * _tokens_per_rank_multiple(args, is_on_gpu),
        # Megatron's interleaved schedule needs a multiple of the number of pipeline stages.
        micro_batch_multiple=args.pipeline_model_parallel_size if is_interleaved else 1,
        width_slack=WIDTH_SLACK if is_on_gpu else 0.0,
    )


def _tokens_per_rank_multiple(args: argparse.Namespace, is_on_gpu: bool) -> int:
    """Returns a number that must divide a rank's tokens in a micro-batch, for the matrix kernels.

    The last dimension of an FP8 operand is a multiple of 16 (assert_dim_for_fp8_exec in transformer_engine/pytorch/utils.py),
    and in a weight's gradient the last dimension counts tokens. A block scale covers 128 tokens, an mxfp8 scale 32.
    """
    if args.fp8 is not None:
        return {"blockwise": 128, "mxfp8": 32, "delayed": 16, "tensorwise": 16}.get(str(args.fp8_recipe), 128)
    if args.fp4 is not None:
        return 128
    return 8 if is_on_gpu else 1


def replica_ranks() -> list[list[int]]:
    """Returns the ranks of each data-parallel replica; a collective of the world."""
    found: list[list[int]] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    for rank, replica in enumerate(gather_to_all(parallel_state.get_data_parallel_rank())):
        found[replica].append(rank)
    return found


def _choose_device(device: torch.device) -> None:
    """Gives a new thread this process's GPU. A thread starts with GPU 0; pinning memory there would create a context on it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
