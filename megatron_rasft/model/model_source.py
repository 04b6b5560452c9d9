"""Chooses who builds, loads and names the model: our own tables, or Megatron-Bridge (--model-source)."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_rasft.bridge import building
from megatron_rasft.bridge.folder import FLAG, BridgedFolder
from megatron_rasft.bridge.tensors import BridgedTensors
from megatron_rasft.config import RasftConfig
from megatron_rasft.model.layout_checks import check_served, refuse_own_sampling
from megatron_rasft.model.model_chunks import build_chunk, run_config
from megatron_rasft.model.table_tensors import TableTensors
from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.folder import HfFolder, ModelFolder
from megatron_rasft.weights.gathering import ModelTensors

_OWN_SAMPLING = "the trainer's own sampling knows only the attention of the families with a table"


def open_folder(args: argparse.Namespace, config: RasftConfig, *, only_samples: bool = False) -> ModelFolder:
    """Opens --hf-model by the source that --model-source names.

    Args:
        only_samples: whether this program samples from the model and does not train it.

    Raises:
        ValueError: a flag cannot be combined with --model-source bridge, or Megatron-Bridge is missing.
        ModelFolderError: the folder cannot be used.
    """
    if config.run.model_source == "tables":
        described = HfFolder.open(args.hf_model)
        check_served(described.family, described.rope, config)
        return described
    _refuse_flags(args, config, only_samples)
    folder = BridgedFolder.open(args.hf_model)
    building.refuse_flags(args, folder)
    _refuse_servers(folder, config)
    return folder


def architecture_args(folder: ModelFolder, query_groups: int | None) -> dict[str, Any]:
    """Returns the values of Megatron's arguments for the folder's model."""
    if isinstance(folder, BridgedFolder):
        return folder.megatron_args()
    assert isinstance(folder, HfFolder)
    return megatron_args(folder, query_groups)


def chunk_builder(args: Any, folder: ModelFolder) -> Callable[..., Any]:
    """Returns the function that builds one chunk of the model, as Megatron's set-up functions call it."""
    if isinstance(folder, BridgedFolder):
        return partial(_build_bridged_chunk, args, folder)
    return partial(build_chunk, args)


def _build_bridged_chunk(
    args: Any,
    folder: BridgedFolder,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **_: Any,
) -> Any:
    return building.build_chunk(
        folder,
        run_config(args),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        is_packed=args.rasft_batch_layout == "packed",
    )


def model_tensors(model: Sequence[torch.nn.Module], folder: ModelFolder) -> ModelTensors:
    """Returns the tensors of this rank's chunks, wrapped or not, under the names of the folder."""
    if isinstance(folder, BridgedFolder):
        return BridgedTensors(unwrap_model(model), folder)
    assert isinstance(folder, HfFolder)
    return TableTensors(model, folder)


def _refuse_servers(folder: BridgedFolder, config: RasftConfig) -> None:
    """Refuses weight sync for latent attention, as ``check_served`` does for our tables."""
    if config.samples_from_servers and getattr(folder.provider, "multi_latent_attention", False):
        raise ValueError(
            f"--rollout-engine sglang is not supported for {folder.architecture}: the weights of its latent attention cannot be sent to "
            "servers yet. Use --rollout-engine replay, or an --objective without rollouts."
        )


def _refuse_flags(args: argparse.Namespace, config: RasftConfig, only_samples: bool) -> None:
    """Refuses flags whose code knows only the models of our tables."""
    if only_samples:
        raise ValueError(
            f"{FLAG} cannot be evaluated without --server: {_OWN_SAMPLING}. Evaluate exported folders on servers (--server URL)."
        )
    refuse_own_sampling(config, FLAG, _OWN_SAMPLING)
    for name in ("rasft_query_groups", "use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name, None):
            flag = args.given_flags.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"{flag} cannot be combined with {FLAG}. Leave one of the two out.")
