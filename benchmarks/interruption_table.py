"""Reads the results of interrupted rounds, counts them, and prints them as a table."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.interruptions import Outcome

Line = dict[str, Any]
"""A line of --results: the fields of ``Result``."""


def known_results(file: Path | None) -> dict[int, Line]:
    """Reads the results of an earlier call: number of a round -> its line.

    Raises:
        ValueError: a line is not a result.
    """
    if file is None or not file.exists():
        return {}
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            found[values["round"]["number"]] = values
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--results {file}, line {number} is not the result of a round. Remove the line, or name another file."
            ) from error
    return found


def summary(results: Sequence[Line]) -> str:
    """Returns the counts of the outcomes, and the times to the first new step."""
    counts = Counter(result["outcome"] for result in results)
    shown = ", ".join(f"{counts[name]} {name}" for name in get_args(Outcome))
    line = f"{len(results)} rounds: {shown}"
    if times := _times(results):
        line += (
            f"; first new step after {statistics.median(times):.1f} s (median), {max(times):.1f} s (longest)"
        )
    return line


def _times(results: Sequence[Line]) -> list[float]:
    return [time_s for result in results if (time_s := result["first_step_s"]) is not None]


_GROUPS: tuple[Callable[[Line], str], ...] = (
    lambda round_: "all",
    lambda round_: f"{round_['num_processes']} process{'' if round_['num_processes'] == 1 else 'es'}",
    lambda round_: f"SIG{round_['signal']} to {'all' if round_['hits_all'] else 'one'}",
    lambda round_: round_["moment"],
)
"""Parts of a round. Each value of a part has a line in the table."""


def table(results: Sequence[Line]) -> str:
    """Returns a Markdown table with the outcomes of all rounds, and by processes, signal and moment."""
    heads = ["rounds", "number", *get_args(Outcome), "first new step, s (median)", "(longest)"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for part in _GROUPS:
        for value in sorted({part(result["round"]) for result in results}):
            chosen = [result for result in results if part(result["round"]) == value]
            lines.append([value, *_cells(chosen)])
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  ", "| ") for cells in lines)


def _cells(results: Sequence[Line]) -> list[str]:
    counts = Counter(result["outcome"] for result in results)
    times = _times(results)
    measured = [f"{statistics.median(times):.1f}", f"{max(times):.1f}"] if times else ["", ""]
    return [str(len(results)), *(str(counts[name]) for name in get_args(Outcome)), *measured]
