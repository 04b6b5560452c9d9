"""The result of a check, as JSON for programs and as Markdown for people."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_rasft.files import write_json, write_text

Status = Literal["passed", "failed", "timed out", "not run"]
Figure = float | int | str | bool | None

JSON_FILE, MARKDOWN_FILE, LOG_FILE = "gpu_check.json", "gpu_check.md", "gpu_check.log"
SCHEMA = 1


@dataclass(kw_only=True)
class Result:
    """The result of one step."""

    name: str
    number: int
    """Number in the audit's list of measurements; 0 for other steps."""
    title: str
    status: Status
    reason: str = ""
    """The reason why the step failed or was not run."""
    command: str = ""
    seconds: float = 0.0
    deadline_s: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)
    """End of the step's output, if it failed or timed out."""
    peak_gpu_memory_gib: float | None = None
    left_behind: int = 0
    """Number of processes that the step left running."""
    covers: dict[str, str] = field(default_factory=dict)
    """Property that the emulated GPU cannot test -> the tests, or the part of this step, that test it."""

    def outcome(self, part: str) -> str:
        """Returns the results of the tests that ``part`` names, or the status of the step if it names none."""
        tests = {str(v) for k, v in self.figures.items() for name in part.split(", ") if f"::{name}" in k}
        return ", ".join(sorted(tests)).lower() or self.status


@dataclass(kw_only=True)
class Report:
    """The result of a whole check."""

    schema: int = SCHEMA
    commit: str = ""
    began: str = ""
    shape: str = ""
    emulated: bool = False
    """Whether tests/emulated_gpu replaced the GPU, so that no figure is a measurement."""
    limit_s: float = 0.0
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    steps: list[Result] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if a step failed or timed out, else 0. A step that could not run on this machine has a reason and does not count."""
        return int(any(step.status in ("failed", "timed out") for step in self.steps))

    def write(self, folder: Path) -> None:
        """Writes both files. Each is replaced only when it is complete."""
        write_json(folder / JSON_FILE, asdict(self))
        write_text(folder / MARKDOWN_FILE, markdown(self))


def read(path: Path) -> Report:
    """Reads a report that an earlier check wrote.

    Raises:
        ValueError: the file is not a report of this program.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        steps = [Result(**step) for step in values.pop("steps")]
        report = Report(**values, steps=steps)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a report of this program: {error}") from error
    if report.schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {report.schema}, this program writes {SCHEMA}: run the check again."
        )
    return report


def markdown(report: Report) -> str:
    """Formats the report for people: the steps, their figures, and the end of each failed step's output."""
    return "\n".join(
        [
            *_head(report),
            "## Steps",
            "",
            *_table(
                ("", "step", "result", "s", "of", "GPU GiB", "why"),
                (
                    (
                        step.number or "",
                        step.title,
                        step.status,
                        _text(step.seconds),
                        _text(step.deadline_s),
                        _text(step.peak_gpu_memory_gib),
                        _why(step),
                    )
                    for step in report.steps
                ),
            ),
            *_training_speeds(report.steps),
            *_figures(report.steps),
            *_gaps(report.steps),
            *_failures(report.steps),
        ]
    )


def _head(report: Report) -> list[str]:
    lines = ["# GPU check", ""]
    if report.emulated:
        lines += ["**Emulated: no GPU was used, and no figure below is a measurement.**", ""]
    counts = {status: sum(step.status == status for step in report.steps) for status in get_args(Status)}
    rows = [
        ("commit", report.commit),
        ("began", report.began),
        ("took", f"{report.seconds:.0f} s of at most {report.limit_s:.0f} s"),
        ("model", f"shape {report.shape}" if "/" not in report.shape else report.shape),
        ("steps", ", ".join(f"{number} {status}" for status, number in counts.items() if number)),
        *((name, _text(value)) for name, value in report.machine.items()),
    ]
    return [*lines, *_table(("", ""), rows), ""]


def _why(step: Result) -> str:
    left = f"left {step.left_behind} processes running" if step.left_behind else ""
    return "; ".join(filter(None, [step.reason, left]))


_SPEED = re.compile(r"measured (.+) tokens_per_s")


def _training_speeds(steps: Iterable[Result]) -> list[str]:
    """A table of tokens per second of each kind of training step, one column per step of the check."""
    speeds = {
        step.title: {m[1]: value for name, value in step.figures.items() if (m := _SPEED.fullmatch(name))}
        for step in steps
    }
    speeds = {title: values for title, values in speeds.items() if values}
    if not speeds:
        return []
    kinds = dict.fromkeys(kind for values in speeds.values() for kind in values)
    rows = ((kind, *(values.get(kind) for values in speeds.values())) for kind in kinds)
    return ["", "## Tokens per second of a training step", "", *_table(("", *speeds), rows)]


def _figures(steps: Iterable[Result]) -> list[str]:
    lines = []
    for step in steps:
        if step.figures:
            lines += ["", f"## {step.title}", "", *_table(("figure", "value"), step.figures.items())]
    return lines


def _gaps(steps: Iterable[Result]) -> list[str]:
    rows = [(gap, step.name, part, step.outcome(part)) for step in steps for gap, part in step.covers.items()]
    if not rows:
        return []
    heads = ("what the emulated GPU cannot show", "step", "by", "result")
    return ["", "## What only a GPU shows", "", *_table(heads, sorted(rows))]


def _failures(steps: Iterable[Result]) -> list[str]:
    lines = []
    for step in steps:
        if step.last_lines:
            lines += ["", f"## {step.status}: {step.title}", "", f"`{step.command}`", "", "```text"]
            lines += [line.replace("```", "'''") for line in step.last_lines]
            lines += ["```"]
    return [*lines, ""]


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    return lines + [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Figure]:
    """Flattens the nested figures of a benchmark: ``{"a": {"b": 1}}`` becomes ``{"a b": 1}``."""
    flat: dict[str, Figure] = {}
    for key, value in values.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, Mapping):
            flat |= flattened(value, name)
        elif isinstance(value, list):
            flat |= flattened({str(i): item for i, item in enumerate(value)}, name)
        else:
            flat[name] = value
    return flat
