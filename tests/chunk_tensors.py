"""``ModelTensors`` of chunks in any process groups, for tests that build chunks without a ``Trainer``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rasft.weights import exporting
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import ExpertGroups, TensorPlan, gather_tensors, plan_tensors


@dataclass(kw_only=True)
class ChunkTensors:
    """The tensors of this rank's chunks, wrapped or not. By default the chunks are the complete model."""

    chunks: Sequence[torch.nn.Module]
    folder: HfFolder
    layer_offsets: Sequence[int]
    tp_group: ProcessGroup | None = None
    experts: ExpertGroups | None = None
    is_first_replica: bool = True
    stage: int = 0
    num_stages: int = 1

    @property
    def takes_part(self) -> bool:
        return self.is_first_replica or (self.experts is not None and self.experts.is_first_replica)

    def plan(self, **options: Any) -> list[TensorPlan]:
        return plan_tensors(self.chunks, self.folder.table, **self._bound(), **options)

    def gather(self, **options: Any) -> Iterator[tuple[str, Tensor | None]]:
        is_first = self.is_first_replica
        return gather_tensors(
            self.chunks, self.folder.table, is_first_replica=is_first, **self._bound(), **options
        )

    def _bound(self) -> dict[str, Any]:
        return {"layer_offsets": self.layer_offsets, "tp_group": self.tp_group, "experts": self.experts}


def export(
    chunks: Sequence[torch.nn.Module],
    folder: HfFolder,
    out: str | Path,
    *,
    layer_offsets: Sequence[int],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    **groups: Any,
) -> None:
    """Writes chunks as a Hugging Face folder; ``groups`` are fields of ``ChunkTensors``."""
    tensors = ChunkTensors(chunks=chunks, folder=folder, layer_offsets=layer_offsets, **groups)
    exporting.export(tensors, folder, out, dtype=dtype, max_shard_bytes=max_shard_bytes)  # type: ignore[arg-type]
