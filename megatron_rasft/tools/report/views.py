"""One run as the page shows it, and the parts that its sections share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rasft.tools.report.charts import MAX_COLUMNS, number
from megatron_rasft.tools.report.markup import Content, Html, tag
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.rollouts import Example, RolloutStatistics

_NUM_COLOURS = 8


@dataclass
class Problem:
    """What the training data says of one problem."""

    text: str
    response: str
    """The demonstration."""
    check: str
    """The gold answer or the tests."""


@dataclass
class RunView:
    """One run as the page shows it."""

    records: RunRecords
    rollouts: RolloutStatistics | None = None
    examples: list[Example] = field(default_factory=list)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    """Of the examples, as far as the data is at hand."""
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""

    @property
    def name(self) -> str:
        return self.records.name


def colour(place: int) -> str:
    """Of a run by its place: a class of the style sheet."""
    return f"c{place % _NUM_COLOURS}"


def merged(values: Sequence[tuple[int, Sequence[float]]], width: int) -> tuple[list[str], list[list[float]]]:
    """Neighbouring refreshes added up until no more than MAX_COLUMNS are left: (labels, counts)."""
    size = max(1, -(-len(values) // MAX_COLUMNS))
    labels, counts = [], []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        labels.append(f"{part[0][0]}" if len(part) == 1 else f"{part[0][0]}–{part[-1][0]}")
        counts.append([sum(column[i] for _, column in part) for i in range(width)])
    return labels, counts


def table(rows: Sequence[Sequence[Content]], head: Sequence[Content] | None = None, *, class_: str) -> Html:
    """The first cell of a row names it."""
    titles = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else None
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    return tag("div", tag("table", titles, tag("tbody", body), class_=class_), class_="table")


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    if seconds < 120:
        return f"{number(seconds, 3)} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{number(minutes, 3)} min"
    return f"{number(minutes / 60, 3)} h"
