"""Section "Problems": the solve rate s of each problem, and how it changes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_rasft.tools.report.charts import Chart, Part, columns, merged
from megatron_rasft.tools.report.rollouts import COURSES, OUTCOMES, Course, Outcome, course_of, moves
from megatron_rasft.tools.report.views import RunView

_CLASSES = (
    Part("s = 0", "solved-none"),
    Part("0 < s ≤ ½", "solved-few"),
    Part("½ < s < 1", "solved-most"),
    Part("s = 1", "solved-all"),
)
_BINS = (("0", 0), ("0–¼", 1), ("¼–½", 1), ("½–¾", 2), ("¾–1", 2), ("1", 3))
"""(label, index in _CLASSES) of the histogram's columns. Inner bins include their upper bound, but neither 0 nor 1."""
_LISTED_COURSES: tuple[Course, ...] = ("never solved", "lost", "newly solved")
_MAX_IDS = 200
"""Maximum number of problem ids listed for a course."""


def problems(view: RunView) -> dict[str, Any]:
    """Returns charts of the solve rate by refresh, and tables of how it changed from first to last sampling.

    The result has no charts if no sample was verified.
    """
    if view.rollouts is None or not view.rollouts.refreshes:
        return {"charts": [], "has_rollouts": False}
    histories = view.rollouts.histories()
    if not histories:
        return {"charts": [], "has_rollouts": True}
    courses: dict[Course, list[str]] = {course: [] for course in COURSES}
    for problem_id, history in histories.items():
        courses[course_of(history)].append(problem_id)
    num_resampled = sum(len(history) > 1 for history in histories.values())
    firsts = [history[0][1].solve_rate for history in histories.values()]
    lasts = [history[-1][1].solve_rate for history in histories.values()]
    charts = [_by_refresh(view)]
    if num_resampled:
        charts += [
            _histogram("Solve rate when first sampled", firsts),
            _histogram("Solve rate when last sampled", lasts),
        ]
    else:
        charts.append(_histogram("Solve rate", firsts))
    return {
        "charts": [chart for chart in charts if chart is not None],
        "num_problems": len(histories),
        "num_resampled": num_resampled,
        "courses": [
            (course, COURSES[course], len(ids), len(ids) / len(histories)) for course, ids in courses.items()
        ],
        "outcomes": OUTCOMES,
        "moves": _moves(moves(histories.values())),
        "listed": [
            (course, len(courses[course]), courses[course][:_MAX_IDS])
            for course in _LISTED_COURSES
            if courses[course]
        ],
    }


def _by_refresh(view: RunView) -> Chart | None:
    assert view.rollouts is not None, "problems() checked that rollouts are stored"
    counted = []
    for step, refresh in view.rollouts.refreshes.items():
        bins = _count_bins(visit.solve_rate for visit in refresh.visits.values())
        counted.append(
            (step, [sum(n for n, (_, c) in zip(bins, _BINS) if c == place) for place in range(len(_CLASSES))])
        )
    labels, counts = merged(counted, len(_CLASSES))
    return columns(
        "Solve rate by refresh",
        "step of the refresh",
        labels,
        _CLASSES,
        counts,
        unit="share of problems",
        is_share=True,
    )


def _histogram(title: str, values: Sequence[float | None]) -> Chart | None:
    counts = [
        [count if place == class_ else 0 for place in range(len(_CLASSES))]
        for count, (_, class_) in zip(_count_bins(values), _BINS)
    ]
    labels = [label for label, _ in _BINS]
    return columns(title, "s, upper bounds included", labels, _CLASSES, counts, unit="problems")


def _count_bins(values: Iterable[float | None]) -> list[int]:
    """Counts the problems in each of _BINS. Problems without an attempt, whose s is None, are not counted."""
    counts = [0] * len(_BINS)
    for s in values:
        if s is not None:
            counts[0 if s == 0 else 5 if s == 1 else 1 + sum(s > bound for bound in (0.25, 0.5, 0.75))] += 1
    return counts


def _moves(
    counts: Mapping[tuple[Outcome, Outcome], int],
) -> list[tuple[Outcome, list[tuple[int, float, str]]]]:
    """Rows by first outcome: (number, share, better, worse or same) by last outcome. Empty if no problem was sampled twice."""
    total = sum(counts.values())
    if not total:
        return []
    rows = []
    for row, first in enumerate(OUTCOMES):
        cells = []
        for column, last in enumerate(OUTCOMES):
            count = counts.get((first, last), 0)
            direction = "better" if column > row else "worse" if column < row else "same"
            cells.append((count, count / total, direction if count else "same"))
        rows.append((first, cells))
    return rows
