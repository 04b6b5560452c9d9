"""The trainer's weights in the names and layouts of a Hugging Face folder: loaded, exported, and sent to rollout servers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_rasft.config import SyncConfig
from megatron_rasft.errors import FailedElsewhere, WeightsError
from megatron_rasft.ranks import gather_to_all
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync import WeightSync
from megatron_rasft.weights.exporting import export_tensors
from megatron_rasft.weights.folder import HfFolder, ModelFolder
from megatron_rasft.weights.gathering import ExpertGroups, TensorPlan, gather_tensors, plan_tensors
from megatron_rasft.weights.loading import load_into


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
        """Yields (name, tensor) on the sender and (name, None) on the other ranks; see ``weights.gather_tensors``."""


class TableTensors:
    """The tensors of a family with a table.

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


class HfWeights:
    """The weights of this rank's model chunks under the names of a Hugging Face folder. Every method is a collective of the world.

    Args:
        tensors: the chunks' tensors.
        folder: describes the model.
    """

    def __init__(self, tensors: ModelTensors, folder: ModelFolder) -> None:
        self._tensors = tensors
        self._folder = folder

    def load(self) -> None:
        """Copies the folder's weights into the model; see ``ModelTensors.load``."""
        self._tensors.load()

    def export(self, path: str, dtype: torch.dtype, facts: dict[str, str] | None = None) -> None:
        """Writes the model as a Hugging Face folder.

        Args:
            path: must not exist, or be an empty folder.
            dtype: data type of the written tensors.
            facts: rows of the model card that describe the run; None writes no card.
        """
        export_tensors(
            self._tensors.plan,
            self._tensors.gather,
            self._folder,
            path,
            stage=self._tensors.stage,
            takes_part=self._tensors.takes_part,
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
        return WeightSync(
            config,
            plan=self._tensors.plan,
            gather=self._tensors.gather,
            records=records,
            model_config=self._folder.config,
            device=device,
            stage=self._tensors.stage,
            num_stages=self._tensors.num_stages,
            takes_part=self._tensors.takes_part,
            export=export,
        )
