"""Charts as Vega-Lite specifications, which the page draws with the script of the package vl-convert-python.

Specifications map values to marks. The style of the marks and axes is set in page.js. Colours are names of the style sheet's
variables, so that the charts follow the page's light and dark themes.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rasft.errors import RasftError

MAX_POINTS = 300
"""Maximum number of points of a line. Longer lines are averaged over equal ranges of steps."""
MAX_COLUMNS = 48
"""Maximum number of columns of a chart. ``merged`` adds up neighbouring columns if there are more."""
_MAX_MARKED_POINTS = 40
"""A line with at most this many points is drawn with a dot at each point."""
_MIN_LOG_SPAN = 30
"""An axis is logarithmic if the ratio of highest to lowest value is at least this."""
_NUM_TICKS = 5
_DASHES: tuple[Sequence[float], ...] = ([], [7, 2], [3, 2], [8, 2, 2, 2], [1.5, 2], [5, 4], [10, 3], [])
"""One dash pattern for each colour of ``run_colour``, to distinguish runs without colours."""

Spec = dict[str, Any]
Point = tuple[float, float]
Cell = float | str | None


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    colour: str
    points: Sequence[Point]
    """Points of the line: (step, value)."""
    dash: Sequence[float] = ()
    """Lengths of strokes and gaps in pixels; empty for a solid line."""


@dataclass(frozen=True)
class Part:
    """One colour of stacked columns."""

    label: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    title: str
    unit: str
    """Unit of the values, printed below the title."""
    spec: Spec
    """Vega-Lite specification with its data."""
    legend: Sequence[Part] = ()


@functools.cache
def script() -> str:
    """Returns the JavaScript of Vega, Vega-Lite and Vega-Embed, which loads no other files and defines ``vegaEmbed``.

    Raises:
        RasftError: vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise RasftError(
            "the charts need the package vl-convert-python. Install it by: pip install 'megatron-rasft[report]'"
        ) from error
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def run_colour(place: int) -> str:
    """Returns the colour of the run at this place among the command's arguments. Colours repeat after eight runs."""
    return f"run-{place % len(_DASHES)}"


def run_dash(place: int) -> Sequence[float]:
    """Returns the dash pattern of the run at this place among the command's arguments."""
    return _DASHES[place % len(_DASHES)]


def variable(colour: str) -> str:
    """Returns the CSS value of a colour. Removes special characters: the name may hold a verdict read from a file."""
    return f"var(--{re.sub(r'[^a-z0-9-]', '', colour)})"


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    is_share: bool = False,
    may_be_log: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """Draws lines over steps. Returns None if no line has a point.

    Lines with more than MAX_POINTS points are averaged, and a band shows each average's lowest and highest value.

    Args:
        title: title of the figure.
        unit: unit of the values.
        series: the lines.
        is_share: whether values are shares of 1, printed in percent.
        may_be_log: whether the axis is logarithmic if the values span more than a factor of 30.
        from_zero: whether the axis begins at 0.
    """
    shown = [one for one in series if one.points]
    if not shown:
        return None
    values = [value for one in shown for _, value in one.points]
    low, high = min(values), max(values)
    is_log = may_be_log and low > 0 and high > _MIN_LOG_SPAN * low
    axis = _log_axis(low, high) if is_log else _linear_axis(low, high, is_share, from_zero or is_share)
    rows = _averaged([one.points for one in shown])
    is_averaged = len(rows) < len({step for one in shown for step, _ in one.points})
    names = [f"{name}{place}" for place in range(len(shown)) for name in ("value", "low", "high")]
    number_format = ".1%" if is_share else ".3~e" if 0 < high < 1e-3 else ",.5~r"
    layers = [_line(place, one, axis, len(rows)) for place, one in enumerate(shown)]
    if is_averaged:
        layers = [*(_band(place, one, axis) for place, one in enumerate(shown)), *layers]
    labels = [one.label if len(series) > 1 else title for one in shown]
    spec = {
        "data": _table(["step", *names], rows),
        "encoding": {"x": _step_axis([row[0] for row in rows])},
        "layer": [*layers, _pointer(labels, number_format)],
    }
    return Chart(title, unit + (", log scale" if is_log else ""), spec)


def columns(
    title: str,
    x_label: str,
    labels: Sequence[str],
    parts: Sequence[Part],
    counts: Sequence[Sequence[float]],
    *,
    unit: str,
    is_share: bool = False,
) -> Chart | None:
    """Draws stacked columns. Returns None if all counts are 0.

    Args:
        title: title of the figure.
        x_label: title of the horizontal axis.
        labels: name of each column.
        parts: the parts of each column, from the bottom up.
        counts: [columns][parts] sizes of the parts.
        unit: unit of the counts.
        is_share: whether each column is drawn in percent of its sum.
    """
    sums = [sum(column) for column in counts]
    if not any(sums):
        return None
    rows: list[list[Cell]] = [
        [label, place, part.label, count, count / total]
        for label, column, total in zip(labels, counts, sums)
        for place, (part, count) in enumerate(zip(parts, column))
        if count
    ]
    colours = {"domain": [part.label for part in parts], "range": [variable(part.colour) for part in parts]}
    ticks = {"labelAngle": 0, "labelOverlap": "parity", "labelSeparation": 8, "ticks": False}
    spec = {
        "data": _table(["column", "place", "part", "count", "share"], rows),
        "mark": "bar",
        "encoding": {
            "x": {
                "field": "column",
                "type": "ordinal",
                "axis": {"title": x_label, **ticks},
                "scale": {"domain": list(labels), "paddingInner": 0.1, "paddingOuter": 0.05},
            },
            "y": _number(
                "count",
                stack="normalize" if is_share else "zero",
                axis={"tickCount": _NUM_TICKS, **_tick_format(max(sums), is_share)},
                scale={"nice": _NUM_TICKS},
            ),
            "color": {"field": "part", "type": "nominal", "scale": colours},
            "order": _number("place"),
            "tooltip": [
                {"field": "column", "type": "nominal", "title": x_label},
                {"field": "part", "type": "nominal", "title": "part"},
                _number("count", title="count", format=","),
                _number("share", title="share of the column", format=".1%"),
            ],
        },
    }
    return Chart(title, unit, spec, parts)


def merged(values: Sequence[tuple[int, Sequence[float]]], width: int) -> tuple[list[str], list[list[float]]]:
    """Adds up neighbouring refreshes until at most MAX_COLUMNS columns are left.

    Args:
        values: (step of the refresh, ``width`` counts), in order.
        width: number of counts of a refresh.

    Returns:
        Labels of the columns, and their counts.
    """
    size = max(1, -(-len(values) // MAX_COLUMNS))
    labels, counts = [], []
    for part in itertools.batched(values, size):
        labels.append(f"{part[0][0]}" if len(part) == 1 else f"{part[0][0]}–{part[-1][0]}")
        counts.append([sum(column[i] for _, column in part) for i in range(width)])
    return labels, counts


def _averaged(lines: Sequence[Sequence[Point]]) -> list[list[Cell]]:
    """Averages lines over at most MAX_POINTS ranges of steps of equal length.

    Returns:
        Rows of the middle step, then mean, lowest and highest value of each line, or None if it has no point there.
    """
    steps = sorted({step for points in lines for step, _ in points})
    size = max(1, -(-len(steps) // MAX_POINTS))
    values = [dict(points) for points in lines]
    rows: list[list[Cell]] = []
    for part in itertools.batched(steps, size):
        row: list[Cell] = [(part[0] + part[-1]) / 2]
        for line in values:
            found = [line[step] for step in part if step in line]
            row += [sum(found) / len(found), min(found), max(found)] if found else [None, None, None]
        rows.append(row)
    return rows


def _table(names: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Spec:
    """Data of a chart as rows, which page.js turns into objects. As JSON, objects would be three times as long."""
    return {"names": names, "rows": [[_rounded(cell) for cell in row] for row in rows]}


def _rounded(cell: Cell) -> Cell:
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


def _number(field: str, **properties: Any) -> Spec:
    """Channel of a specification that shows a numeric column of the data."""
    return {"field": field, "type": "quantitative", **properties}


def _step_axis(steps: Sequence[Any]) -> Spec:
    low, high = min(steps), max(steps)
    domain = [low, high] if low < high else [low - 1, low + 1]
    axis = {"title": "step", "tickMinStep": 1, "tickCount": _NUM_TICKS + 1, "format": ",d", "grid": False}
    return _number("step", axis=axis, scale={"domain": domain, "nice": False, "padding": 6})


def _linear_axis(low: float, high: float, is_share: bool, from_zero: bool) -> Spec:
    # A scale of height 0 has no ticks: a share that is always 0 is drawn below 10 %.
    domain = {"domain": [0, 0.1]} if is_share and low == high == 0 else {}
    axis = {"tickCount": _NUM_TICKS, **_tick_format(high, is_share)}
    return {"axis": axis, "scale": {"zero": from_zero, "nice": _NUM_TICKS, **domain}}


def _log_axis(low: float, high: float) -> Spec:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Vega's own ticks would include 2, 3, ... 9 times each power.
    ticks = [10.0**power for power in powers[:: max(1, len(powers) // _NUM_TICKS)]]
    scale = {"type": "log", "domain": [10.0 ** powers[0], 10.0 ** powers[-1]]}
    return {"axis": {"values": ticks, "format": "~g"}, "scale": scale}


def _line(place: int, one: Series, axis: Spec, num_points: int) -> Spec:
    mark: Spec = {"type": "line", "color": variable(one.colour), "strokeDash": list(one.dash)}
    if num_points <= _MAX_MARKED_POINTS:
        mark["point"] = {"color": variable(one.colour)}
    return {"mark": mark, "encoding": {"y": _number(f"value{place}", **axis)}}


def _band(place: int, one: Series, axis: Spec) -> Spec:
    """Area from the lowest to the highest value of each average."""
    ends = {"y": _number(f"low{place}", **axis), "y2": {"field": f"high{place}"}}
    return {"mark": {"type": "area", "color": variable(one.colour)}, "encoding": ends}


def _pointer(labels: Sequence[str], number_format: str) -> Spec:
    """A rule at the step nearest to the pointer, with a tooltip of the values there."""
    values = [
        _number(f"value{place}", title=label, format=number_format) for place, label in enumerate(labels)
    ]
    select = {
        "type": "point",
        "on": "pointermove",
        "clear": "pointerout",
        "nearest": True,
        "encodings": ["x"],
    }
    return {
        "mark": "rule",
        "params": [{"name": "nearest", "select": select}],
        "encoding": {
            "opacity": {"condition": {"param": "nearest", "empty": False, "value": 1}, "value": 0},
            "tooltip": [_number("step", title="step", format=",.0f"), *values],
        },
    }


def _tick_format(high: float, is_share: bool) -> Spec:
    """Format of an axis' ticks in D3's notation. D3's default prints all digits of 10,000,000 and 0.00001."""
    if is_share:
        return {"format": ".3~%"}
    return {"format": "~s"} if high >= 1e4 else {"format": ".2~e"} if 0 < high < 1e-3 else {}
