"""The tensors of a family with a table, in the names and layouts of a Hugging Face folder."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_rasft.errors import FailedElsewhere, WeightsError
from megatron_rasft.ranks import gather_to_all
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import ExpertGroups, TensorPlan, gather_tensors, plan_tensors
from megatron_rasft.weights.loading import load_into


class TableTensors:
    """``ModelTensors`` of a family with a table.

    Args:
        model: this rank's chunks, wrapped or not.
        folder: describes the model.
    """

    def __init__(self, model: Sequence[torch.nn.Module], folder: HfFolder) -> None:
        self._model = model
        self._folder = folder
        self._experts = ExpertGroups(
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank() == 0,
        )
        # Context-parallel ranks hold the same weights as data-parallel ones, so they count as replicas here.
        self._is_first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        self._layer_offsets = [
            get_transformer_layer_offset(chunk.config, vp_stage=getattr(chunk, "vp_stage", None))
            for chunk in unwrap_model(model)
        ]
        self._bound: dict[str, Any] = {
            "layer_offsets": self._layer_offsets,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "experts": self._experts,
        }
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.num_stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.takes_part = self._is_first_replica or self._experts.is_first_replica

    def load(self) -> None:
        """Copies the folder's weights into the model; see ``ModelTensors.load``."""
        fault = ""
        try:
            load_into(
                self._model,
                self._folder,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                tp_size=parallel_state.get_tensor_model_parallel_world_size(),
                layer_offsets=self._layer_offsets,
                pp_group=parallel_state.get_pipeline_model_parallel_group(),
                experts=self._experts.ranks,
            )
        except WeightsError as error:
            fault = str(error)
        # only the ranks that hold the tensor have found the fault
        if fault := next((found for found in gather_to_all(fault) if found), ""):
            raise WeightsError(fault) if dist.get_rank() == 0 else FailedElsewhere(fault)

    def plan(self, *, dtypes: dict[str, torch.dtype] | None = None) -> Sequence[TensorPlan]:
        return plan_tensors(self._model, self._folder.table, dtypes=dtypes, **self._bound)

    def gather(
        self,
        *,
        dtypes: dict[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
        out: Callable[[str], Tensor | None] | None = None,
    ) -> Iterator[tuple[str, Tensor | None]]:
        return gather_tensors(
            self._model,
            self._folder.table,
            dtypes=dtypes,
            device=device,
            out=out,
            is_first_replica=self._is_first_replica,
            **self._bound,
        )
