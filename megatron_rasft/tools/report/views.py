"""A run with all data that the page shows."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.reading import Row, read_rows
from megatron_rasft.errors import DataError
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.rollouts import Example, RolloutStatistics, pick_examples, read_statistics


@dataclass
class Problem:
    """A problem's texts in the training data."""

    text: str
    response: str
    """The demonstration."""
    check: str
    """The problem's gold answer or tests."""


@dataclass
class RunView:
    """A run with all data that the page shows."""

    records: RunRecords
    rollouts: RolloutStatistics | None = None
    """Statistics of the stored rollouts; None if the run has none."""
    examples: list[Example] = field(default_factory=list)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    """Problem id -> texts, for the examples whose texts were found."""
    notes: list[str] = field(default_factory=list)
    """Missing or damaged inputs, listed at the top of the page."""

    @property
    def name(self) -> str:
        return self.records.name


def read_view(records: RunRecords, data_files: Sequence[str] | None, num_examples: int) -> RunView:
    """Reads a run's stored rollouts and the texts of its examples.

    Missing or damaged inputs become notes of the view.

    Args:
        records: the run's metrics and settings.
        data_files: files of demonstrations; None for the files that the run's settings name.
        num_examples: maximum number of examples of each course.
    """
    view = RunView(records, notes=_notes_on_metrics(records))
    if records.rollouts_path is None:
        view.notes.append(_note_without_rollouts(records))
        return view
    view.rollouts = read_statistics(records.rollouts_path)
    view.notes += _notes_on_rollouts(records.rollouts_path, view.rollouts)
    view.examples = pick_examples(records.rollouts_path, view.rollouts.histories(), num_examples)
    if view.examples:
        try:
            view.problems = _read_problems(
                records, data_files, {example.problem_id for example in view.examples}
            )
        except (DataError, ValueError, TypeError, OSError) as error:
            view.notes.append(
                f"The texts of the problems were not found: {error} Give the file with --train-data."
            )
    return view


def _notes_on_metrics(records: RunRecords) -> list[str]:
    notes = []
    if records.metrics_path is None:
        notes.append("metrics.jsonl was not found, so there are no curves. Give the file with --metrics.")
    elif not records.steps:
        notes.append(f"{records.metrics_path} has no record of a step yet.")
    if records.num_unreadable:
        notes.append(f"Skipped {records.num_unreadable} unreadable line(s) of {records.metrics_path}.")
    return notes


def _notes_on_rollouts(path: Path, rollouts: RolloutStatistics) -> list[str]:
    notes = []
    if not rollouts.refreshes:
        notes.append(f"{path} has no rollouts.")
    if rollouts.num_unreadable:
        notes.append(f"Skipped {rollouts.num_unreadable} unreadable line(s) of {path}.")
    if rollouts.num_repeated:
        notes.append(f"Skipped {rollouts.num_repeated:,} rollouts of refreshes that the run repeated later.")
    return notes


def _note_without_rollouts(records: RunRecords) -> str:
    if records.setting("rollout", "rollout_engine") == "replay":
        return "This run replays stored rollouts and stores none itself."
    if any(record.get("rollout/num_rollouts") for record in records.refreshes.values()):
        return (
            "rollouts.jsonl was not found, so there are no examples and the solve rates of problems are unknown. Give the file with "
            "--rollouts."
        )
    return "This run has no rollouts: it trains on demonstrations only, or has not reached its first refresh."


def _read_problems(
    records: RunRecords, data_files: Sequence[str] | None, wanted: set[str]
) -> dict[str, Problem]:
    """Reads texts of problems from the given files, or from those that config.json or the model card names.

    Raises:
        DataError: no file is named, or a named file cannot be read.
    """
    known = {field.name for field in dataclasses.fields(DataConfig)}
    settings = {k: v for k, v in records.config.get("rasft", {}).get("data", {}).items() if k in known}
    on_card = list(filter(None, records.card.get("Demonstrations", "").split(", ")))
    settings["train_data"] = data_files or settings.get("train_data") or on_card
    if not settings["train_data"]:
        raise DataError("neither config.json nor a model card names the run's data.")
    found: dict[str, Problem] = {}
    for row in read_rows(DataConfig(**settings), require_answer=False):
        if isinstance(row, Row) and row.problem_id in wanted:
            found[row.problem_id] = Problem(row.problem, row.response, _check(row))
            if len(found) == len(wanted):
                break
    return found


def _check(row: Row) -> str:
    if row.tests is None:
        return row.answer or ""
    return "\n".join([*row.tests.tests, *(f"{case.input} -> {case.output}" for case in row.tests.cases)])
