"""The files that a run writes beside its checkpoints: their paths, whether they are writable, and their lengths after a resume."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rasft.config import RasftConfig
from megatron_rasft.errors import CheckpointError
from megatron_rasft.files import write_json, written_to
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.rollout.store import whole_lines
from megatron_rasft.training.reference import LogprobCache
from megatron_rasft.weights.export_lock import ExportLock
from megatron_rasft.weights.exporting import remove_partial_exports
from megatron_rasft.weights.tracker import has_checkpoint

BEGUN_FILE = "begun.json"
"""File in --save: the lengths of the files when the run began.

If the run is killed before its first checkpoint, its next start truncates the files to these lengths.
"""


@dataclass(kw_only=True)
class AppendedFile:
    """A file to which a run appends whole lines. Checkpoints hold its length. Its methods are for rank 0."""

    path: Path
    flag: str
    """The flag that gives the path."""
    is_named: bool
    """Whether the flag was given. Otherwise the file is in --save."""
    may_be_shorter: bool
    """Whether a run may resume although the file is shorter than at the checkpoint."""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def mark(self) -> dict[str, Any]:
        """Returns the file's path and length, for a checkpoint. A file in --save is given by name only: the folder may be moved."""
        return {"path": str(self.path.resolve()) if self.is_named else self.path.name, "size": self.size}

    def matches(self, mark: dict[str, Any] | None, folder: Path | None) -> bool:
        """Returns whether ``mark``, which was saved in ``folder``, belongs to this file."""
        return (
            mark is not None
            and folder is not None
            and (folder / mark["path"]).resolve() == self.path.resolve()
        )

    def cut(self, at_checkpoint: int | None, at_start: int | None) -> str:
        """Truncates the file to the lines that this run wrote before its checkpoint, and to whole lines.

        Args:
            at_checkpoint: length in bytes at the checkpoint that the run resumes from; None without a checkpoint, or if the
                checkpoint belongs to another file.
            at_start: length in bytes when the run was first started; None if the run has a checkpoint of its own.

        Returns:
            A line for the user if lines of an earlier start were cut off, otherwise "".

        Raises:
            CheckpointError: the file is shorter than at the checkpoint.
        """
        text = ""
        size = whole_lines(self.path)  # a killed run may have written only a part of its last line
        if at_checkpoint is not None:
            if self.size < at_checkpoint and not self.may_be_shorter:
                raise CheckpointError(
                    f"{self.path} has {self.size} bytes, but had {at_checkpoint} when the checkpoint was written: it was "
                    f"moved or truncated. Put the file back, or name another with {self.flag}."
                )
            size = min(size, at_checkpoint)
        if at_start is not None and at_start < size:
            size = at_start
            text = f"{self.path} is truncated to the {size} bytes it had when the run began: the run ended before its first checkpoint"
        if size < self.size:
            os.truncate(self.path, size)
        return text


def cut_files(
    files: dict[str, AppendedFile], marks: dict[str, Any], load: Path | None, save: Path | None
) -> list[str]:
    """Truncates each file to the lines that belong to this run; for rank 0.

    Args:
        files: name in ``marks`` -> file.
        marks: name -> mark, of the checkpoint in ``load`` that the run resumes from; {} without one.
        load: the folder of that checkpoint; None without one.
        save: the run's folder. Until it has a checkpoint, its ``BEGUN_FILE`` holds the marks of the run's first start.

    Returns:
        Lines for the user.

    Raises:
        CheckpointError: a file is shorter than at the checkpoint.
    """
    # As soon as the run has a checkpoint of its own, that checkpoint's marks take the place of BEGUN_FILE.
    begun = None if save is None or has_checkpoint(save) else save / BEGUN_FILE
    at_start = json.loads(begun.read_text(encoding="utf-8")) if begun is not None and begun.exists() else {}
    lines = []
    for name, file in files.items():
        sizes = [
            kept[name]["size"] if file.matches(kept.get(name), folder) else None
            for kept, folder in ((marks, load), (at_start, save))
        ]
        lines.append(file.cut(*sizes))
    if begun is not None:
        with written_to(begun, "--save"):
            write_json(begun, {name: file.mark() for name, file in files.items()})
    return [line for line in lines if line]


def metrics_file(args: Any, config: RasftConfig) -> AppendedFile | None:
    """The file of all logged metrics; None without --save and --rasft-metrics."""
    return _appended(args, config.run.rasft_metrics, "metrics.jsonl", "--rasft-metrics", may_be_shorter=True)


def rollouts_file(args: Any, config: RasftConfig) -> AppendedFile | None:
    """The file of all rollouts; None if the run samples none, or without --save and --rollout-store."""
    rollout = config.rollout
    if not config.samples_rollouts or rollout.rollout_engine == "replay":
        return None
    return _appended(args, rollout.rollout_store, "rollouts.jsonl", "--rollout-store", may_be_shorter=False)


def data_cache(args: Any, named: str | None) -> Path | None:
    """The folder of tokenized rows; None if they are not kept.

    Args:
        args: Megatron's.
        named: the value of --data-cache; "" turns the cache off.
    """
    if named is not None:
        return Path(named) if named else None
    return None if args.save is None else Path(args.save, "data_cache")


def reference_cache(args: Any, config: RasftConfig) -> Path | None:
    """The file of the reference's log-probabilities; None if they stay in memory, or if the objective needs none."""
    if not config.objective.scores_under_reference():
        return None
    if config.run.rasft_ref_cache is not None:
        return Path(config.run.rasft_ref_cache)
    return None if args.save is None else Path(args.save, "ref_logprobs.sqlite")


def check_outputs(args: Any, config: RasftConfig) -> None:
    """Checks that every output can be written, before anything is built, and keeps other runs from exporting to --export-hf.

    Rank 0 checks, but the call is a collective of the world.

    Raises:
        ValueError, RasftError: an output cannot be written; the message names the flag. FailedElsewhere on the other ranks.
    """
    files = [f for f in (metrics_file(args, config), rollouts_file(args, config)) if f is not None]
    cache, rows = reference_cache(args, config), data_cache(args, config.data.data_cache)

    def check() -> None:
        if line := kept_nothing(args):
            print(line, flush=True)
        for file in files:
            check_writable(file.flag, file.path, file.path.parent)
        if cache is not None:
            check_writable("--rasft-ref-cache", cache, cache.parent)
            LogprobCache(cache, fingerprint="")  # fails if an existing file is not a database
        if rows is not None:
            check_writable("--data-cache", rows, rows)
        # A folder that exists is this run's own export: startup.parse has checked this. Nothing is written there.
        if args.export_hf is not None and not Path(args.export_hf).exists():
            check_writable("--export-hf", Path(args.export_hf), Path(args.export_hf).absolute().parent)
            ExportLock(Path(args.export_hf))
            for partial in remove_partial_exports(Path(args.export_hf)):
                print(f"removed {partial}: an export that was interrupted", flush=True)

    on_rank_zero(check)


def kept_nothing(args: Any) -> str:
    """Returns a warning if the run will keep neither checkpoints nor the trained model; otherwise ""."""
    if args.save is not None or args.export_hf is not None:
        return ""
    return (
        "warning: this run keeps neither checkpoints nor the trained model. To keep them give --save DIR, which also gets metrics and "
        "rollouts, or --export-hf DIR."
    )


def check_writable(flag: str, path: Path, folder: Path) -> None:
    """Checks that a path can be written.

    Args:
        flag: the flag that gives the path, for the message.
        path: a file or a folder.
        folder: ``path`` itself, or the folder of the file; is created.

    Raises:
        ValueError: the path cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path != folder and path.exists():
            # opening for appending checks the permission and leaves the content unchanged
            path.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"{flag} {path} cannot be written: {error.strerror}. Name another place, or make this one writable."
        ) from error


def _appended(
    args: Any, named: str | None, name: str, flag: str, *, may_be_shorter: bool
) -> AppendedFile | None:
    if named is None and args.save is None:
        return None
    path = Path(args.save, name) if named is None else Path(named)
    return AppendedFile(path=path, flag=flag, is_named=named is not None, may_be_shorter=may_be_shorter)
