"""A run with all data that the page shows."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.reading import Row, read_rows
from megatron_rasft.errors import DataError
from megatron_rasft.tools.report.archive import Archive
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.rollouts import (
    Example,
    RolloutStatistics,
    Visit,
    course_of,
    pick_examples,
    read_statistics,
)
from megatron_rasft.tools.report.tokens import TokenView
from megatron_rasft.wording import counted


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
    problems: dict[str, Problem] = field(default_factory=dict)
    """Problem id -> texts, for the examples whose texts were found."""
    archive: Archive | None = None
    """All rollouts and problems, for the search; None if the page has no search."""
    tokens: TokenView = field(default_factory=TokenView)
    """Tokens of the examples' rollouts."""
    notes: list[str] = field(default_factory=list)
    """Missing or damaged inputs, listed at the top of the page."""

    @property
    def name(self) -> str:
        return self.records.name


def read_view(
    records: RunRecords,
    data_files: Sequence[str] | None,
    num_examples: int,
    problem_ids: Sequence[str] = (),
    archive: Archive | None = None,
) -> RunView:
    """Reads a run's stored rollouts and the texts of its problems.

    Missing or damaged inputs become notes of the view.

    Args:
        records: the run's metrics and settings.
        data_files: files of demonstrations; None for the files that the run's settings name.
        num_examples: maximum number of examples of each course.
        problem_ids: problems that are examples in any case.
        archive: an empty archive, which gets all rollouts and problems; None for a page without search.

    Raises:
        ValueError: one of ``problem_ids`` has no rollouts.
    """
    view = RunView(records, notes=_notes_on_metrics(records))
    if records.rollouts_path is None:
        view.notes.append(_note_without_rollouts(records))
        return view
    view.rollouts, view.archive = read_statistics(records.rollouts_path, archive), archive
    view.notes += _notes_on_rollouts(records.rollouts_path, view.rollouts)
    histories = view.rollouts.histories()
    view.examples = pick_examples(records.rollouts_path, histories, num_examples, named=problem_ids)
    shown = {example.problem_id for example in view.examples}
    wanted = set(shown) if archive is None else set(histories)
    try:
        for row in _rows_of(records, data_files, wanted):
            problem = Problem(row.problem, row.response, _check(row))
            if row.problem_id in shown:
                view.problems[row.problem_id] = problem
            if archive is not None:
                _add_problem(archive, row.problem_id, histories[row.problem_id], problem)
    except (DataError, ValueError, TypeError, OSError) as error:
        view.notes.append(
            f"The texts of the problems were not found: {error} Give the file with --train-data."
        )
    if archive is not None:
        for problem_id in sorted(wanted):
            _add_problem(archive, problem_id, histories[problem_id], None)
    return view


def _add_problem(
    archive: Archive, problem_id: str, history: list[tuple[int, Visit]], problem: Problem | None
) -> None:
    counts = [
        (step, visit.num_samples, visit.num_attempts, visit.num_solved, round(visit.solve_rate or 0.0, 4))
        for step, visit in history
    ]
    texts = None if problem is None else (problem.text, problem.check, problem.response)
    archive.add_problem(problem_id, course_of(history), counts, texts)


def _notes_on_metrics(records: RunRecords) -> list[str]:
    notes = []
    if records.metrics_path is None:
        notes.append("metrics.jsonl was not found, so there are no curves. Give the file with --metrics.")
    elif not records.steps:
        notes.append(f"{records.metrics_path} has no record of a step yet.")
    if records.num_unreadable:
        notes.append(
            f"Skipped {counted(records.num_unreadable, 'unreadable line')} of {records.metrics_path}."
        )
    return notes


def _notes_on_rollouts(path: Path, rollouts: RolloutStatistics) -> list[str]:
    notes = []
    if not rollouts.refreshes:
        notes.append(f"{path} has no rollouts.")
    if rollouts.num_unreadable:
        notes.append(f"Skipped {counted(rollouts.num_unreadable, 'unreadable line')} of {path}.")
    if rollouts.num_repeated:
        notes.append(
            f"Skipped {counted(rollouts.num_repeated, 'rollout', form=',')} of refreshes that the run repeated later."
        )
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


def _rows_of(records: RunRecords, data_files: Sequence[str] | None, wanted: set[str]) -> Iterator[Row]:
    """Yields the rows of these problems from the given files, or from those that config.json or the model card names.

    Removes each problem from ``wanted`` when it is found.

    Raises:
        DataError: no file is named, or a named file cannot be read.
    """
    if not wanted:
        return
    known = {field.name for field in dataclasses.fields(DataConfig)}
    settings = {k: v for k, v in records.config.get("rasft", {}).get("data", {}).items() if k in known}
    on_card = list(filter(None, records.card.get("Demonstrations", "").split(", ")))
    settings["train_data"] = data_files or settings.get("train_data") or on_card
    if not settings["train_data"]:
        raise DataError("neither config.json nor a model card names the run's data.")
    by_function = records.setting("verify", "verify_function") is not None
    for row in read_rows(DataConfig(**settings), require_answer=False, keep_fields=by_function):
        if isinstance(row, Row) and row.problem_id in wanted:
            wanted.remove(row.problem_id)
            yield row
            if not wanted:
                return


def _check(row: Row) -> str:
    if row.fields is not None:  # the fields that only the user's function reads
        shown = (row.problem, row.response)
        return json.dumps(
            {k: v for k, v in row.fields.items() if v not in shown}, ensure_ascii=False, indent=1
        )
    if row.tests is None:
        return row.answer or ""
    return "\n".join([*row.tests.tests, *(f"{case.input} -> {case.output}" for case in row.tests.cases)])
