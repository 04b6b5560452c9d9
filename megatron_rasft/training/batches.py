"""Turns training samples into the micro-batches of one data- and context-parallel rank.

Rank 0 assigns a global batch's samples to micro-batches and sends each replica its shard (``shard_batch``). Every rank
of the replica then builds its own micro-batches from the shard on the host (``build_micro_batches``) and copies them to
its device (``MicroBatch.to``).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rasft.data.packing import pack
from megatron_rasft.data.sample_arrays import LOGPROBS, Array, Batch, SampleArrays
from megatron_rasft.model.attention import zigzag_positions

WIDTH_SLACK = 0.03
"""Largest share of a micro-batch's width that rounding may add on GPUs, so that few different widths occur.

Every new width makes the caching allocator split its blocks and makes torch.compile and cuDNN prepare kernels again.
"""

MicroBatchIndices = list[list[int]]
"""The micro-batches of one replica, each as the indices of its samples in the global batch."""


@dataclass(kw_only=True, frozen=True)
class BatchLayout:
    """How a global batch is divided into micro-batches. Only the two rank numbers differ between ranks."""

    micro_batch_size: int
    seq_length: int
    """Longest sample, in tokens. A packed micro-batch holds at most micro_batch_size * seq_length tokens."""
    is_packed: bool
    """True concatenates samples into one row without padding between them; False gives each sample a row of its own."""
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    token_multiple: int
    """Every micro-batch is padded to a multiple of this many tokens.

    Sequence parallelism splits the tokens over the tensor-parallel ranks, and FP8 kernels need multiples of 16.
    """
    micro_batch_multiple: int = 1
    """The number of micro-batches is a multiple of this.

    Megatron's interleaved schedule needs a multiple of the pipeline size (pipeline_parallel/schedules.py).
    """
    width_slack: float = 0.0
    """Share of a width that rounding may add, >= 0 and < 1. 0 takes the smallest width."""

    @property
    def segment_multiple(self) -> int:
        """Every sequence is padded to a multiple of this: context parallelism cuts it into 2 * cp_size chunks."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def padded(self, num_tokens: int) -> int:
        """Rounds a sequence's length up to the next multiple of ``segment_multiple``."""
        return -(-num_tokens // self.segment_multiple) * self.segment_multiple

    def width(self, num_tokens: int) -> int:
        """The width of micro-batches whose longest row has ``num_tokens`` tokens.

        Widths are multiples of a power of two that grows with the width, so a slack of 0.03 leaves about 35 different
        widths between n and 2 * n tokens. The width never exceeds the token budget rounded up to a valid width.
        """
        unit = math.lcm(self.token_multiple, self.segment_multiple)
        num_units = max(1, -(-num_tokens // unit))
        step = 1
        while 2 * step <= self.width_slack * num_units:
            step *= 2
        budget = self.seq_length * (self.micro_batch_size if self.is_packed else 1)
        longest = max(num_units, -(-self.padded(budget) // unit))
        return min(-(-num_units // step) * step, longest) * unit


@dataclass(kw_only=True)
class MicroBatch:
    """The part of one micro-batch that this context-parallel rank computes.

    In the packed layout b is 1 and s is t, the number of packed tokens. Per-token fields are flat, in the order of
    ``tokens.flatten()``. Labels, mask and log-probabilities are already shifted by one: position j holds those of
    token j + 1. Tokens are not shifted.
    """

    tokens: Tensor
    """[b, s/cp] int64."""
    position_ids: Tensor
    """[b, s/cp] int64, counted from each sequence's first token."""
    labels: Tensor
    """[b * s/cp] int64; valid token ids even where ``loss_mask`` is 0."""
    loss_mask: Tensor
    """[b * s/cp] fp32: 1 where the label is a response token, else 0."""
    segment_ids: Tensor
    """[b * s/cp] int64: the token's place in ``sample_indices``. Padding has a valid value too, with mask 0."""
    weights: Tensor
    """[n] fp32: objective weight A of each sample; a micro-batch without samples has a single 0."""
    are_counted: Tensor
    """[n] bool: whether each sample's tokens count in the denominator of the loss."""
    num_uncomputed: Tensor
    """Scalar int64: response tokens that are in no micro-batch, but count in the denominator of the loss. One micro-batch of the global
    batch has all of them, on one context-parallel rank. The others have 0."""
    ref_logprobs: Tensor | None
    """[b * s/cp] fp32 under the frozen reference; None if any sample of the batch lacks them."""
    old_logprobs: Tensor | None
    """[b * s/cp] fp32 under the policy at the last refresh; None if any sample of the batch lacks them."""
    teacher_logprobs: Tensor | None
    """[b * s/cp] fp32 under the teacher; None if any sample of the batch lacks them."""
    packed_seq_params: PackedSeqParams | None
    """Bounds of the sequences for Megatron's attention; None in the padded layout."""
    sample_indices: list[int]
    """[segments] index in the global batch of each segment's sample."""

    @property
    def num_segments(self) -> int:
        """Number of samples, but at least 1: the length of ``weights``."""
        return max(1, len(self.sample_indices))

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies the micro-batch to a device; from pinned memory without waiting for the copy."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """Copies the micro-batch to page-locked memory, from which a GPU can copy in the background."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: move(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        if (params := self.packed_seq_params) is not None:
            moved["packed_seq_params"] = _packed_seq_params(move(params.cu_seqlens_q), params.max_seqlen_q)
        return replace(self, **moved)


@dataclass(kw_only=True, frozen=True)
class BatchFacts:
    """Sizes and mean weights of a global batch, known to every rank."""

    num_problems: int
    num_samples: int
    num_tokens: int
    """Prompt and response tokens of all samples, without padding."""
    num_counted: int
    """Response tokens in the denominator of the loss (``SampleArrays.are_counted``, ``Batch.num_uncomputed``). profit counts some
    of them only."""
    squared_tokens: int
    """Sum over samples of their squared number of tokens, to which attention's operations are proportional."""
    mass: float
    """Sum of |weight| x response tokens, divided by ``num_counted``: 1 for demonstrations of unsampled problems."""
    mean_weights: dict[str, float]
    """Sample kind -> mean weight; only kinds that occur in the batch. ``wrong_rollout``: rollouts of a weight below zero."""


@dataclass(kw_only=True)
class BatchShard:
    """The samples of a global batch that one data-parallel replica trains on, in the form that rank 0 sends."""

    facts: BatchFacts
    shape: tuple[int, int]
    """Rows and tokens of every micro-batch, the same for all replicas."""
    micro_batches: MicroBatchIndices
    samples: SampleArrays
    """The samples of all micro-batches, ordered as in ``micro_batches``."""
    num_uncomputed: int = 0
    """``Batch.num_uncomputed`` for one replica, 0 for the others."""


def shard_batch(batch: Batch, layout: BatchLayout) -> list[BatchShard]:
    """Divides a global batch among the data-parallel replicas.

    All micro-batches of the batch, on all ranks, have the same shape: pipeline stages allocate receive buffers from
    one fixed shape (pipeline_parallel/schedules.py with variable_seq_lengths off).

    Args:
        batch: samples of at most ``layout.seq_length`` tokens.
        layout: the layout of any rank; the rank numbers are not used.

    Returns:
        One shard per replica. Without samples the shards have no micro-batches.
    """
    samples = batch.samples
    facts = _facts(batch)
    if not len(samples):
        empty = BatchShard(facts=facts, shape=(0, 0), micro_batches=[], samples=samples)
        return [empty] * layout.dp_size
    lengths = [layout.padded(length) for length in samples.lengths.tolist()]
    if layout.is_packed:
        replicas = _assign_packed(lengths, layout)
        rows = 1
        longest = max(sum(lengths[i] for i in indices) for replica in replicas for indices in replica)
    else:
        replicas = _assign_padded(len(lengths), layout)
        rows, longest = layout.micro_batch_size, max(lengths)
    shape = (rows, layout.width(longest))
    return [
        BatchShard(
            facts=facts,
            shape=shape,
            micro_batches=micro_batches,
            samples=samples.take(list(itertools.chain.from_iterable(micro_batches))),
            num_uncomputed=batch.num_uncomputed if replica == 0 else 0,
        )
        for replica, micro_batches in enumerate(replicas)
    ]


def _facts(batch: Batch) -> BatchFacts:
    lengths, are_rollouts = batch.samples.lengths, batch.samples.are_rollouts
    # The mean over both signs would say nothing about either.
    are_wrong = are_rollouts & (batch.samples.weights < 0)
    kinds = {
        "demonstration": ~are_rollouts,
        "rollout": are_rollouts & ~are_wrong,
        "wrong_rollout": are_wrong,
    }
    num_counted = int(batch.samples.response_lengths[batch.samples.are_counted].sum()) + batch.num_uncomputed
    mass = float((abs(batch.samples.weights) * batch.samples.response_lengths).sum())
    return BatchFacts(
        num_problems=batch.num_problems,
        num_samples=len(lengths),
        num_tokens=int(lengths.sum()),
        num_counted=num_counted,
        mass=mass / max(1, num_counted),
        squared_tokens=int((lengths**2).sum()),
        mean_weights={
            kind: float(batch.samples.weights[of].mean()) for kind, of in kinds.items() if of.any()
        },
    )


def build_micro_batches(shard: BatchShard, layout: BatchLayout) -> list[MicroBatch]:
    """Builds this rank's micro-batches from its replica's shard, in host memory.

    Returns:
        The micro-batches, the same number on every rank; [] for a batch without samples.
    """
    starts = [0, *itertools.accumulate(len(indices) for indices in shard.micro_batches)]
    made = [
        _build(shard.samples.slice(start, end), indices, shard.shape, layout)
        for (start, end), indices in zip(itertools.pairwise(starts), shard.micro_batches, strict=True)
    ]
    if made and layout.cp_rank == 0:
        made[0].num_uncomputed += shard.num_uncomputed
    return made


def _assign_packed(lengths: list[int], layout: BatchLayout) -> list[MicroBatchIndices]:
    """Packs samples with the given padded lengths into micro-batches within the token budget, for each replica."""
    budget = layout.padded(layout.micro_batch_size * layout.seq_length)
    return pack(lengths, budget, layout.dp_size, layout.micro_batch_multiple)


def _assign_padded(num_samples: int, layout: BatchLayout) -> list[MicroBatchIndices]:
    """Deals samples to the replicas in turn, ``micro_batch_size`` to a micro-batch."""
    per_step = layout.micro_batch_size * layout.dp_size
    num = -(-num_samples // per_step)
    num = -(-num // layout.micro_batch_multiple) * layout.micro_batch_multiple
    replicas: list[MicroBatchIndices] = [[[] for _ in range(num)] for _ in range(layout.dp_size)]
    for index in range(num_samples):
        row, replica = divmod(index, layout.dp_size)
        replicas[replica][row // layout.micro_batch_size].append(index)
    return replicas


def _build(
    samples: SampleArrays, indices: list[int], shape: tuple[int, int], layout: BatchLayout
) -> MicroBatch:
    bounds = _sequence_bounds(samples.lengths.tolist(), shape, layout)
    local = _on_this_rank(_flat_fields(samples, bounds), bounds, layout)
    params = None
    if layout.is_packed:
        # The padding at the end is a sequence of its own: attention computes it too, so it counts for max_seqlen.
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        params = _packed_seq_params(torch.tensor(bounds, dtype=torch.int32), longest)
    rows, _ = shape
    return MicroBatch(
        tokens=local["tokens"].view(rows, -1),
        position_ids=local["position_ids"].view(rows, -1),
        labels=local["labels"],
        loss_mask=local["loss_mask"],
        segment_ids=local["segment_ids"],
        weights=torch.tensor(samples.weights.tolist() or [0.0]),
        are_counted=torch.tensor(samples.are_counted.tolist() or [True]),
        num_uncomputed=torch.tensor(0),
        ref_logprobs=local.get("ref_logprobs"),
        old_logprobs=local.get("old_logprobs"),
        teacher_logprobs=local.get("teacher_logprobs"),
        packed_seq_params=params,
        sample_indices=indices,
    )


def _sequence_bounds(lengths: list[int], shape: tuple[int, int], layout: BatchLayout) -> list[int]:
    """Start of each sequence in the flattened micro-batch, and the end of the last; padding included."""
    rows, width = shape
    if not layout.is_packed:
        return list(range(0, rows * width + 1, width))
    bounds = [0, *itertools.accumulate(map(layout.padded, lengths))]
    return bounds if bounds[-1] == width else [*bounds, width]


def _flat_fields(samples: SampleArrays, bounds: list[int]) -> dict[str, Array]:
    """The per-token fields of ``MicroBatch``, [b * s] with all context-parallel ranks' tokens, as numpy arrays."""
    total = bounds[-1]
    flat = {name: np.zeros(total, np.int64) for name in ("tokens", "labels", "position_ids", "segment_ids")}
    flat["loss_mask"] = np.zeros(total, np.float32)
    logprobs = {name: getattr(samples, name) for name in LOGPROBS}
    flat |= {name: np.zeros(total, np.float32) for name, values in logprobs.items() if values is not None}
    positions = np.arange(total)
    for start, end in itertools.pairwise(bounds):
        flat["position_ids"][start:end] = positions[: end - start]
    read, answered = 0, 0  # number of tokens and of response tokens in the samples before this one
    lengths = zip(samples.prompt_lengths.tolist(), samples.response_lengths.tolist(), strict=True)
    for place, (num_prompt, num_response) in enumerate(lengths):
        num = num_prompt + num_response
        start, end = bounds[place : place + 2]
        ids = samples.tokens[read : read + num]
        flat["tokens"][start : start + num] = ids
        flat["labels"][start : start + num - 1] = ids[1:]
        flat["segment_ids"][start:end] = place
        # The last prompt token predicts the first response token, so the mask begins one place before the response.
        response = slice(start + num_prompt - 1, start + num - 1)
        flat["loss_mask"][response] = 1.0
        for name, values in logprobs.items():
            if values is not None:
                flat[name][response] = values[answered : answered + num_response]
        read, answered = read + num, answered + num_response
    return flat


def _on_this_rank(flat: dict[str, Array], bounds: list[int], layout: BatchLayout) -> dict[str, Tensor]:
    """Selects the tokens of each sequence that this context-parallel rank holds."""
    if layout.cp_size == 1:
        return {name: torch.from_numpy(values) for name, values in flat.items()}
    parts = [
        start + zigzag_positions(end - start, layout.cp_rank, layout.cp_size).numpy()
        for start, end in itertools.pairwise(bounds)
    ]
    here = np.concatenate(parts)
    return {name: torch.from_numpy(values[here]) for name, values in flat.items()}


def _packed_seq_params(cu_seqlens: Tensor, longest: int) -> PackedSeqParams:
    # Transformer Engine compares the padded and unpadded tensors by identity to see that no padding lies between
    # sequences (dot_product_attention.py). FlashAttention then remains possible, so all four are the same tensor.
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def response_values(
    per_token: Tensor, batch: MicroBatch, cp_group: torch.distributed.ProcessGroup
) -> dict[int, Array]:
    """Splits a micro-batch's per-token values into one array per response.

    Runs one all-gather on ``cp_group`` if it has more than one rank.

    Args:
        per_token: [b * s/cp] on this rank, in the order of ``batch.labels``.

    Returns:
        Sample index -> [response tokens] fp32, the same on every rank of ``cp_group``.
    """
    # fp64 holds the integers exactly, so one all-gather can carry all four.
    columns = torch.stack(
        [
            per_token.double(),
            batch.loss_mask.double(),
            batch.segment_ids.double(),
            batch.position_ids.flatten().double(),
        ]
    )
    if cp_group.size() > 1:
        parts = [torch.empty_like(columns) for _ in range(cp_group.size())]
        torch.distributed.all_gather(parts, columns.contiguous(), group=cp_group)
        columns = torch.cat(parts, dim=1)
    values, mask, segments, positions = columns.cpu()
    kept = mask > 0
    values, segments, positions = values[kept], segments[kept].long(), positions[kept].long()
    order = torch.argsort(segments * (1 << 32) + positions)  # sorted by segment, then by position
    values, segments = values[order], segments[order]
    counts = torch.bincount(segments, minlength=batch.num_segments).tolist()
    split = torch.split(values.float(), counts)
    return {index: split[place].numpy() for place, index in enumerate(batch.sample_indices)}
