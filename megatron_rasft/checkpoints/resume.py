"""Decides where a run resumes from: from --save if it holds a checkpoint, else from --load, else from the weights of --hf-model."""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rasft.errors import CheckpointError
from megatron_rasft.weights.tracker import (
    TRACKER_FILE,
    has_checkpoint,
    is_converted,
    newest_step,
    step_folder,
)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where a run resumes from. It is decided once, before anything is built; nothing writes --load or --ckpt-step later."""

    folder: Path | None = None
    """The folder with the checkpoint that the run loads; None for a run that begins at step 0."""
    step: int = 0
    """The step of the checkpoint; 0 without a checkpoint."""
    is_own: bool = False
    """Whether ``folder`` is the run's own --save rather than another run's folder given as --load."""
    is_chosen: bool = False
    """Whether the step comes from --ckpt-step instead of the folder's tracker file."""
    converted: Path | None = None
    """Converted weights given as --load. The run begins with them instead of those of --hf-model, and they stay the frozen
    reference when the run resumes from its own checkpoint."""

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint itself; None without a checkpoint."""
        return None if self.folder is None else step_folder(self.folder, self.step)

    @classmethod
    def at(cls, folder: Path | str, ckpt_step: int | None, *, is_own: bool = False) -> "Resume":
        """Chooses a checkpoint from a folder of a run's checkpoints: the step of --ckpt-step, or the newest.

        Raises:
            CheckpointError: the tracker file is damaged, or the folder holds converted weights.
        """
        folder = Path(folder)
        newest = newest_step(folder)
        if newest is None:
            raise CheckpointError(
                f"{folder} holds converted weights, not a run's checkpoints. Give it to a run as --load, and another folder as "
                "--save."
            )
        return cls(folder=folder, step=ckpt_step or newest, is_own=is_own, is_chosen=bool(ckpt_step))


def find_resume(args: argparse.Namespace) -> Resume:
    """Decides where the run of a command line resumes from; reads tracker files only.

    Args:
        args: Megatron's arguments. Reads --load, --save, --ckpt-step and --exit-on-missing-checkpoint.

    Raises:
        ValueError: --load holds no checkpoint, or --exit-on-missing-checkpoint was given and there is none.
        CheckpointError: a tracker file is damaged, or --save holds converted weights.
    """
    load, step = args.load, args.ckpt_step
    if load is not None and not has_checkpoint(load):
        raise ValueError(
            f"--load {load} holds no checkpoint: it has no {TRACKER_FILE}. Give the folder that was a run's --save or that "
            "tools/convert_checkpoint.py wrote (a step in it as --ckpt-step), or leave the flag out to start from --hf-model."
        )
    converted = step_folder(load, None) if load is not None and is_converted(load) else None
    other = load if converted is None else None
    if has_checkpoint(args.save):
        if other is not None and not os.path.samefile(other, args.save):
            Resume.at(other, step)  # reports a damaged tracker file, although nothing is loaded from it
            step = None  # --ckpt-step names a step in --load, not in --save
        return replace(Resume.at(args.save, step, is_own=True), converted=converted)
    if other is not None:
        return Resume.at(other, step)
    if converted is None and args.exit_on_missing_checkpoint:
        raise ValueError(
            f"--exit-on-missing-checkpoint: --save {args.save} holds no checkpoint to resume from. Leave the flag out to "
            "start from --hf-model."
        )
    return Resume(converted=converted)
