"""The file status.json in --save, which says how a run ended: scripts read it, and so does the next start of the run.

The exit code separates a clean end (0) from a crash; this file separates a finished run from a stopped one. It is replaced in one
step, so it always holds a complete object.
"""

import argparse
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_rasft.files import write_json, written_to
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training.resume import Resume

STATUS_FILE = "status.json"

State = Literal["running", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run is, and how it ended."""

    state: State
    """running: the run has begun. If its processes have ended, they were killed, or failed before they could write the reason.
    stopped: the same command resumes it. finished: all steps are trained and the export is written. failed: see ``reason``."""
    step: int = 0
    """The last step that was trained, or saved while the run goes on."""
    num_steps: int = 0
    """Steps of the whole run."""
    reason: str = ""
    """Why the run was stopped, or the first line of its error."""
    export_folder: str | None = None
    """Absolute path of the export that the run has begun, after its last step."""
    save_s: float | None = None
    """The longest save of the last start that has saved, seconds."""

    @classmethod
    def read(cls, save: Path | str | None) -> Self | None:
        """Reads the status of the run in a --save folder; None if there is none, or if the file is not a status."""
        try:
            content: Any = json.loads(Path(save or "", STATUS_FILE).read_text(encoding="utf-8"))
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(**{name: value for name, value in content.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, save: Path | str) -> None:
        """Writes the status into a --save folder.

        Raises:
            RasftError: the file cannot be written.
        """
        path = Path(save, STATUS_FILE)
        with written_to(path, "--save"):
            write_json(path, {**dataclasses.asdict(self), "time": time.time()}, is_synced=True)

    def has_export(self, folder: str | None) -> bool:
        """Returns whether ``folder`` is the complete export of this run, which only begins an export that does not exist."""
        return (
            folder is not None and self.export_folder == os.path.abspath(folder) and _is_model(Path(folder))
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def finished_before(args: argparse.Namespace, resume: Resume) -> bool:
    """Returns whether an earlier start has finished this run, and prints a line if so. Otherwise writes the state ``running``.

    A collective of the world. Heavy work comes after it: a finished run ends without loading the model.

    Args:
        args: Megatron's arguments with the length of the run. Reads --save and --export-hf too.
        resume: where the run resumes from.

    Raises:
        ValueError: --export-hf holds this run's export, but steps are left that it does not have.
    """

    def check() -> bool:
        if args.save is None:
            return False
        is_over = is_finished(args, resume)
        state: State = "finished" if is_over else "running"
        before, length = RunStatus.read(args.save) or RunStatus(state="running"), num_steps(args)
        status = dataclasses.replace(before, state=state, step=resume.step, num_steps=length, reason="")
        status.write(args.save)
        if is_over:
            print(describe_finished(args, resume), flush=True)
        return is_over

    return on_rank_zero(check)


def is_finished(args: argparse.Namespace, resume: Resume) -> bool:
    """Returns whether an earlier start has finished this run. It is for rank 0, and takes the arguments of ``finished_before``.

    Raises:
        ValueError: --export-hf holds this run's export, but steps are left that it does not have.
    """
    before = RunStatus.read(args.save)
    if before is None:
        return False
    is_over = resume.is_own and resume.step >= num_steps(args)
    is_exported = before.has_export(args.export_hf)
    if is_exported and not is_over:
        raise ValueError(
            f"--export-hf {args.export_hf} is this run's export from an earlier end, and the run goes on from step {resume.step} "
            f"to {num_steps(args)}. Name another folder, or move it away."
        )
    # The export is the last act of a run, so its folder proves the end even if the process was killed right after it.
    return is_over and (is_exported if args.export_hf else before.state == "finished")


def describe_finished(args: argparse.Namespace, resume: Resume) -> str:
    """The console line of a finished run."""
    exported = f", exported to {args.export_hf}" if args.export_hf else ""
    return f"finished before: step {resume.step} of {num_steps(args)} in {args.save}{exported}"


def num_steps(args: argparse.Namespace) -> int:
    """The steps of a run whose length is set."""
    # With --train-samples Megatron calculates the steps only when it builds the optimizer (update_train_iters).
    return int(args.train_iters or args.train_samples // args.global_batch_size)
