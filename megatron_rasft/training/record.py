"""Everything a run writes besides checkpoints: console lines, metrics, rollouts, its configuration."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.config import RasftConfig
from megatron_rasft.config.saved import SavedConfig, write_flags
from megatron_rasft.monitoring.progress import Progress, ScalarWriter
from megatron_rasft.monitoring.status import RunStatus, State
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training.outputs import cut_files, metrics_file, rollouts_file
from megatron_rasft.weights.model_card import run_facts


class RunRecord:
    """The record of one run. Every rank has a record; rank 0 writes the files and the console lines.

    Args:
        is_rank_zero: whether this is rank 0.
        tensorboard: Megatron's writer, on the rank that has it.
        wandb: Megatron's Weights & Biases module, on the rank that has it.
    """

    def __init__(
        self,
        args: Any,
        config: RasftConfig,
        *,
        is_rank_zero: bool,
        tensorboard: ScalarWriter | None = None,
        wandb: Any | None = None,
    ) -> None:
        self._args = args
        self._config = config
        self._is_rank_zero = is_rank_zero
        self._save = None if args.save is None else Path(args.save)
        metrics, rollouts = metrics_file(args, config), rollouts_file(args, config)
        self._metrics_path = None if metrics is None else metrics.path
        self.rollouts_path = None if rollouts is None else rollouts.path
        """Where rollouts are stored; None if they are not, or if the run makes none."""
        self._files = {k: f for k, f in (("metrics", metrics), ("rollouts", rollouts)) if f is not None}
        """Files that grow during the run, by their names in checkpoints."""
        self._progress = Progress(
            args.train_iters, self._metrics_path, tensorboard, wandb, is_silent=not is_rank_zero
        )
        self.file_marks: dict[str, Any] = {}
        """Name and length of each growing file after the last step, on rank 0. A run that resumes from a checkpoint truncates the
        files to its marks and writes the later lines again."""

    def say(self, text: str) -> None:
        """Prints a line on rank 0's console."""
        self._progress.say(text)

    def add_step(self, iteration: int, values: Mapping[str, float], note: str = "") -> None:
        """Records a training step, and prints its line with a note at its end; a collective of the world."""
        self._on_each_rank(lambda: self._progress.step(iteration, values, note))
        if self._is_rank_zero:
            self.mark_files()

    def add_refresh(self, iteration: int, values: Mapping[str, float], line: str) -> None:
        """Records a refresh, or a held-out measurement; a collective of the world."""
        self._on_each_rank(lambda: self._progress.refresh(iteration, values, line))

    def _on_each_rank(self, write: Callable[[], None]) -> None:
        # TensorBoard's and Weights & Biases' writers are on the last rank, the files on rank 0, whose failure ends all ranks.
        if not self._is_rank_zero:
            write()
        on_rank_zero(write)

    def open_files(self, marks: dict[str, Any], checkpoints: Path | None) -> None:
        """Truncates the files to the lines that belong to this run, writes config.json and config.toml, and begins to show long work.

        Rank 0 only.

        Args:
            marks: ``file_marks`` of the checkpoint that the run resumes from; {} without one.
            checkpoints: the folder of that checkpoint, the run's --save or --load; None without one.
        """
        if self._save is not None:
            self._save.mkdir(parents=True, exist_ok=True)
        for line in cut_files(self._files, marks, checkpoints, self._save):
            self.say(line)
        self.mark_files()
        if self._save is not None:
            self.configuration.write(self._save)
            write_flags(self._save, self._args.given_values, self._config)
        self._progress.show_work(self._config.run.rasft_live_s)

    @property
    def configuration(self) -> SavedConfig:
        """The configuration of this start."""
        return SavedConfig.of(self._args, self._config)

    def say_changes(self, resume: Resume, before: dict[str, Any] | None) -> None:
        """Prints the flags that differ from those that trained a checkpoint. Rank 0 only, before ``open_files``.

        Args:
            resume: where the run resumes from, which is a checkpoint.
            before: ``configuration`` as the checkpoint holds it; None if it holds none.
        """
        for line in describe_changes(resume, before, self.configuration):
            self.say(line)

    def note_status(self, state: State, step: int | None = None, **changes: Any) -> None:
        """Writes status.json on rank 0, if the run has --save.

        Args:
            step: steps trained so far; None keeps the number that the file holds.
            changes: further fields of ``RunStatus``. Those that are not given keep their values.

        Raises:
            RasftError: the file cannot be written.
        """
        if self._is_rank_zero and self._save is not None:
            before = RunStatus.read(self._save) or RunStatus(state="running")
            if state == before.state == "failed":
                return  # The first error is the cause of the later ones.
            changes = {
                "state": state,
                "step": before.step if step is None else step,
                "num_steps": self._args.train_iters,
                "reason": "",
                **changes,
            }
            replace(before, **changes).write(self._save)

    def mark_files(self) -> None:
        """Stores the files' lengths for the next checkpoint."""
        self.file_marks = {name: file.mark() for name, file in self._files.items()}

    def facts(self, iteration: int) -> dict[str, str]:
        """The rows of an exported model's card that describe this run as of step ``iteration``."""
        return run_facts(self.configuration, self._metrics_path, iteration)

    def close(self, *, is_clean: bool) -> None:
        """Flushes the trackers. ``is_clean``: whether the run ended without an error."""
        self._progress.close(0 if is_clean else 1)


def describe_changes(resume: Resume, before: dict[str, Any] | None, now: SavedConfig) -> list[str]:
    """Returns lines about the flags that differ from those that trained a checkpoint; [] if none do.

    Args:
        resume: where the run resumes from, which is a checkpoint.
        before: the configuration that the checkpoint holds. None if it holds none: then config.json in its folder is read, which a
            later start may have replaced.
        now: the configuration of this start.
    """
    assert resume.folder is not None, "the run begins at step 0"
    try:
        known = SavedConfig.read(resume.folder) if before is None else SavedConfig.from_json(before)
    except ValueError as error:
        return [f"the flags until step {resume.step} are not known: {error}"]
    if known is None:
        return []
    changes, unknown = known.changes(now), known.unknown_flags()
    lines = [f"changed since step {resume.step}: {', '.join(changes)}"] if changes else []
    if unknown:
        lines.append(
            f"warning: step {resume.step} was trained with flags that this version does not have, so they have no effect now: "
            f"{', '.join(unknown)}"
        )
    return lines
