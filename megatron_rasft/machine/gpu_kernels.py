"""Checks that Transformer Engine, which provides the GPU kernels for training, can be used on this machine."""

import importlib
import importlib.util
import sys
from importlib import metadata
from typing import Any

import torch

from megatron_rasft.errors import RasftError, first_line

_INSTALL = "pip install --no-build-isolation 'megatron-rasft[te]'"
"""Installs Transformer Engine. Without --no-build-isolation pip would compile it for the newest torch, not the installed one."""


def check_transformer_engine() -> None:
    """Imports Transformer Engine on machines with a GPU. Call this before importing Megatron.

    Megatron imports it too, but handles only the error of a missing package. All other errors would end the run with a
    traceback.

    Raises:
        RasftError: Transformer Engine is installed but cannot be imported.
    """
    if not torch.cuda.is_available():
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    # Transformer Engine's checks of versions and libraries raise many types of errors
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("transformer_engine"):
            return
        raise RasftError(
            f"Transformer Engine {_version()} cannot be imported with torch {torch.__version__}: {first_line(error)}. It must "
            f"be built for the installed torch. Rebuild it with {_INSTALL}, or uninstall transformer_engine to train with "
            "plain torch layers."
        ) from error


def report_missing_transformer_engine(args: Any) -> None:
    """Warns on rank 0 if a run on GPUs uses plain torch layers because Transformer Engine is not installed.

    Args:
        args: Megatron's arguments after its initialisation, which sets the rank.
    """
    is_missing = importlib.util.find_spec("transformer_engine") is None
    if args.rank == 0 and args.distributed_backend == "nccl" and is_missing:
        print(
            "Transformer Engine is not installed. Layers run in plain torch, which is slower and needs more memory. Install it "
            f"with {_INSTALL}",
            file=sys.stderr,
            flush=True,
        )


def _version() -> str:
    """The installed version of Transformer Engine, for messages."""
    try:
        return metadata.version("transformer_engine")
    except metadata.PackageNotFoundError:
        return "(version unknown)"
