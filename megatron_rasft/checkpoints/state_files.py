"""The files that a run adds to Megatron's checkpoints, the check of a checkpoint's model, and the errors of saving and loading."""

import argparse
import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.data.sample_arrays import Array
from megatron_rasft.errors import CheckpointError, FailedElsewhere, first_line
from megatron_rasft.files import write_bytes, write_json
from megatron_rasft.model.fp8_scales import UNPICKLE
from megatron_rasft.weights.tracker import TRACKER_FILE

STATE_FILE = "rasft_state.json"
"""File beside Megatron's own in a checkpoint: the positions of the data, the curriculum and the rollout store."""

QUEUE_FILE = "rasft_queue.safetensors"
"""File of the samples that are not trained on yet. ``STATE_FILE`` beside it holds its SHA-256."""

LOAD_FAILURES = (
    CheckpointException,
    dist_checkpointing.core.CheckpointingException,
    NotImplementedError,
    OSError,
    json.JSONDecodeError,
)
"""The errors that loading a damaged or incomplete checkpoint raises."""

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe")
"""Parts of the texts of gloo's errors about a connection to a rank that has ended."""

_ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "untie_embeddings_and_output_weights",
)


def architecture_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that identify a checkpoint's architecture."""
    return {name: getattr(args, name) for name in _ARCHITECTURE}


def refuse_other_model(checkpoint: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint was saved with another architecture than that of this run."""
    differing = [f"{k} {saved.get(k)} != {v}" for k, v in expected.items() if saved.get(k) != v]
    if differing:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another model ({', '.join(differing)}). Give the --hf-model it was "
            "made from, or another --save folder."
        )


def read_state(resume: Resume, architecture: dict[str, Any]) -> dict[str, Any]:
    """Reads the state that a run saved with a checkpoint.

    Args:
        resume: names the checkpoint.
        architecture: this run's architecture. Without this check Megatron would fail later, at the shape of a tensor.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another model, or was not written by this program.
    """
    folder = _checkpoint(resume)
    if not folder.is_dir():
        named_by = "--ckpt-step" if resume.is_chosen else folder.parent / TRACKER_FILE
        raise CheckpointError(f"checkpoint {folder}, which {named_by} names, is missing. {_earlier(folder)}")
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {folder} has no {STATE_FILE}: it was not written by this program. Use "
            "--hf-model with an exported folder to start from those weights."
        )
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}). {_earlier(folder)}") from error
    refuse_other_model(folder, state.get("architecture", {}), architecture)
    return state


def write_state(folder: Path, state: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Writes a run's state into a checkpoint's folder.

    The arrays are written as raw memory, because JSON takes 20 times as long. The state holds the SHA-256 of the arrays' file,
    so it is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.numpy.save(arrays)
    write_bytes(folder / QUEUE_FILE, content, is_synced=True)
    state = {**state, "queue_sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / STATE_FILE, state, indent=None, is_synced=True)


def read_arrays(folder: Path, state: dict[str, Any]) -> dict[str, Array]:
    """Reads the arrays that were written with a state.

    Raises:
        CheckpointError: their file is missing, or its SHA-256 is not that in the state.
    """
    path = folder / QUEUE_FILE
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != state.get("queue_sha256"):
            raise ValueError(f"the SHA-256 of its {len(content)} bytes is not that in {STATE_FILE}")
        arrays: dict[str, Array] = safetensors.numpy.load(content)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}). {_earlier(folder)}") from error
    return arrays


def _checkpoint(resume: Resume) -> Path:
    assert resume.checkpoint is not None, "a run without a checkpoint must not load its arrays"
    return resume.checkpoint


def _earlier(folder: Path) -> str:
    """Returns the last sentence of an error about an unusable checkpoint, which lists the earlier usable ones."""
    # Megatron writes metadata.json when a checkpoint is complete. A save that was killed leaves only the state file.
    others = sorted(
        path.parent
        for path in folder.parent.glob(f"iter_*/{STATE_FILE}")
        if (path.parent / "metadata.json").is_file()
    )
    # Folder names have leading zeros, so they compare like the steps.
    steps = [int(path.name.removeprefix("iter_")) for path in others if path < folder]
    if not steps:
        return "There is no earlier one: start anew with another --save folder."
    return (
        f"Resume from an earlier one, of step {', '.join(map(str, steps))}: give it as --ckpt-step, or write it into "
        f"{folder.parent / TRACKER_FILE}."
    )


def incomplete(what: str, error: BaseException) -> CheckpointError:
    """Returns the error of a save during which another rank ended.

    Args:
        what: name of the saved object, with which the message begins.
        error: what a collective raised on this rank.
    """
    return CheckpointError(
        f"{what} is incomplete, because another rank ended during the save ({first_line(error)}). Its log says why. Earlier "
        "checkpoints are unchanged: start again to resume from the last one."
    )


@contextlib.contextmanager
def save_explained(what: str, folder: Path) -> Iterator[None]:
    """Raises one CheckpointError in place of any error of a save.

    Args:
        what: name of the saved object, with which the message begins.
        folder: the folder to write, which need not exist yet.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if is_lost_peer(error):
            raise incomplete(what, error) from error
        reason = checkpoint_failure(error).rstrip(".")
        # An error of a background writer holds only the original error's class; torch prints the rest.
        if "<class " in reason:
            reason += ", which is printed above"
        raise CheckpointError(
            f"{what} could not be written to {folder}: {reason}; {_free_gib(folder):.1f} GiB are free there. "
            "Earlier checkpoints are unchanged. Free some disk space or change --save, then start again to resume from the last one."
        ) from error


@contextlib.contextmanager
def load_explained(resume: Resume) -> Iterator[None]:
    """Raises one CheckpointError in place of any error that Megatron raises while it loads a run's checkpoint."""
    folder = _checkpoint(resume)
    try:
        yield
    except AssertionError as error:
        # check_resume has compared the flags, except for other formats than torch_dist
        raise CheckpointError(
            f"the checkpoint in {folder.parent} was trained with another schedule or length. Give the --lr, --lr-* and --train-iters "
            "that it was trained with, or add --override-opt_param-scheduler to go on with the new ones."
        ) from error
    except LOAD_FAILURES as error:
        raise CheckpointError(
            f"checkpoint {folder} cannot be loaded: {checkpoint_failure(error).rstrip('.')}. It is damaged, or was "
            f"written with other flags. {_earlier(folder)}"
        ) from error
    except RuntimeError as error:  # after LOAD_FAILURES, because one of those is a subclass of RuntimeError
        if UNPICKLE not in str(error):
            raise
        raise refused_scales(resume) from error


def refused_scales(resume: Resume) -> CheckpointError:
    """Returns the error of a checkpoint whose FP8 scales are a pickle that the run has not written itself."""
    return CheckpointError(
        f"checkpoint {resume.checkpoint} has the scales of --fp8-recipe delayed, which Transformer Engine saves as a pickle, and a "
        f"pickle can run any code. If you trust its source, set {UNPICKLE}=1 in the environment. Otherwise start from "
        "exported weights (--hf-model)."
    )


def expired(save: Path, newest: int, keep: int, interval: int | None) -> list[Path]:
    """Returns the checkpoints to delete, oldest first.

    Args:
        save: the folder of the checkpoints.
        newest: step of the newest complete checkpoint. Later folders belong to a branch that --ckpt-step left; they stay.
        keep: number of complete checkpoints to keep, with the newest one.
        interval: checkpoints of its multiples are kept too; None: none.

    Returns:
        Folders of earlier steps. Incomplete folders, which killed saves have left, are among them.
    """
    steps = {
        int(path.name.removeprefix("iter_")): path
        for path in save.glob("iter_*")
        if path.name.removeprefix("iter_").isdecimal() and path.is_dir() and not path.is_symlink()
    }
    # Megatron writes metadata.json when a checkpoint is complete.
    complete = sorted(s for s, path in steps.items() if s <= newest and (path / "metadata.json").is_file())
    kept = {newest, *complete[-keep:], *(s for s in complete if interval and s % interval == 0)}
    return [steps[step] for step in sorted(steps) if step < newest and step not in kept]


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether an error of a collective, or of the ranks' store, says that another rank is gone.

    gloo raises a plain RuntimeError, so its text decides. With NCCL and the store torch has classes of its own.
    """
    if isinstance(error, CheckpointException):
        return any(is_lost_peer(cause) for cause, _ in error.failures.values())
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)
    )


def checkpoint_failure(error: BaseException) -> str:
    """Returns why a save or load failed: the reason of the first rank that failed, if torch passes it on.

    Raises:
        FailedElsewhere: torch passes the other ranks' reasons to rank 0 only, and this is another rank.
    """
    if isinstance(error, CheckpointException):
        if error.failures:
            rank, (cause, _) = min(error.failures.items())
            return f"rank {rank}: {first_line(cause)}"
        if dist.get_rank() != 0:
            raise FailedElsewhere from error
    return first_line(error)


def _free_gib(folder: Path) -> float:
    """Returns the free space of a folder's file system. The folder need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free / 2**30
