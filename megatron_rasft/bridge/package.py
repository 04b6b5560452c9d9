"""Imports Megatron-Bridge, which is an optional package with an environment of its own."""

import importlib
import logging
from typing import Any

INSTALL = "make bridge (docs/extending.md#megatron-bridge)"
"""The command that makes the environment."""


def import_auto_bridge(flag: str, *modules: str) -> Any:
    """Imports Megatron-Bridge's AutoBridge.

    Args:
        flag: the flag that needs it, with its value; for the message.
        modules: further modules that are needed later. AutoBridge imports some only when it uses them, and hides an ImportError.

    Raises:
        ValueError: Megatron-Bridge or a package that it needs is missing.
    """
    logging.getLogger("megatron.bridge").setLevel(logging.ERROR)  # it logs its choices at every import
    try:
        for module in modules:
            importlib.import_module(module)
        return importlib.import_module("megatron.bridge").AutoBridge
    except ImportError as error:
        raise ValueError(
            f"{flag} needs NVIDIA's Megatron-Bridge, which cannot be imported ({error}). It needs Transformer Engine and an "
            f"environment of its own: {INSTALL}."
        ) from error
