"""Gathers Hugging Face tensors from the model chunks of all ranks, one parameter at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.weights.families import Binding, JoinedTensor, NameTable
from megatron_rasft.weights.loading import ExpertRanks, bound_parameters


class TensorPlan(NamedTuple):
    """A tensor that ``gather_tensors`` will yield."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    joined: JoinedTensor | None = None
    """The tensors that lie in this one, and are written one by one; None if it is written at once."""

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The names under which the tensor's content is written, in groups that lie in one piece. The pieces have equal sizes."""
        return ((self.name,),) if self.joined is None else self.joined.blocks

    @property
    def written(self) -> tuple[str, ...]:
        """The names under which the tensor's content is written."""
        return tuple(name for block in self.blocks for name in block)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ModelTensors(Protocol):
    """The tensors of this rank's model chunks under their Hugging Face names: from our tables, or from Megatron-Bridge."""

    stage: int
    """Which of ``num_stages`` parts of the tensors ``plan`` and ``gather`` yield. Each part has a sender of its own."""
    num_stages: int
    takes_part: bool
    """Whether this rank calls ``gather``. Ranks of other replicas do not."""

    def load(self) -> None:
        """Copies the folder's weights into the model. A collective of the world.

        Raises:
            WeightsError, ModelFolderError: the weights cannot be loaded. Ranks other than 0 raise FailedElsewhere.
        """

    def plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> Sequence[TensorPlan]:
        """Returns the tensors that ``gather`` yields, in its order. Runs no collective."""

    def gather(
        self,
        *,
        dtypes: dict[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
        out: Callable[[str], Tensor | None] | None = None,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yields (name, tensor) on the sender and (name, None) on the other ranks; see ``gather_tensors``."""


def join_plans(plans: Iterable[TensorPlan], joined: dict[str, JoinedTensor]) -> list[TensorPlan]:
    """Replaces the parts of each joined tensor by that tensor. All parts of it must be in ``plans``."""
    whole_of = {part: name for name, tensor in joined.items() for part in tensor.parts}
    result: dict[str, TensorPlan] = {}
    for plan in plans:
        name = whole_of.get(plan.name)
        if name is None:
            result[plan.name] = plan
        else:
            result.setdefault(name, TensorPlan(name, joined[name].shape, plan.dtype, joined[name]))
    return list(result.values())


class ExpertGroups(NamedTuple):
    """The process groups over which a layer's experts are distributed (ep) and each expert is split (etp)."""

    ep_group: ProcessGroup
    etp_group: ProcessGroup
    is_first_replica: bool = True
    """True if the expert-data-parallel rank is 0. These ranks send the experts."""

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
    """Yields each parameter, its binding on the sending rank, and the expert-parallel rank that sends it (0 outside experts).

    The expert-parallel ranks take turns within a layer, so that experts are yielded in the order of their indices.
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
    """Returns the tensors that ``gather_tensors`` yields for the same arguments, in its order. Runs no collective."""
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
    """Yields the Hugging Face tensors of this pipeline stage, gathered on rank 0 of its tensor-parallel group.

    Runs one gather per sharded parameter on ``tp_group``, so all its ranks must iterate to the end together. Experts
    are gathered on the groups of ``experts`` instead, and sent to the first expert-parallel rank one after another; all ranks
    of these groups must iterate.

    The last stage's copy of a tied output layer is not yielded. Besides the model, memory holds at most one parameter, and a
    second copy of it on rank 0. The parameters must be current: with --overlap-param-gather Megatron gathers the last step's
    weights only in the next forward pass, unless the caller synchronises them before.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        table: names and layouts, ``HfFolder.table``.
        layer_offsets: global index of the first decoder layer of each chunk.
        tp_group: the tensor-parallel group; None without tensor parallelism.
        dtypes: name -> type of the result; other tensors keep the type of their parameter.
        device: device of the result; None for the parameters' device.
        out: returns the tensor into which the named result is written, of its shape and type; None allocates a new tensor.
        experts: the groups of the experts; None: each rank holds a shard of every expert, like other parameters.
        is_first_replica: False on a rank that only sends its experts, because its data- or context-parallel rank is
            not 0.

    Yields:
        (name, tensor) on rank 0 of ``tp_group``, or for experts on rank 0 of both groups of ``experts``; (name, None) on the
        other ranks.
    """
    for param, binding, ep_rank in _turns(chunks, table, layer_offsets, tp_group, experts):
        tensors: Sequence[Tensor] | None = None
        wanted = [(dtypes or {}).get(name, param.dtype) for name in binding.hf_names]
        # a gather has one type: if q, k and v are stored in different types, the parameter's type is gathered
        dtype = wanted[0] if len(set(wanted)) == 1 else param.dtype
        if experts is not None and binding.entry.is_expert:
            if experts.is_first_replica:
                tensors = _gather_expert(param, dtype, binding, table, experts, ep_rank, device, out)
        elif is_first_replica:
            shards = _gather_shards(param, dtype, tp_group if binding.is_split(param.shape) else None)
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
    sender: int,
    device: torch.device | str | None,
    out: Callable[[str], Tensor | None] | None,
) -> list[Tensor] | None:
    """Returns one expert of expert-parallel rank ``sender`` on rank 0 of both groups, None on the others."""
    ranks = experts.ranks
    tensors: list[Tensor] | None = None
    if ranks.ep_rank == sender:
        shards = _gather_shards(param, dtype, experts.etp_group)
        if shards is not None and sender == 0:
            return assemble(shards, binding, table, device, out)
        for tensor in assemble(shards, binding, table) if shards is not None else ():
            dist.send(tensor.view(torch.uint8), group=experts.ep_group, group_dst=0)
    elif ranks.ep_rank == 0 and ranks.etp_rank == 0:
        tensors = []
        for name, shape in zip(binding.hf_names, binding.hf_shapes, strict=True):
            memory = None if out is None else out(name)
            if memory is None or memory.device != param.device:
                memory = torch.empty(shape, dtype=dtype, device=param.device)
            dist.recv(memory.view(torch.uint8), group=experts.ep_group, group_src=sender)
            tensors.append(memory if device is None else memory.to(device))
    return tensors


def _gather_shards(param: Tensor, dtype: torch.dtype, group: ProcessGroup | None) -> list[Tensor] | None:
    """Returns a parameter's shards from all ranks of ``group``, as ``dtype``, on its rank 0; None on the others."""
    return _gather(param.detach().to(dtype).contiguous(), group)


def _gather(shard: Tensor, tp_group: ProcessGroup | None) -> list[Tensor] | None:
    """Returns the shards of all ranks on rank 0, None on the others."""
    if tp_group is None or tp_group.size() == 1:
        return [shard]
    # gathered as bytes, because not every backend supports every type
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
    """Assembles the Hugging Face tensors of a parameter from the shards of all tensor-parallel ranks."""
    dtype, device = shards[0].dtype, device or shards[0].device
    tensors = []
    for name, shape in zip(binding.hf_names, binding.hf_shapes, strict=True):
        memory = None if out is None else out(name)
        tensors.append(torch.empty(shape, dtype=dtype, device=device) if memory is None else memory)
    size = len(shards) if binding.entry.is_sharded else 1
    for rank, shard in enumerate(shards):
        layout = binding.entry.layout(table.shape, rank, size, shard.shape)
        position = 0
        for tensor, start, stop in layout.pieces:
            piece = shard.narrow(layout.dim, position, stop - start)
            tensors[tensor].narrow(layout.dim, start, stop - start).copy_(piece)
            position += stop - start
    return tensors
