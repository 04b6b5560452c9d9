"""Model chunks -> Hugging Face tensors, one parameter at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.weights.families import Binding, NameTable
from megatron_rasft.weights.loading import ExpertRanks, bound_parameters


class TensorPlan(NamedTuple):
    """One tensor that ``gather_tensors`` will give."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class ExpertGroups(NamedTuple):
    """Groups over which the experts of a layer are spread, and over which one expert is cut."""

    ep_group: ProcessGroup
    etp_group: ProcessGroup

    @property
    def ranks(self) -> ExpertRanks:
        return ExpertRanks(*_rank_and_size(self.ep_group), *_rank_and_size(self.etp_group))


def _rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _bindings(binding: Binding, table: NameTable, experts: ExpertGroups | None) -> list[Binding]:
    """What a parameter is on every expert-parallel rank; one binding where it is no expert."""
    if experts is None or not binding.entry.is_expert:
        return [binding]
    ranks = experts.ranks
    step = ranks.num_local(table.shape.num_experts)
    first = binding.expert - ranks.ep_rank * step
    return [table.same_on(binding, first + rank * step) for rank in range(ranks.ep_size)]


def plan_tensors(
    chunks: Sequence[torch.nn.Module],
    table: NameTable,
    *,
    layer_offsets: Sequence[int],
    tp_group: ProcessGroup | None,
    dtypes: dict[str, torch.dtype] | None = None,
    experts: ExpertGroups | None = None,
) -> list[TensorPlan]:
    """What ``gather_tensors`` gives with the same arguments, in its order; runs no collective."""
    rank, size = _rank_and_size(tp_group)
    plans = []
    ranks = None if experts is None else experts.ranks
    for param, mine, _ in bound_parameters(chunks, table, layer_offsets, rank, size, ranks):
        for binding in [] if mine.is_copy else _bindings(mine, table, experts):
            for name, shape in zip(binding.hf_names, binding.hf_shapes, strict=True):
                plans.append(TensorPlan(name, shape, (dtypes or {}).get(name, param.dtype)))
    return plans


@torch.no_grad()
def gather_tensors(
    chunks: Sequence[torch.nn.Module],
    table: NameTable,
    *,
    layer_offsets: Sequence[int],
    tp_group: ProcessGroup | None,
    dtypes: dict[str, torch.dtype] | None = None,
    device: torch.device | str | None = None,
    out: Callable[[str], Tensor | None] | None = None,
    experts: ExpertGroups | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """The Hugging Face tensors of this pipeline stage, whole on rank 0 of ``tp_group``.

    Runs one gather per sharded parameter on ``tp_group``, so all its ranks must draw to the end, in step.
    Experts are gathered on ``experts``' groups instead, all of whose ranks must draw then; whole they are on
    rank 0 of ``tp_group`` on the first expert-parallel rank.
    The tied output layer's copy on the last stage is left out. Beside the model there is at most one
    parameter in memory, twice on rank 0. The parameters must be current: with --overlap-param-gather the
    last step's are only gathered at the next forward pass, unless they are synchronised first.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        table: names and layouts, ``HfFolder.table``.
        layer_offsets: global index of the first decoder layer of each chunk.
        tp_group: the tensor-parallel group; None where there is none.
        dtypes: type to give, by name; the parameter's own where a name is not in it.
        device: where to put the tensors together; None: where the parameters are.
        out: name -> memory of the tensor's shape and type to put it together in; None: new memory.
        experts: where the experts of a layer are; None: each rank has all, cut as the rest is.

    Yields:
        (name, tensor) on rank 0 of ``tp_group``, (name, None) on its other ranks.
    """
    rank, size = _rank_and_size(tp_group)
    ranks = None if experts is None else experts.ranks
    for param, binding, _ in bound_parameters(chunks, table, layer_offsets, rank, size, ranks):
        if binding.is_copy:
            continue
        if experts is not None and binding.entry.is_expert:
            yield from _gather_experts(param, binding, table, experts, rank == 0, dtypes or {}, device)
            continue
        wanted = [(dtypes or {}).get(name, param.dtype) for name in binding.hf_names]
        # one type travels; q, k and v of different stored types (unheard of) travel as the parameter is
        shard = param.detach().to(wanted[0] if len(set(wanted)) == 1 else param.dtype).contiguous()
        shards = _gather(shard, tp_group) if binding.entry.is_sharded else [shard] if rank == 0 else None
        if shards is None:
            yield from ((name, None) for name in binding.hf_names)
            continue
        tensors = assemble(shards, binding, table, device, out)
        del shards
        for name, tensor, dtype in zip(binding.hf_names, tensors, wanted, strict=True):
            yield name, tensor.to(dtype)


def _gather_experts(
    param: Tensor,
    mine: Binding,
    table: NameTable,
    experts: ExpertGroups,
    is_receiver: bool,
    dtypes: dict[str, torch.dtype],
    device: torch.device | str | None,
) -> Iterator[tuple[str, Tensor | None]]:
    """The same local expert of every expert-parallel rank."""
    bindings = _bindings(mine, table, experts)
    shards = _gather(param.detach().contiguous(), experts.etp_group)
    whole: list[list[Tensor] | None] = []
    if shards is not None:
        whole = [_gather(tensor, experts.ep_group) for tensor in assemble(shards, mine, table, device)]
    for rank, binding in enumerate(bindings):
        for i, name in enumerate(binding.hf_names):
            copies = whole[i] if whole and is_receiver else None
            yield name, None if copies is None else copies[rank].to(dtypes.get(name, param.dtype))


def _gather(shard: Tensor, tp_group: ProcessGroup | None) -> list[Tensor] | None:
    """The shards of all ranks on rank 0, None on the others."""
    if tp_group is None or tp_group.size() == 1:
        return [shard]
    # as bytes: every backend can move those, whatever the type
    raw = shard.view(torch.uint8)
    raws = [torch.empty_like(raw) for _ in range(tp_group.size())] if tp_group.rank() == 0 else None
    dist.gather(raw, raws, group=tp_group, group_dst=0)
    return None if raws is None else [r.view(shard.dtype) for r in raws]


def assemble(
    shards: list[Tensor],
    binding: Binding,
    table: NameTable,
    device: torch.device | str | None = None,
    out: Callable[[str], Tensor | None] | None = None,
) -> list[Tensor]:
    """Whole Hugging Face tensors out of the shards of all tensor-parallel ranks."""
    dtype, device = shards[0].dtype, device or shards[0].device
    tensors = []
    for name, shape in zip(binding.hf_names, binding.hf_shapes, strict=True):
        memory = None if out is None else out(name)
        tensors.append(torch.empty(shape, dtype=dtype, device=device) if memory is None else memory)
    size = len(shards) if binding.entry.is_sharded else 1
    for rank, shard in enumerate(shards):
        layout = binding.entry.layout(table.shape, rank, size, shard.shape)
        position = 0
        for source, start, stop in layout.pieces:
            piece = shard.narrow(layout.dim, position, stop - start)
            tensors[source].narrow(layout.dim, start, stop - start).copy_(piece)
            position += stop - start
    return tensors
