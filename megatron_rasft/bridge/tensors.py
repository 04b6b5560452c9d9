"""Loads and streams a model's weights by Megatron-Bridge, and checks at the start that what it streams is what the folder holds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.bridge.folder import BridgedFolder
from megatron_rasft.errors import FailedElsewhere, ModelFolderError, first_line
from megatron_rasft.ranks import gather_to_all
from megatron_rasft.weights.finite import NOT_FINITE, is_finite
from megatron_rasft.weights.gathering import TensorPlan

_TIED_OUTPUT = "lm_head.weight"


class BridgedTensors:
    """The tensors of this rank's model chunks under their Hugging Face names.

    Megatron-Bridge gathers every tensor on every rank, also across pipeline stages. The model is therefore one stage here, and rank 0
    is its sender.

    Args:
        chunks: the unwrapped chunks of this rank.
        folder: the model.
    """

    stage = 0
    num_stages = 1
    takes_part = True

    def __init__(self, chunks: Sequence[Any], folder: BridgedFolder) -> None:
        self._chunks = list(chunks)
        self._folder = folder
        self._plan: list[TensorPlan] = []

    def load(self) -> None:
        """Copies the folder's weights into the model, and streams them back once: every tensor must be bit-equal to the folder's.

        This finds weights that Megatron-Bridge leaves out or converts with a loss, before anything is trained, exported or sent. Rank
        0 reads the folder a second time for it.

        Raises:
            ModelFolderError: on rank 0; the other ranks raise FailedElsewhere.
        """
        fault = self._load() or self._unmapped()
        # Every rank has called the same collectives here, and decides alike.
        if not _first(fault):
            fault = self._read_back()
        if fault := _first(fault):
            message = f"model folder {self._folder.path}: {fault}"
            raise ModelFolderError(message) if dist.get_rank() == 0 else FailedElsewhere(message)

    def plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> Sequence[TensorPlan]:
        """Returns the tensors that ``gather`` yields, in its order, as ``load`` has found them."""
        return [plan._replace(dtype=(dtypes or {}).get(plan.name, plan.dtype)) for plan in self._plan]

    def gather(
        self,
        *,
        dtypes: dict[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
        out: Callable[[str], Tensor | None] | None = None,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yields (name, tensor) on rank 0 and (name, None) on the other ranks. A collective of the world.

        ``out`` is not used: Megatron-Bridge allocates its tensors itself.
        """
        is_sender = dist.get_rank() == 0
        for name, tensor in self._stream():
            wanted = (dtypes or {}).get(name, tensor.dtype)
            yield name, tensor.to(device=device or tensor.device, dtype=wanted) if is_sender else None

    @torch.no_grad()
    def _stream(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._folder.bridge.export_hf_weights(
            self._chunks, cpu=False, show_progress=False, merge_adapter_weights=False
        )

    def _load(self) -> str:
        try:
            with torch.no_grad():
                self._folder.bridge.load_hf_weights(self._chunks)
        except Exception as error:
            # Errors are of many kinds: a missing tensor, another shape, a file that cannot be read.
            return f"Megatron-Bridge cannot load the weights: {first_line(error)}"
        return ""

    def _unmapped(self) -> str:
        """Names a parameter that Megatron-Bridge has not loaded. It only warns about those, and they would stay random."""
        tasks = self._folder.bridge.get_conversion_tasks(self._chunks)
        loaded = {
            id(task.param_weight) for task in tasks if task is not None and task.param_weight is not None
        }
        for chunk in self._chunks:
            for name, parameter in chunk.named_parameters():
                is_copy = self._folder.shape.is_tied and name.startswith("output_layer.")
                if id(parameter) not in loaded and not is_copy:
                    return f"Megatron-Bridge has no weights for the parameter {name}"
        return ""

    def _read_back(self) -> str:
        """Streams all tensors, and keeps their order for ``plan``."""
        fault = ""
        params_dtype = next(self._chunks[0].parameters()).dtype
        for name, tensor in self._stream():
            if tensor.dtype != params_dtype:
                self._folder.buffers.add(name)
            self._plan.append(TensorPlan(name, tuple(tensor.shape), tensor.dtype))
            # The loop goes on after a fault, because other ranks wait in the same gathers.
            if dist.get_rank() == 0 and not fault:
                fault = self._difference(name, tensor.cpu())
        left_out = self._folder.tensors.keys() - {plan.name for plan in self._plan}
        if self._folder.shape.is_tied and _TIED_OUTPUT in left_out:
            left_out.remove(_TIED_OUTPUT)
            del self._folder.tensors[_TIED_OUTPUT]  # transformers takes the embedding
        if left_out and not fault:
            return f"Megatron-Bridge leaves out {len(left_out)} tensors, the first is {min(left_out)}"
        return fault

    def _difference(self, name: str, tensor: Tensor) -> str:
        stored = self._folder.tensors.get(name)
        if stored is None:
            return f"Megatron-Bridge writes a tensor {name}, which the folder does not have"
        if stored.shape != tuple(tensor.shape):
            return f"Megatron-Bridge gives {name} the shape {list(tensor.shape)}, the folder has {list(stored.shape)}"
        if not is_finite(tensor):
            return f"{name} contains {NOT_FINITE}. Repair the weights, or give another folder"
        if not torch.equal(self._folder.read(name).to(tensor.dtype), tensor):
            return f"Megatron-Bridge does not give back the stored values of {name}"
        return ""


def _first(fault: str) -> str:
    """The first fault of any rank, the same on every rank."""
    return next((found for found in gather_to_all(fault) if found), "")
