"""Hugging Face folders <-> Megatron models: one table per family, both directions, streamed.

Names whose modules import torch are imported on first use, so that capacity planning can import ``architecture`` and
``families`` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.families import FAMILIES

if TYPE_CHECKING:
    from megatron_rasft.weights.exporting import export
    from megatron_rasft.weights.folder import HfFolder
    from megatron_rasft.weights.gathering import ExpertGroups, gather_tensors, plan_tensors
    from megatron_rasft.weights.loading import ExpertRanks, load_into

__all__ = [
    "FAMILIES",
    "ExpertGroups",
    "ExpertRanks",
    "HfFolder",
    "export",
    "gather_tensors",
    "load_into",
    "megatron_args",
    "plan_tensors",
]

_HOMES = {
    "ExpertGroups": "gathering",
    "ExpertRanks": "loading",
    "HfFolder": "folder",
    "export": "exporting",
    "gather_tensors": "gathering",
    "load_into": "loading",
    "plan_tensors": "gathering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
