"""Loads a Hugging Face folder into model chunks in place. Every rank reads only its own slices."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.errors import ModelFolderError, WeightsError
from megatron_rasft.weights.families import Binding, NameTable, ShardLayout
from megatron_rasft.weights.finite import NOT_FINITE, is_finite
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.wording import counted


class ExpertRanks(NamedTuple):
    """The experts that a rank holds, and its shard of each; by default all experts, not split."""

    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    """Rank in the expert-tensor-parallel group, over which each expert is split."""
    etp_size: int = 1

    def num_local(self, num_experts: int) -> int:
        if num_experts % self.ep_size:
            raise ValueError(
                f"--expert-model-parallel-size {self.ep_size} does not divide the model's {num_experts} experts."
            )
        return num_experts // self.ep_size


def bound_parameters(
    chunks: Sequence[torch.nn.Module],
    table: NameTable,
    layer_offsets: Sequence[int],
    tp_rank: int,
    tp_size: int,
    experts: ExpertRanks | None = None,
) -> Iterator[tuple[Tensor, Binding, ShardLayout]]:
    """Yields every parameter of the chunks with its entry in the table and the layout of its shard.

    Also yields the buffers that the table knows, such as the bias of a router. They are converted back to fp32, because
    Megatron's Float16Module rounds all buffers. The prefixes of wrapper modules (DistributedDataParallel, Float16Module) are ignored.

    Raises:
        ModelFolderError: a parameter has no entry, or its shape differs from the entry's.
    """
    if len(chunks) != len(layer_offsets):
        raise ValueError(
            f"{len(chunks)} model chunks but {len(layer_offsets)} layer_offsets; give one per chunk."
        )
    experts = experts or ExpertRanks(etp_rank=tp_rank, etp_size=tp_size)
    expert_offset = experts.ep_rank * experts.num_local(table.shape.num_experts)
    for chunk, layer_offset in zip(chunks, layer_offsets, strict=True):
        parameters = dict(chunk.named_parameters())
        for full_name, param in (*parameters.items(), *chunk.named_buffers()):
            name = _unwrapped(full_name)
            binding = table.bind(name, layer_offset, expert_offset)
            if binding is None:
                if full_name not in parameters:
                    continue
                raise ModelFolderError(
                    f"parameter {name} (layer offset {layer_offset}) has no counterpart in the Hugging Face "
                    "model; the model was not built with the arguments that its config.json implies"
                )
            rank, size = (
                (experts.etp_rank, experts.etp_size) if binding.entry.is_expert else (tp_rank, tp_size)
            )
            layout = binding.entry.layout(table.shape, rank, size, param.shape)
            expected = binding.shard_shape(layout)
            if tuple(param.shape) != expected:
                raise ModelFolderError(
                    f"parameter {name} has shape {list(param.shape)} on tensor-parallel rank {rank} of "
                    f"{size}, config.json implies {list(expected)}"
                )
            if binding.entry.is_buffer:
                param.data = param.data.float()
            yield param, binding, layout


def _unwrapped(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


@torch.no_grad()
def load_into(
    chunks: Sequence[torch.nn.Module],
    folder: HfFolder,
    *,
    tp_rank: int,
    tp_size: int,
    layer_offsets: Sequence[int],
    pp_group: ProcessGroup | None = None,
    experts: ExpertRanks | None = None,
) -> None:
    """Copies the folder's weights into the parameters of this rank, cast to the type of each parameter.

    Reads only this rank's slices. Besides the model, memory holds one shard of one parameter and one slice. Rows of the
    padded vocabulary become zero. If an optimizer keeps main parameters, call its ``reload_model_params()`` afterwards.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        folder: an opened folder; its architecture must be the one the chunks were built with.
        tp_rank: rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.
        layer_offsets: global index of the first decoder layer of each chunk.
        pp_group: group over which the layers are split; one all_gather_object on it checks that the stages together loaded
            every tensor. None: these chunks are the complete model.
        experts: the experts of this rank; None: a shard of every expert, like other parameters.

    Raises:
        ModelFolderError: a parameter has no tensor, a tensor has no parameter, or their shapes differ.
        WeightsError: a tensor has NaN or infinity, or overflows as float16.
    """
    taken: set[str] = set()
    fault = ""  # raised at the end, because the other stages wait in the gather
    for param, binding, layout in bound_parameters(
        chunks, folder.table, layer_offsets, tp_rank, tp_size, experts
    ):
        shard = read_shard(folder, binding, layout)
        if param.dtype == torch.float16:
            shard = shard.half()  # checked in the type in which values can overflow
        if not fault and not is_finite(shard):
            fault = (
                f"model folder {folder.path}: {' or '.join(binding.hf_names)} contains {NOT_FINITE} as "
                f"{str(shard.dtype).removeprefix('torch.')}. Repair the weights, or give another folder."
            )
        param.copy_(shard)
        taken.update(binding.hf_names)
    if pp_group is not None:
        stages: list[tuple[set[str], str]] = [(set(), "")] * pp_group.size()
        dist.all_gather_object(stages, (taken, fault), group=pp_group)
        taken = set().union(*(names for names, _ in stages))
        fault = next((found for _, found in stages if found), "")
    if fault:
        raise WeightsError(fault)
    ep_rank, ep_size = (0, 1) if experts is None else experts[:2]
    num_local = folder.shape.num_experts // ep_size
    left = [
        name
        for parameter in folder.table.stored_parameters()
        if not parameter.binding.entry.is_expert or parameter.binding.expert // num_local == ep_rank
        for name in parameter.binding.hf_names
        if name not in taken
    ]
    if left:
        raise ModelFolderError(
            f"model folder {folder.path}: {counted(len(left), 'tensor')} without a parameter in the model, the first is "
            f"{left[0]}; "
            "the model was not built with the arguments that its config.json implies"
        )


def read_shard(folder: HfFolder, binding: Binding, layout: ShardLayout) -> Tensor:
    """Reads one parameter's shard in the stored type onto the CPU."""
    if len(layout.pieces) == 1 and len(binding.hf_names) == 1:
        (piece,) = layout.pieces
        if piece.stop - piece.start == layout.length:
            return folder.read(binding.hf_names[0], layout.dim, piece.start, piece.stop)
    dtype = reduce(torch.promote_types, (folder.tensors[name].dtype for name in binding.hf_names))
    shard = torch.zeros(binding.shard_shape(layout), dtype=dtype)
    position = 0
    for tensor, start, stop in layout.pieces:
        target = shard.narrow(layout.dim, position, stop - start)
        target.copy_(folder.read(binding.hf_names[tensor], layout.dim, start, stop))
        position += stop - start
    return shard
