"""The trainer's weights in the names and layouts of a Hugging Face folder: loaded, exported, and sent to rollout servers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model

from megatron_rasft.config import SyncConfig
from megatron_rasft.errors import FailedElsewhere, WeightsError
from megatron_rasft.ranks import gather_to_all
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync import WeightSync
from megatron_rasft.weights.exporting import export
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import ExpertGroups, gather_tensors, plan_tensors
from megatron_rasft.weights.loading import load_into


class HfWeights:
    """The weights of this rank's model chunks under the names of a Hugging Face folder. Every method is a collective of the world.

    Args:
        model: this rank's chunks, wrapped or not.
        folder: describes the model.
    """

    def __init__(self, model: Sequence[torch.nn.Module], folder: HfFolder) -> None:
        self._model = model
        self._folder = folder
        self._layer_offsets = [
            get_transformer_layer_offset(chunk.config, vp_stage=getattr(chunk, "vp_stage", None))
            for chunk in unwrap_model(model)
        ]
        self._experts = ExpertGroups(
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank() == 0,
        )
        # Context-parallel ranks hold the same weights as data-parallel ones, so they count as replicas here.
        self._is_first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    def load(self) -> None:
        """Copies the folder's weights into the model.

        Raises:
            WeightsError: a tensor has NaN or infinity. Ranks other than 0 raise FailedElsewhere.
        """
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

    def export(self, path: str, dtype: torch.dtype, facts: dict[str, str] | None = None) -> None:
        """Writes the model as a Hugging Face folder.

        Args:
            path: must not exist, or be an empty folder.
            dtype: data type of the written tensors.
            facts: rows of the model card that describe the run; None writes no card.
        """
        export(
            self._model,
            self._folder,
            path,
            layer_offsets=self._layer_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            is_first_replica=self._is_first_replica,
            experts=self._experts,
            dtype=dtype,
            facts=facts,
        )

    def sync(
        self,
        config: SyncConfig,
        records: ServerRecords,
        device: torch.device,
        export: Callable[[str], None],
    ) -> WeightSync:
        """Returns the object that sends these weights to rollout servers.

        Args:
            config: settings of the sync.
            records: the rollout servers that this process knows.
            device: the model's device.
            export: writes the weights to a folder, for --sync-method disk.
        """
        bound: dict[str, Any] = {
            "layer_offsets": self._layer_offsets,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "experts": self._experts,
        }
        table, is_first = self._folder.table, self._is_first_replica
        return WeightSync(
            config,
            plan=partial(plan_tensors, self._model, table, **bound),
            gather=partial(gather_tensors, self._model, table, is_first_replica=is_first, **bound),
            records=records,
            model_config=self._folder.config,
            device=device,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            num_stages=parallel_state.get_pipeline_model_parallel_world_size(),
            takes_part=is_first or self._experts.is_first_replica,
            export=export,
        )
