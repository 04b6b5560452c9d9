"""How many of a problem's samples are right, and how that moves."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rasft.tools.report.charts import columns
from megatron_rasft.tools.report.markup import Content, Html, tag
from megatron_rasft.tools.report.rollouts import COURSES, OUTCOMES, Course, Outcome, course_of, moves
from megatron_rasft.tools.report.views import RunView, merged, table

_OF_S = (("s = 0", "s0"), ("0 < s ≤ ½", "s1"), ("½ < s < 1", "s2"), ("s = 1", "s3"))
_MAX_IDS = 200


def solvability(view: RunView) -> Content:
    """How often the problems of a run are solved, by refresh and from first to last."""
    if view.rollouts is None or not view.rollouts.refreshes:
        return tag("p", "No rollouts: how problems are solved is not known.", class_="missing")
    histories = view.rollouts.histories()
    if not histories:
        return tag("p", "No sample was verified: how problems are solved is not known.", class_="missing")
    by_refresh = []
    for step, refresh in view.rollouts.refreshes.items():
        by_refresh.append((step, _classes_of_s(v.solvability for v in refresh.visits.values())))
    labels, counts = merged(by_refresh, len(_OF_S))
    most = max(len(history) for history in histories.values())
    first = _histogram_of_s([history[0][1].solvability for history in histories.values()])
    last = _histogram_of_s([history[-1][1].solvability for history in histories.values()])
    charts = [
        columns(
            "Solvability by refresh",
            "step of the refresh",
            labels,
            _OF_S,
            counts,
            unit="share of problems",
            is_share=True,
        ),
        _columns_of_s("Solvability when first sampled" if most > 1 else "Solvability", first),
        _columns_of_s("Solvability when last sampled", last) if most > 1 else None,
    ]
    again = sum(len(history) > 1 for history in histories.values())
    text = (
        f"s is the share of a problem's samples at one refresh that are correct and complete; aborted samples and those on "
        f"which the grader ran out of time do not count. {len(histories):,} problems were sampled, {again:,} of them at two "
        "refreshes or more."
    )
    courses: dict[Course, list[str]] = {course: [] for course in COURSES}
    for problem_id, history in histories.items():
        courses[course_of(history)].append(problem_id)
    return [
        tag("p", text),
        tag("div", charts, class_="grid"),
        tag(
            "div",
            tag("div", tag("h4", "What became of the problems"), _courses(courses, len(histories))),
            tag("div", tag("h4", "First sampled → last sampled"), _moves(moves(histories.values()))),
            class_="grid wide",
        ),
        [_ids(course, courses[course]) for course in ("never solved", "lost", "newly solved")],
    ]


def _classes_of_s(values: Any) -> list[float]:
    counts = [0.0] * len(_OF_S)
    for s in values:
        if s is not None:
            counts[0 if s == 0 else 3 if s == 1 else 1 if s <= 0.5 else 2] += 1
    return counts


_S_BINS = ("0", "0–¼", "¼–½", "½–¾", "¾–1", "1")


def _histogram_of_s(values: Sequence[float | None]) -> list[int]:
    """Problems with s of 0, up to a quarter, a half, three quarters, below 1, and 1."""
    counts = [0] * len(_S_BINS)
    for s in values:
        if s is not None:
            place = 0 if s == 0 else 5 if s == 1 else 1 + sum(s > bound for bound in (0.25, 0.5, 0.75))
            counts[place] += 1
    return counts


def _columns_of_s(title: str, counts: Sequence[int]) -> Html | None:
    colour = ("s0", "s1", "s1", "s2", "s2", "s3")
    parts = list(dict.fromkeys(colour))
    names = {part: name for name, part in _OF_S}
    stacked = [
        [count if part == colour[place] else 0 for part in parts] for place, count in enumerate(counts)
    ]
    return columns(
        title, "s, upper bounds included", _S_BINS, [(names[p], p) for p in parts], stacked, unit="problems"
    )


def _courses(courses: Mapping[Course, Sequence[str]], total: int) -> Html:
    rows = [
        [tag("b", course), COURSES[course], f"{len(ids):,}", f"{len(ids) / total:.1%}"]
        for course, ids in courses.items()
    ]
    return table(rows, ["", "", "problems", "share"], class_="numbers said")


def _moves(counts: Mapping[tuple[Outcome, Outcome], int]) -> Html:
    """A table whose rows are where problems began and whose columns are where they ended."""
    total = sum(counts.values())
    if not total:
        return tag("p", "No problem was sampled at two refreshes: nothing has moved yet.", class_="missing")
    rows: list[list[Content]] = []
    for first in OUTCOMES:
        row: list[Content] = [first]
        for last in OUTCOMES:
            count = counts.get((first, last), 0)
            better, worse = (
                OUTCOMES.index(last) > OUTCOMES.index(first),
                OUTCOMES.index(last) < OUTCOMES.index(first),
            )
            class_ = "better" if better and count else "worse" if worse and count else "same"
            row.append(tag("span", f"{count:,} ({count / total:.1%})", class_=class_))
        rows.append(row)
    return table(rows, ["first ↓  last →", *OUTCOMES], class_="numbers moves")


def _ids(course: Course, ids: Sequence[str]) -> Html | None:
    if not ids:
        return None
    shown = ids[:_MAX_IDS]
    count = f"{len(ids):,}" if len(shown) == len(ids) else f"the first {len(shown)} of {len(ids):,}"
    listed = tag("p", [[tag("code", i), " "] for i in shown], class_="ids")
    return tag("details", tag("summary", f"Problems {course}: {count}"), listed)
