"""Turns training samples into the micro-batches of one data- and context-parallel rank."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rasft.data.packing import pack
from megatron_rasft.training.attention import zigzag_positions
from megatron_rasft.types import TrainingSample

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


def micro_batches(
    samples: Sequence[TrainingSample], layout: BatchLayout, device: torch.device
) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch.

    Every rank is given the same samples and cuts the same plan. All micro-batches of the batch, on
    all ranks, have the same shape, so every pipeline schedule can run them.

    Args:
        samples: the whole global batch, none longer than ``layout.seq_length``.
        layout: of this rank.
        device: where the tensors are put.

    Returns:
        At least one micro-batch, the same number on every rank.
    """
    lengths = [layout.padded(s.num_tokens) for s in samples]
    plan = (_packed_plan if layout.is_packed else _padded_plan)(lengths, layout)
    mine = plan[layout.dp_rank]
    if layout.is_packed:
        longest = max((sum(lengths[i] for i in bin_) for replica in plan for bin_ in replica), default=0)
        shape = (1, layout.width(longest))
    else:
        shape = (layout.micro_batch_size, layout.width(max(lengths, default=0)))
    return [_build(samples, lengths, bin_, shape, layout, device) for bin_ in mine]


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
    samples: Sequence[TrainingSample],
    lengths: list[int],
    bin_: list[int],
    shape: tuple[int, int],
    layout: BatchLayout,
    device: torch.device,
) -> MicroBatch:
    rows, width = shape
    total = rows * width
    tokens = torch.zeros(total, dtype=torch.int64)
    labels = torch.zeros(total, dtype=torch.int64)
    positions = torch.zeros(total, dtype=torch.int64)
    segments = torch.zeros(total, dtype=torch.int64)
    loss_mask = torch.zeros(total)
    chosen = [samples[i] for i in bin_]
    ref = torch.zeros(total) if all(s.ref_logprobs is not None for s in chosen) else None
    old = torch.zeros(total) if all(s.old_logprobs is not None for s in chosen) else None
    bounds = [0]
    for place, (index, sample) in enumerate(zip(bin_, chosen, strict=True)):
        start = bounds[-1] if layout.is_packed else place * width
        length = lengths[index] if layout.is_packed else width
        ids = torch.tensor(sample.prompt_ids + sample.response_ids)
        tokens[start : start + len(ids)] = ids
        labels[start : start + len(ids) - 1] = ids[1:]
        positions[start : start + length] = torch.arange(length)
        segments[start : start + length] = place
        response = slice(start + len(sample.prompt_ids) - 1, start + len(ids) - 1)
        loss_mask[response] = 1.0
        if ref is not None:
            ref[response] = torch.tensor(sample.ref_logprobs)
        if old is not None:
            old[response] = torch.tensor(sample.old_logprobs)
        bounds.append(start + length)
    if layout.is_packed and bounds[-1] < total:
        positions[bounds[-1] :] = torch.arange(total - bounds[-1])
        bounds.append(total)
    if not layout.is_packed:
        bounds = list(range(0, total + 1, width))
        for row in range(len(bin_), rows):
            positions[row * width : (row + 1) * width] = torch.arange(width)
    here = torch.cat(
        [b + zigzag_positions(e - b, layout.cp_rank, layout.cp_size) for b, e in itertools.pairwise(bounds)]
    )
    params = None
    if layout.is_packed:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        longest = max(e - b for b, e in itertools.pairwise(bounds))
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def local(flat: Tensor) -> Tensor:
        return flat[here].to(device, non_blocking=True)

    return MicroBatch(
        tokens=local(tokens).view(rows, -1),
        position_ids=local(positions).view(rows, -1),
        labels=local(labels),
        loss_mask=local(loss_mask),
        segment_ids=local(segments),
        weights=torch.tensor([s.weight for s in chosen] or [0.0]).to(device),
        ref_logprobs=None if ref is None else local(ref),
        old_logprobs=None if old is None else local(old),
        packed_seq_params=params,
        sample_indices=list(bin_),
    )


def response_values(
    per_token: Tensor, batch: MicroBatch, cp_group: torch.distributed.ProcessGroup
) -> dict[int, list[float]]:
    """Per-token values of this micro-batch, put back in the order of each sample's response.

    Runs one all-gather on ``cp_group`` when it has more than one rank.

    Args:
        per_token: [b * s/cp] on this rank, in the order of ``batch.labels``.

    Returns:
        For each sample index its response's values, the same on every rank of ``cp_group``.
    """
    fields = torch.stack(
        [
            per_token.double(),
            batch.loss_mask.double(),
            batch.segment_ids.double(),
            batch.position_ids.flatten().double(),
        ]
    )
    if cp_group.size() > 1:
        parts = [torch.empty_like(fields) for _ in range(cp_group.size())]
        torch.distributed.all_gather(parts, fields.contiguous(), group=cp_group)
        fields = torch.cat(parts, dim=1)
    values, mask, segments, positions = fields.cpu()
    kept = mask > 0
    values, segments, positions = values[kept], segments[kept].long(), positions[kept].long()
    order = torch.argsort(segments * (1 << 32) + positions)
    values, segments = values[order], segments[order]
    counts = torch.bincount(segments, minlength=batch.num_segments).tolist()
    split = torch.split(values, counts)
    return {index: split[place].tolist() for place, index in enumerate(batch.sample_indices)}
