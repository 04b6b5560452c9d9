"""What a run's checkpoints are, on the disk: which one is taken, whose model it is, and why one cannot be read or written."""

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

from megatron_rasft.errors import CheckpointError, FailedElsewhere, first_line
from megatron_rasft.files import write_bytes, write_json
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training.fp8_scales import UNPICKLE
from megatron_rasft.training.samples import Array
from megatron_rasft.weights.torch_dist import RELEASE, TRACKER_FILE

STATE_FILE = "rasft_state.json"
"""Beside Megatron's own files in a checkpoint: where the data, curriculum and rollout store stood."""

QUEUE_FILE = "rasft_queue.safetensors"
"""Beside ``STATE_FILE``, which has its SHA-256: the samples that were waiting to be trained."""

LOAD_FAILURES = (
    CheckpointException,
    dist_checkpointing.core.CheckpointingException,
    NotImplementedError,
    OSError,
    json.JSONDecodeError,
)
"""What a damaged or incomplete checkpoint raises when it is loaded."""


def check_same_model(args: Any, load: Path) -> None:
    """Refuse a checkpoint of another architecture before Megatron trips over a shape."""
    on_rank_zero(lambda: read_state(args, load))


def read_state(args: Any, load: Path) -> dict[str, Any] | None:
    """What the run that wrote a checkpoint left beside it; None if it was not one of ours.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model.
    """
    folder = chosen_folder(args, load)
    if not folder.is_dir():
        named_by = "--ckpt-step" if args.ckpt_step else load / TRACKER_FILE
        raise CheckpointError(f"checkpoint {folder}, which {named_by} names, is missing. {_earlier(folder)}")
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}). {_earlier(folder)}") from error
    refuse_other_model(str(folder), state.get("architecture", {}), architecture_of(args))
    return state


def write_state(folder: Path, state: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Write a run's state into a checkpoint's folder; arrays as they lie in memory, which JSON takes 20 times as long for.

    The state names the arrays' content, so it is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.numpy.save(arrays)
    write_bytes(folder / QUEUE_FILE, content, is_synced=True)
    state = {**state, "queue_sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / STATE_FILE, state, indent=None, is_synced=True)


def read_arrays(folder: Path, state: dict[str, Any]) -> dict[str, Array]:
    """The arrays that were written with a state.

    Raises:
        CheckpointError: their file is missing or is not the one that was written.
    """
    if "queue_sha256" not in state:
        raise CheckpointError(
            f"{folder} was written by an earlier version of this program, which kept the waiting samples elsewhere. Resume with "
            "that version, or start a new run from its weights (tools/convert_checkpoint.py megatron-to-hf)."
        )
    path = folder / QUEUE_FILE
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != state.get("queue_sha256"):
            raise ValueError(f"its {len(content)} bytes are not those that {STATE_FILE} names")
        arrays: dict[str, Array] = safetensors.numpy.load(content)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}). {_earlier(folder)}") from error
    return arrays


def chosen_folder(args: Any, load: Path) -> Path:
    """The checkpoint that Megatron takes from ``load``: that of --ckpt-step, or the newest."""
    text = _tracked(load)
    if text == RELEASE:
        raise CheckpointError(
            f"{load} holds converted weights, not a run's checkpoints. Give it to a run as --load, and another folder as "
            "--save."
        )
    if not text.isdecimal():
        raise CheckpointError(
            f"{load / TRACKER_FILE} says {text!r}, which is no step. Write the number of one of the iter_ folders beside it into it."
        )
    return load / f"iter_{args.ckpt_step or int(text):07d}"


def is_converted(load: str) -> bool:
    """Whether the folder holds weights without a training state."""
    return Path(load, TRACKER_FILE).is_file() and _tracked(Path(load)) == RELEASE


def _tracked(load: Path) -> str:
    """What the folder says is its newest checkpoint: a step, or converted weights."""
    return (load / TRACKER_FILE).read_text(encoding="utf-8", errors="replace").strip()


def _earlier(folder: Path) -> str:
    """The way out of a checkpoint that cannot be used."""
    # Megatron writes metadata.json when a checkpoint is complete; a killed save leaves the state file alone.
    others = sorted(
        path.parent
        for path in folder.parent.glob(f"iter_*/{STATE_FILE}")
        if (path.parent / "metadata.json").is_file()
    )
    steps = [int(path.name.removeprefix("iter_")) for path in others if path < folder]
    if not steps:
        return "There is no earlier one: start anew with another --save folder."
    return (
        f"Go on from an earlier one, of step {', '.join(map(str, steps))}: give it as --ckpt-step, or write it into "
        f"{folder.parent / TRACKER_FILE}."
    )


def architecture_of(args: Any) -> dict[str, Any]:
    """What two checkpoints must share to be of one model."""
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    )
    return {
        name: getattr(args, name) for name in (*names, "vocab_size", "untie_embeddings_and_output_weights")
    }


def refuse_other_model(checkpoint: str, made_for: dict[str, Any], mine: dict[str, Any]) -> None:
    differing = [f"{k} {made_for.get(k)} != {v}" for k, v in mine.items() if made_for.get(k) != v]
    if differing:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another model ({', '.join(differing)}). Give the --hf-model it was "
            "made from, or another --save folder."
        )


@contextlib.contextmanager
def save_explained(what: str, folder: Path) -> Iterator[None]:
    """Make one CheckpointError of what a save into this folder raises.

    Args:
        what: is saved, as the message begins.
        folder: need not be there yet.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = checkpoint_failure(error).rstrip(".")
        if "<class " in reason:  # all that a background writer hands over of what it met
            reason += ", which is printed above"
        raise CheckpointError(
            f"{what} could not be written to {folder}: {reason}; {_free_gib(folder):.1f} GiB are free there. "
            "Earlier checkpoints are untouched; make room or change --save, and start again to go on from the last one."
        ) from error


@contextlib.contextmanager
def load_explained(args: Any, load: Path) -> Iterator[None]:
    """Make one CheckpointError of what Megatron raises while it loads a run's checkpoint from ``load``."""
    try:
        yield
    except AssertionError as error:
        raise CheckpointError(
            f"the checkpoint in {load} does not fit these flags: {first_line(error, 'Megatron refuses them')}. Give the flags it was "
            "written with; --override-opt_param-scheduler accepts another length or learning rate."
        ) from error
    except LOAD_FAILURES as error:
        folder = chosen_folder(args, load)
        raise CheckpointError(
            f"checkpoint {folder} cannot be loaded: {checkpoint_failure(error).rstrip('.')}. It is damaged, or was "
            f"written with other flags. {_earlier(folder)}"
        ) from error
    except RuntimeError as error:  # after LOAD_FAILURES, one of which is a kind of RuntimeError
        if UNPICKLE not in str(error):
            raise
        raise CheckpointError(
            f"checkpoint {chosen_folder(args, load)} has the scales of --fp8-recipe delayed, which Transformer Engine keeps as a "
            f"pickle, and a pickle can run any code. If you trust its source, set {UNPICKLE}=1 in the environment; else start "
            "from exported weights (--hf-model)."
        ) from error


def checkpoint_failure(error: BaseException) -> str:
    """Why a save or load failed: a rank's own reason where torch brought one back.

    Raises:
        FailedElsewhere: torch told this rank nothing; rank 0 knows.
    """
    if isinstance(error, CheckpointException):
        if error.failures:
            rank, (cause, _) = min(error.failures.items())
            return f"rank {rank}: {first_line(cause)}"
        if dist.get_rank() != 0:
            raise FailedElsewhere from error
    return first_line(error)


def _free_gib(folder: Path) -> float:
    """Of the file system that the folder is on, or would be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free / 2**30
