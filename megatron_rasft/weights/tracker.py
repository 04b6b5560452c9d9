"""Finds the newest checkpoint in a folder of Megatron checkpoints.

Megatron names it in a tracker file: a step, or "release" for weights without a training state (read_metadata in
megatron/training/checkpointing.py).
"""

from pathlib import Path

from megatron_rasft.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"

RELEASE = "release"
"""Subfolder of converted weights, and the tracker file's text for them."""


def has_checkpoint(folder: Path | str | None) -> bool:
    """Returns whether a folder holds a complete checkpoint: Megatron writes the tracker file last."""
    return folder is not None and Path(folder, TRACKER_FILE).is_file()


def is_converted(folder: Path | str) -> bool:
    """Returns whether a folder holds converted weights instead of a run's checkpoints."""
    return has_checkpoint(folder) and newest_step(folder) is None


def newest_step(folder: Path | str) -> int | None:
    """Returns the step of the newest checkpoint in a folder that has one; None for converted weights.

    Raises:
        CheckpointError: the tracker file holds neither a step nor "release".
    """
    tracker = Path(folder, TRACKER_FILE)
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return None
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker} holds {text!r} instead of a step. Write into it the number of one of the iter_ folders beside it."
        )
    return int(text)


def step_folder(folder: Path | str, step: int | None) -> Path:
    """Returns the folder of the checkpoint of a step, or for None that of the converted weights."""
    return Path(folder, RELEASE if step is None else f"iter_{step:07d}")
