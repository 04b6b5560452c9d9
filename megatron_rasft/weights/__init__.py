"""Hugging Face folders <-> Megatron models: one table per family, both directions, streamed."""

from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.exporting import export
from megatron_rasft.weights.families import FAMILIES
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
