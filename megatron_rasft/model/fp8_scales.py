"""Scales of FP8's delayed recipe, set before the first log-probabilities are calculated.

The recipe scales a tensor by the largest value that it had in earlier passes. Transformer Engine starts every scale at 1 and
updates scales only in passes with gradients (FP8GlobalStateManager.autocast_exit in
transformer_engine/pytorch/quantization.py). Here the first passes of a run score samples without gradients, and their
log-probabilities become the reference's for the whole run.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

NUM_PASSES = 2
"""The first pass measures inputs that were themselves rounded at a scale of 1. The second pass measures them at real scales."""

UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Environment variable without which Transformer Engine refuses the scales in a checkpoint: it writes them as a pickle."""

_STATE_KEY = "has_fp8_scales"
"""Key of a run's saved state: whether the checkpoint has the scales."""


def has_delayed_scales(args: argparse.Namespace) -> bool:
    """Returns whether tensors are scaled by the largest values of earlier passes."""
    return args.fp8 is not None and str(args.fp8_recipe) == "delayed"


class DelayedScales:
    """Sets the scales once: before a run's first pass, from one global batch.

    Only the policy's scales are set. The reference takes the policy's place in the model for its own passes and is computed with
    the policy's scales.

    Args:
        is_used: whether the run uses the delayed recipe; otherwise there are no scales to set.
        forward: runs a forward pass over micro-batches without gradients.
    """

    def __init__(self, *, is_used: bool, forward: Callable[[list[Any]], object]) -> None:
        self._is_used = is_used
        self._forward = forward
        self.are_missing = is_used
        """Whether the scales have not been set from a complete global batch yet."""

    def set_from(self, batches: Callable[[], list[Any]], *, is_whole: bool = True) -> None:
        """Sets the scales if they are missing; a collective of the world.

        Args:
            batches: returns the micro-batches of a global batch; a collective of the world, called only if scales are missing.
            is_whole: False for a batch with fewer samples than a global batch, such as the four probes of the first sync. Their
                maxima are not reliable enough for the reference, so the next pass sets the scales again.
        """
        if not self.are_missing:
            return
        self.are_missing = not is_whole
        micro_batches = batches()
        set_delayed_scales(lambda: self._forward(micro_batches))

    def state_dict(self) -> dict[str, bool]:
        """Returns the scales' entry in a run's saved state."""
        return {_STATE_KEY: self._is_used and not self.are_missing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads from a saved state whether the loaded checkpoint has the scales.

        A run that switches to the delayed recipe resumes from a checkpoint without them, so it sets them anew.
        """
        self.are_missing = self._is_used and not state.get(_STATE_KEY, False)


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


def needs_unpickling(args: argparse.Namespace, state: dict[str, Any], *, is_own: bool) -> bool:
    """Returns whether Transformer Engine would refuse the scales of a checkpoint.

    Args:
        args: Megatron's.
        state: the run's part of the checkpoint.
        is_own: see ``own_scales_loaded``.
    """
    has_scales = has_delayed_scales(args) and state.get(_STATE_KEY, False)
    return has_scales and not is_own and UNPICKLE not in os.environ


@contextlib.contextmanager
def own_scales_loaded(args: argparse.Namespace, *, is_own: bool) -> Iterator[None]:
    """Allows Transformer Engine to unpickle the scales in a checkpoint that the run itself saved.

    Args:
        args: Megatron's.
        is_own: whether the checkpoint is in the run's own --save. For any other the user must set the variable: a pickle can run
            any code.
    """
    if not has_delayed_scales(args) or not is_own or UNPICKLE in os.environ:
        yield
        return
    os.environ[UNPICKLE] = "1"
    try:
        yield
    finally:
        del os.environ[UNPICKLE]
