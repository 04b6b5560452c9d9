"""Turns training samples into the micro-batches of one data- and context-parallel rank.

Rank 0 plans a global batch and makes each replica's share of it (``shares``); every rank of the replica cuts its
micro-batches from the share (``cut``), on the host; ``MicroBatch.to`` brings them to the device.
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
from megatron_rasft.training.attention import zigzag_positions
from megatron_rasft.training.samples import Array, Batch, SampleArrays

WIDTH_SLACK = 0.03
"""Largest share of a micro-batch's width that may be padding for the sake of fewer widths, on GPUs.

Every new width splits blocks of the caching allocator and has kernels compiled or planned anew (torch.compile, cuDNN).
"""


@dataclass(kw_only=True, frozen=True)
class BatchLayout:
    """How a global batch is cut; the same on every rank but for the three rank numbers."""

    micro_batch_size: int
    seq_length: int
    """Longest sample, and with micro_batch_size the token budget of a packed micro-batch."""
    is_packed: bool
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    token_multiple: int
    """Every micro-batch is padded to a multiple of this many tokens (sequence parallelism, FP8)."""
    micro_batch_multiple: int = 1
    """The number of micro-batches is a multiple of this (interleaved pipeline)."""
    width_slack: float = 0.0
    """Share of a width that rounding it up may add, >= 0 and < 1; 0 takes the smallest width."""

    @property
    def segment_multiple(self) -> int:
        """Every sequence is padded to a multiple of this, so that context parallelism can cut it."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def padded(self, num_tokens: int) -> int:
        return -(-num_tokens // self.segment_multiple) * self.segment_multiple

    def width(self, num_tokens: int) -> int:
        """The width of the micro-batches whose longest row has ``num_tokens``, at least 1.

        At a slack of 0.03 it takes about 35 values between a width of many units and twice that width, and it is
        never more than the token budget needs.
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
    """One micro-batch as this context-parallel rank sees it.

    b is 1 and s is t, the packed tokens, when packed; per-token fields are flat in the order of
    ``tokens.flatten()``. Everything but the tokens of the last column's successors is shifted already:
    position j carries the label, mask and log-probabilities of token j + 1.
    """

    tokens: Tensor
    """[b, s/cp] int64."""
    position_ids: Tensor
    """[b, s/cp] int64, counted from each sequence's first token."""
    labels: Tensor
    """[b * s/cp] int64, valid ids even where masked out."""
    loss_mask: Tensor
    """[b * s/cp] fp32: 1 where the label is a response token."""
    segment_ids: Tensor
    """[b * s/cp] int64: index into sample_indices; padding belongs to some segment with mask 0."""
    weights: Tensor
    """[n] fp32: A of each sample; n is at least 1."""
    ref_logprobs: Tensor | None
    """[b * s/cp] fp32 or None if any sample lacks them."""
    old_logprobs: Tensor | None
    packed_seq_params: PackedSeqParams | None
    sample_indices: list[int]
    """For each segment the sample's index in the global batch."""

    @property
    def num_segments(self) -> int:
        return max(1, len(self.sample_indices))

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device. Copies from pinned memory are queued behind the device's work, not waited for."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: move(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        if (params := self.packed_seq_params) is not None:
            # One tensor for all four: Transformer Engine sees by its identity that nothing lies between sequences.
            moved["packed_seq_params"] = _packed(move(params.cu_seqlens_q), params.max_seqlen_q)
        return replace(self, **moved)


@dataclass(kw_only=True, frozen=True)
class BatchFacts:
    """What every rank knows of a global batch."""

    num_problems: int
    num_samples: int
    num_tokens: int
    squared_tokens: int
    """Sum over samples of the square of their tokens: attention's operations grow with it."""
    mean_weights: dict[str, float]
    """Sample kind -> mean weight; kinds without a sample are left out."""


@dataclass(kw_only=True)
class Share:
    """What one data-parallel replica trains of a global batch, as it travels from rank 0."""

    facts: BatchFacts
    shape: tuple[int, int]
    """Rows and tokens of every micro-batch, the same for all replicas."""
    bins: list[list[int]]
    """Micro-batch -> its samples' indices in the global batch."""
    samples: SampleArrays
    """The samples of all bins, in the order of ``bins``."""


def shares(batch: Batch, layout: BatchLayout) -> list[Share]:
    """Each replica's share of a global batch.

    All micro-batches of the batch, on all ranks, have the same shape, so every pipeline schedule can run them.

    Args:
        batch: none of its samples is longer than ``layout.seq_length``.
        layout: of any rank.
    """
    samples = batch.samples
    facts = _facts(batch)
    if not len(samples):
        return [Share(facts=facts, shape=(0, 0), bins=[], samples=samples)] * layout.dp_size
    lengths = [layout.padded(length) for length in samples.lengths.tolist()]
    plan = (_packed_plan if layout.is_packed else _padded_plan)(lengths, layout)
    if layout.is_packed:
        rows, longest = 1, max(sum(lengths[i] for i in bin_) for replica in plan for bin_ in replica)
    else:
        rows, longest = layout.micro_batch_size, max(lengths)
    shape = (rows, layout.width(longest))
    return [
        Share(facts=facts, shape=shape, bins=bins, samples=samples.take([i for bin_ in bins for i in bin_]))
        for bins in plan
    ]


def _facts(batch: Batch) -> BatchFacts:
    lengths, are_rollouts = batch.samples.lengths, batch.samples.are_rollouts
    kinds = {"demonstration": ~are_rollouts, "rollout": are_rollouts}
    return BatchFacts(
        num_problems=batch.num_problems,
        num_samples=len(lengths),
        num_tokens=int(lengths.sum()),
        squared_tokens=int((lengths**2).sum()),
        mean_weights={
            kind: float(batch.samples.weights[of].mean()) for kind, of in kinds.items() if of.any()
        },
    )


def cut(share: Share, layout: BatchLayout) -> list[MicroBatch]:
    """This rank's micro-batches of its replica's share, on the host.

    Returns:
        The same number on every rank; none of an empty batch.
    """
    ends = np.cumsum([len(bin_) for bin_ in share.bins]).tolist()
    starts = [0, *ends[:-1]]
    return [
        _build(share.samples.slice(start, end), bin_, share.shape, layout)
        for start, end, bin_ in zip(starts, ends, share.bins, strict=True)
    ]


def _packed_plan(lengths: list[int], layout: BatchLayout) -> list[list[list[int]]]:
    budget = layout.padded(layout.micro_batch_size * layout.seq_length)
    return pack(lengths, budget, layout.dp_size, layout.micro_batch_multiple)


def _padded_plan(lengths: list[int], layout: BatchLayout) -> list[list[list[int]]]:
    per_step = layout.micro_batch_size * layout.dp_size
    num = max(1, -(-len(lengths) // per_step))
    num = -(-num // layout.micro_batch_multiple) * layout.micro_batch_multiple
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # Deal in turn: neighbours in length go to different ranks, so every rank pads alike.
    plan: list[list[list[int]]] = [[[] for _ in range(num)] for _ in range(layout.dp_size)]
    for place, index in enumerate(order):
        step, replica = divmod(place, layout.dp_size)
        plan[replica][step // layout.micro_batch_size].append(index)
    return plan


def _build(
    samples: SampleArrays, indices: list[int], shape: tuple[int, int], layout: BatchLayout
) -> MicroBatch:
    rows, width = shape
    total = rows * width
    flat = {name: np.zeros(total, np.int64) for name in ("tokens", "labels", "position_ids", "segment_ids")}
    flat["loss_mask"] = np.zeros(total, np.float32)
    logprobs = {"ref_logprobs": samples.ref_logprobs, "old_logprobs": samples.old_logprobs}
    flat |= {name: np.zeros(total, np.float32) for name, values in logprobs.items() if values is not None}
    steps = np.arange(total)
    bounds, read, answered = [0], 0, 0
    lengths = zip(samples.prompt_lengths.tolist(), samples.response_lengths.tolist(), strict=True)
    for place, (num_prompt, num_response) in enumerate(lengths):
        num = num_prompt + num_response
        start = bounds[-1] if layout.is_packed else place * width
        end = start + (layout.padded(num) if layout.is_packed else width)
        ids = samples.tokens[read : read + num]
        flat["tokens"][start : start + num] = ids
        flat["labels"][start : start + num - 1] = ids[1:]
        flat["position_ids"][start:end] = steps[: end - start]
        flat["segment_ids"][start:end] = place
        response = slice(start + num_prompt - 1, start + num - 1)
        flat["loss_mask"][response] = 1.0
        for name, values in logprobs.items():
            if values is not None:
                flat[name][response] = values[answered : answered + num_response]
        read, answered = read + num, answered + num_response
        bounds.append(end)
    if layout.is_packed and bounds[-1] < total:
        flat["position_ids"][bounds[-1] :] = steps[: total - bounds[-1]]
        bounds.append(total)
    if not layout.is_packed:
        bounds = list(range(0, total + 1, width))
        for row in range(len(indices), rows):
            flat["position_ids"][row * width : (row + 1) * width] = steps[:width]
    local = _on_this_rank(flat, bounds, layout)
    params = None
    if layout.is_packed:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        params = _packed(cu_seqlens, max(e - b for b, e in itertools.pairwise(bounds)))
    return MicroBatch(
        tokens=local["tokens"].view(rows, -1),
        position_ids=local["position_ids"].view(rows, -1),
        labels=local["labels"],
        loss_mask=local["loss_mask"],
        segment_ids=local["segment_ids"],
        weights=torch.tensor(samples.weights.tolist() or [0.0]),
        ref_logprobs=local.get("ref_logprobs"),
        old_logprobs=local.get("old_logprobs"),
        packed_seq_params=params,
        sample_indices=indices,
    )


def _on_this_rank(flat: dict[str, Array], bounds: list[int], layout: BatchLayout) -> dict[str, Tensor]:
    """The tokens of each sequence that this context-parallel rank holds."""
    if layout.cp_size == 1:
        return {name: torch.from_numpy(values) for name, values in flat.items()}
    parts = [
        b + zigzag_positions(e - b, layout.cp_rank, layout.cp_size).numpy()
        for b, e in itertools.pairwise(bounds)
    ]
    here = np.concatenate(parts)
    return {name: torch.from_numpy(values[here]) for name, values in flat.items()}


def _packed(cu_seqlens: Tensor, longest: int) -> PackedSeqParams:
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
    """Per-token values of this micro-batch, put back in the order of each sample's response.

    Runs one all-gather on ``cp_group`` when it has more than one rank.

    Args:
        per_token: [b * s/cp] on this rank, in the order of ``batch.labels``.

    Returns:
        For each sample index its response's values, fp32, the same on every rank of ``cp_group``.
    """
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
    order = torch.argsort(segments * (1 << 32) + positions)
    values, segments = values[order], segments[order]
    counts = torch.bincount(segments, minlength=batch.num_segments).tolist()
    split = torch.split(values.float(), counts)
    return {index: split[place].numpy() for place, index in enumerate(batch.sample_indices)}
