"""Scales of FP8's delayed recipe, set before the first log-probabilities are calculated.

The recipe scales a tensor by the largest value that it had in earlier passes. Transformer Engine starts every scale at 1 and updates
scales only in passes with gradients (FP8GlobalStateManager.autocast_exit in transformer_engine/pytorch/quantization.py), while the
first passes of a run here are scoring passes without. Their log-probabilities become the reference's for the whole run.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator

NUM_PASSES = 2
"""The first pass measures inputs that were themselves rounded at a scale of 1. The second pass measures them at real scales."""


UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Environment variable without which Transformer Engine refuses the scales in a checkpoint: it writes them as a pickle."""


def has_delayed_scales(args: argparse.Namespace) -> bool:
    """Returns whether tensors are scaled by the largest values of earlier passes."""
    return args.fp8 is not None and str(args.fp8_recipe) == "delayed"


def set_delayed_scales(forward: Callable[[], object]) -> None:
    """Sets all scales from forward passes over the same micro-batches.

    Runs one all-reduce of the maxima over the ranks that share a layer's scales, after each pass.

    Args:
        forward: runs the forward passes, without gradients; called on every rank.
    """
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    for _ in range(NUM_PASSES):
        forward()
        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


@contextlib.contextmanager
def own_scales_loaded(args: argparse.Namespace) -> Iterator[None]:
    """Lets Transformer Engine read the scales from a run's own checkpoint, so that the same command goes on with the run.

    A checkpoint from elsewhere is left to the user, who sets the variable: a pickle can run any code.
    """
    if not has_delayed_scales(args) or args.load != args.save or UNPICKLE in os.environ:
        yield
        return
    os.environ[UNPICKLE] = "1"
    try:
        yield
    finally:
        del os.environ[UNPICKLE]
