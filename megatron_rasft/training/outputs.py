"""What a run writes beside its checkpoints: where it is, whether it can be, and how a run takes up what it appends to."""

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
from megatron_rasft.weights.tracker import has_checkpoint

BEGUN_FILE = "begun.json"
"""In --save: how long the files were when the run began. Killed before its first checkpoint, it begins there again."""


@dataclass(kw_only=True)
class AppendedFile:
    """A file that a run adds whole lines to and whose length its checkpoints know; its methods are for rank 0."""

    path: Path
    flag: str
    """Gives it another place."""
    is_named: bool
    """The flag was given; else the file lies in --save."""
    may_be_shorter: bool
    """Whether a run may go on though lines are missing that were there at its checkpoint."""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def mark(self) -> dict[str, Any]:
        """Which file this is and how long, for a checkpoint. In --save it is known by its name: the folder may move."""
        return {"path": str(self.path.resolve()) if self.is_named else self.path.name, "size": self.size}

    def is_known_as(self, mark: dict[str, Any] | None, folder: Path | None) -> bool:
        """Whether ``mark``, kept in ``folder``, is of this file."""
        return (
            mark is not None
            and folder is not None
            and (folder / mark["path"]).resolve() == self.path.resolve()
        )

    def take_up(self, at_checkpoint: int | None, at_start: int | None) -> str:
        """Leave what belongs to the run: it appends from here on.

        Args:
            at_checkpoint: bytes it had when the checkpoint was written that the run goes on from; None without one, or
                if it is not that checkpoint's file.
            at_start: bytes it had when the run began for the first time, if the run has no checkpoint yet.

        Returns:
            A line for the user if what it holds of an earlier start was cut away, else an empty one.

        Raises:
            CheckpointError: it is shorter than at the checkpoint.
        """
        text = ""
        size = whole_lines(self.path)
        if at_checkpoint is not None:
            if self.size < at_checkpoint and not self.may_be_shorter:
                raise CheckpointError(
                    f"{self.path} has {self.size} bytes, but the checkpoint was written when it had {at_checkpoint}: it was "
                    f"moved or cut. Put the file back, or name another with {self.flag}."
                )
            size = min(size, at_checkpoint)
        if at_start is not None and at_start < size:
            size = at_start
            text = f"{self.path} is cut to the {size} bytes it had when the run began: it ended before its first checkpoint"
        if size < self.size:
            os.truncate(self.path, size)
        return text


def take_up_files(
    files: dict[str, AppendedFile], marks: dict[str, Any], load: Path | None, save: Path | None
) -> list[str]:
    """Leave in each file what belongs to the run; for rank 0.

    Args:
        files: by the name that marks know them by.
        marks: of the checkpoint in ``load`` that the run goes on from; empty without one.
        save: the run's folder. Until it has a checkpoint, it keeps how long the files were when the run began.

    Returns:
        Lines for the user.

    Raises:
        CheckpointError: a file is not what it was at the checkpoint.
    """
    begun = None if save is None or has_checkpoint(save) else save / BEGUN_FILE
    at_start = json.loads(begun.read_text(encoding="utf-8")) if begun is not None and begun.exists() else {}
    lines = []
    for name, file in files.items():
        sizes = [
            kept[name]["size"] if file.is_known_as(kept.get(name), folder) else None
            for kept, folder in ((marks, load), (at_start, save))
        ]
        lines.append(file.take_up(*sizes))
    if begun is not None:
        with written_to(begun, "--save"):
            write_json(begun, {name: file.mark() for name, file in files.items()})
    return [line for line in lines if line]


def metrics_file(args: Any, config: RasftConfig) -> AppendedFile | None:
    """Where every logged number goes; None if nowhere."""
    return _appended(args, config.run.rasft_metrics, "metrics.jsonl", "--rasft-metrics", may_be_shorter=True)


def rollouts_file(args: Any, config: RasftConfig) -> AppendedFile | None:
    """Where every rollout goes; None if nowhere, or if the run makes none."""
    rollout = config.rollout
    if not config.samples_rollouts or rollout.rollout_engine == "replay":
        return None
    return _appended(args, rollout.rollout_store, "rollouts.jsonl", "--rollout-store", may_be_shorter=False)


def data_cache(args: Any, named: str | None) -> Path | None:
    """Where tokenized rows are kept; None if nowhere.

    Args:
        named: --data-cache.
    """
    if named is not None:
        return Path(named) if named else None
    return None if args.save is None else Path(args.save, "data_cache")


def reference_cache(args: Any, config: RasftConfig) -> Path | None:
    """The reference's log-probabilities on disk; None if they stay in memory, or there are none."""
    if not config.objective.needs_reference_logprobs():
        return None
    if config.run.rasft_ref_cache is not None:
        return Path(config.run.rasft_ref_cache)
    return None if args.save is None else Path(args.save, "ref_logprobs.sqlite")


def check_outputs(args: Any, config: RasftConfig) -> None:
    """Refuse what cannot be written, on every rank, while nothing is built yet.

    Raises:
        ValueError, RasftError: with the flag; FailedElsewhere on the ranks that do not write.
    """
    files = [f for f in (metrics_file(args, config), rollouts_file(args, config)) if f is not None]
    cache, rows = reference_cache(args, config), data_cache(args, config.data.data_cache)

    def check() -> None:
        for file in files:
            check_writable(file.flag, file.path, file.path.parent)
        if cache is not None:
            check_writable("--rasft-ref-cache", cache, cache.parent)
            LogprobCache(cache, fingerprint="")
        if rows is not None:
            check_writable("--data-cache", rows, rows)
        if args.export_hf is not None:
            check_writable("--export-hf", Path(args.export_hf), Path(args.export_hf).absolute().parent)

    on_rank_zero(check)


def check_writable(flag: str, path: Path, folder: Path) -> None:
    """Refuse a path that nothing can be written to. Makes ``folder``, which is the path itself or what it lies in.

    Raises:
        ValueError: with the flag.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path != folder and path.exists():
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
