"""Whether Transformer Engine, whose kernels a GPU trains with, can be used on this machine."""

import importlib
import importlib.util
import sys
from importlib import metadata
from typing import Any

import torch

from megatron_rasft.errors import RasftError, first_line

_INSTALL = "pip install --no-build-isolation 'megatron-rasft[te]'"
"""Without the flag pip would compile it against the newest torch instead of the installed one."""


def check_transformer_engine() -> None:
    """Import Transformer Engine where there is a GPU; call before Megatron is imported.

    Megatron imports it too, and lets every error through but that of a package that is missing.

    Raises:
        RasftError: it is installed and does not import; the message names the way out.
    """
    if not torch.cuda.is_available():
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # its checks of versions and libraries raise errors of many kinds
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("transformer_engine"):
            return
        raise RasftError(
            f"Transformer Engine {_version()} does not import with torch {torch.__version__}: {first_line(error)}. It must be built for "
            f"this torch. Build it again: {_INSTALL}, or uninstall transformer_engine to train with plain torch layers."
        ) from error


def report_missing_transformer_engine(args: Any) -> None:
    """Say on rank 0 of a run on GPUs that its layers are the plain ones, which are slower; for after Megatron's start."""
    is_missing = importlib.util.find_spec("transformer_engine") is None
    if args.rank == 0 and args.distributed_backend == "nccl" and is_missing:
        print(
            "Transformer Engine is not installed: layers run in plain torch, which is slower and needs more memory. Install it: "
            f"{_INSTALL}",
            file=sys.stderr,
            flush=True,
        )


def _version() -> str:
    """The installed version, if its metadata is there."""
    try:
        return metadata.version("transformer_engine")
    except metadata.PackageNotFoundError:
        return "(version unknown)"
