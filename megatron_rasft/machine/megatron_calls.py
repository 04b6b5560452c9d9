"""Context managers around calls of Megatron: its output, its arguments and its overlapped gathering of parameters."""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.training import training

VERBOSE = "MEGATRON_RASFT_VERBOSE"
"""Environment variable: if set, everything that Megatron prints is shown."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides Megatron's output, which fills a page at start-up alone. A run writes its resolved configuration to a file instead."""
    if os.environ.get(VERBOSE):
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def overridden(args: Any, **values: Any) -> Iterator[None]:
    """Sets Megatron's arguments, or fields of a config, during a call: many functions read them instead of taking parameters."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


@contextlib.contextmanager
def parameters_gathered(
    args: argparse.Namespace, model: Sequence[torch.nn.Module], *, are_stale: bool
) -> Iterator[None]:
    """Gathers all parameters on every rank and keeps Megatron's forward hooks from gathering while the context is open.

    With --overlap-param-gather a forward pass gathers the parameters it needs, a collective of the data-parallel ranks. Sampling
    replicas run different numbers of passes, and a replica without requests runs none. Other ranks would then wait for it forever.

    Args:
        args: Megatron's arguments.
        model: this rank's chunks, wrapped by Megatron.
        are_stale: whether a step has changed the parameters; before the first step every rank has all of them.
    """
    is_overlapped = args.use_distributed_optimizer and args.overlap_param_gather
    # An outer context may have removed the hooks already, as in the export of a disk sync. Megatron-FSDP has its own hooks.
    if not is_overlapped or not getattr(model[0], "remove_forward_pre_hook_handles", None):
        yield
        return
    training.disable_forward_pre_hook(model, param_sync=are_stale)
    try:
        yield
    finally:
        training.enable_forward_pre_hook(model)
