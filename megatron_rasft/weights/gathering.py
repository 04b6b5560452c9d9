"""Model chunks -> Hugging Face tensors, one parameter at a time."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
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
    is_first_replica: bool = True
    """True where the expert-data-parallel rank is 0: these ranks give the experts."""

    @property
    def ranks(self) -> ExpertRanks:
        return ExpertRanks(*_rank_and_size(self.ep_group), *_rank_and_size(self.etp_group))


def _rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _turns(
    chunks: Sequence[torch.nn.Module],
    table: NameTable,
    layer_offsets: Sequence[int],
    tp_group: ProcessGroup | None,
    experts: ExpertGroups | None,
) -> Iterator[tuple[Tensor, Binding, int]]:
    """Each parameter, its binding on the rank that gives it, and for an expert that expert-parallel rank, else 0.

    The experts of a layer come from rank after rank, so that they are in the order of their numbers.
    """
    ranks = None if experts is None else experts.ranks
    bound = bound_parameters(chunks, table, layer_offsets, *_rank_and_size(tp_group), ranks)
    for prefix, layer in groupby(bound, lambda b: b[1].prefix if b[1].entry.is_expert else ""):
        if ranks is None or not prefix:
            yield from ((param, binding, 0) for param, binding, _ in layer if not binding.is_copy)
            continue
        local = [(param, binding) for param, binding, _ in layer]
        num_local = ranks.num_local(table.shape.num_experts)
        for ep_rank in range(ranks.ep_size):
            for param, mine in local:
                expert = mine.expert + (ep_rank - ranks.ep_rank) * num_local
                yield param, table.same_on(mine, expert), ep_rank


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
    return [
        TensorPlan(name, shape, (dtypes or {}).get(name, param.dtype))
        for param, binding, _ in _turns(chunks, table, layer_offsets, tp_group, experts)
        for name, shape in zip(binding.hf_names, binding.hf_shapes, strict=True)
    ]


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
    is_first_replica: bool = True,
) -> Iterator[tuple[str, Tensor | None]]:
    """The Hugging Face tensors of this pipeline stage, whole on the first of its ranks.

    Runs one gather per sharded parameter on ``tp_group``, so all its ranks must draw to the end, in step.
    Experts are gathered on ``experts``' groups instead, one sent after the other to the first expert-parallel
    rank; all ranks of these groups must draw then.
    The tied output layer's copy on the last stage is left out. Beside the model there is at most one
    parameter in memory, twice on the first rank. The parameters must be current: with --overlap-param-gather the
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
        is_first_replica: False on a rank that takes part for its experts only: its data- or context-parallel
            rank is not 0.

    Yields:
        (name, tensor) on rank 0 of ``tp_group``, for experts of both of ``experts``' groups, (name, None)
        on the other ranks.
    """
    for param, binding, ep_rank in _turns(chunks, table, layer_offsets, tp_group, experts):
        tensors: Sequence[Tensor] | None = None
        wanted = [(dtypes or {}).get(name, param.dtype) for name in binding.hf_names]
        # one type travels; q, k and v of different stored types (unheard of) travel as the parameter is
        dtype = wanted[0] if len(set(wanted)) == 1 else param.dtype
        if experts is not None and binding.entry.is_expert:
            if experts.is_first_replica:
                tensors = _gather_expert(param, dtype, binding, table, experts, ep_rank, device, out)
        elif is_first_replica:
            shards = _gather_shards(param, dtype, tp_group if binding.entry.is_sharded else None)
            if shards is not None and _rank_and_size(tp_group)[0] == 0:
                tensors = assemble(shards, binding, table, device, out)
            del shards
        if tensors is None:
            yield from ((name, None) for name in binding.hf_names)
            continue
        for name, tensor, stored in zip(binding.hf_names, tensors, wanted, strict=True):
            yield name, tensor.to(stored)


def _gather_expert(
    param: Tensor,
    dtype: torch.dtype,
    binding: Binding,
    table: NameTable,
    experts: ExpertGroups,
    giver: int,
    device: torch.device | str | None,
    out: Callable[[str], Tensor | None] | None,
) -> list[Tensor] | None:
    """One expert of expert-parallel rank ``giver``, on the first rank; None on the others."""
    ranks = experts.ranks
    tensors: list[Tensor] | None = None
    if ranks.ep_rank == giver:
        shards = _gather_shards(param, dtype, experts.etp_group)
        if shards is not None and giver == 0:
            return assemble(shards, binding, table, device, out)
        for tensor in assemble(shards, binding, table) if shards is not None else ():
            dist.send(tensor.view(torch.uint8), group=experts.ep_group, group_dst=0)
    elif ranks.ep_rank == 0 and ranks.etp_rank == 0:
        tensors = []
        for name, shape in zip(binding.hf_names, binding.hf_shapes, strict=True):
            memory = None if out is None else out(name)
            if memory is None or memory.device != param.device:
                memory = torch.empty(shape, dtype=dtype, device=param.device)
            dist.recv(memory.view(torch.uint8), group=experts.ep_group, group_src=giver)
            tensors.append(memory if device is None else memory.to(device))
    return tensors


def _gather_shards(param: Tensor, dtype: torch.dtype, group: ProcessGroup | None) -> list[Tensor] | None:
    """A parameter's shards, as ``dtype``, of all ranks of ``group`` on its first, None on the others."""
    return _gather(param.detach().to(dtype).contiguous(), group)


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
