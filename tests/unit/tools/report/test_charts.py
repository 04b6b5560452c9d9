"""Charts contain the given values, and long lines are averaged."""

import sys
from typing import Any

import pytest

from megatron_rasft.errors import RasftError
from megatron_rasft.tools.report import charts
from megatron_rasft.tools.report.charts import (
    MAX_COLUMNS,
    MAX_POINTS,
    Chart,
    Part,
    Series,
    columns,
    line_chart,
    merged,
)
from tests.unit.tools.report.reading import lines_of


def draw(*lines: list[tuple[float, float]], **flags: bool) -> Chart:
    series = [Series(f"run {place}", f"run-{place}", points) for place, points in enumerate(lines)]
    chart = line_chart("Title", "unit", series, **flags)
    assert chart is not None
    return chart


def value_axis(chart: Chart) -> dict[str, Any]:
    axis: dict[str, Any] = chart.spec["layer"][0]["encoding"]["y"]
    return axis


def marks_of(chart: Chart) -> list[str]:
    marks = [layer["mark"] for layer in chart.spec["layer"]]
    return [mark if isinstance(mark, str) else mark["type"] for mark in marks]


def test_lines_hold_their_points() -> None:
    points = [(1, 0.5), (2, 3000.0), (4, 0.01)]
    assert lines_of(draw(points).spec) == {"Title": points}
    other = [(2, 1.0), (3, 2.0)]
    assert lines_of(draw(points, other).spec) == {"run 0": points, "run 1": other}


def test_long_line_is_averaged_and_keeps_its_extremes() -> None:
    points = [(float(step), float(step % 7)) for step in range(10_000)]
    points[5000] = (5000.0, 1000.0)
    data = draw(points).spec["data"]
    rows = [dict(zip(data["names"], row)) for row in data["rows"]]
    assert MAX_POINTS / 2 < len(rows) <= MAX_POINTS
    assert max(row["high0"] for row in rows) == 1000
    size = 34
    assert rows[0]["step"] == (size - 1) / 2
    assert rows[0]["value0"] == pytest.approx(sum(value for _, value in points[:size]) / size, rel=1e-5)
    assert marks_of(draw(points)) == ["area", "line", "rule"]
    assert marks_of(draw(points[:MAX_POINTS])) == ["line", "rule"]


def test_axis_is_logarithmic_only_over_a_wide_range() -> None:
    wide, narrow, with_zero = [(1, 0.02), (2, 500.0)], [(1, 1.0), (2, 20.0)], [(1, 0.0), (2, 20.0)]
    assert value_axis(draw(wide, may_be_log=True))["scale"] == {"type": "log", "domain": [0.01, 1000]}
    for points, may_be_log in ((wide, False), (narrow, True), (with_zero, True)):
        assert "type" not in value_axis(draw(points, may_be_log=may_be_log))["scale"]


def test_axis_of_shares_that_are_all_zero_has_a_height() -> None:
    assert value_axis(draw([(1, 0.0), (2, 0.0)], is_share=True))["scale"]["domain"] == [0, 0.1]


def test_columns_hold_counts_and_shares() -> None:
    parts = [Part("a", "run-0"), Part("b", "run-1")]
    chart = columns("Kinds", "step", ["0", "3"], parts, [[1, 3], [0, 2]], unit="things", is_share=True)
    assert chart is not None
    assert chart.spec["data"]["rows"] == [
        ["0", 0, "a", 1, 0.25],
        ["0", 1, "b", 3, 0.75],
        ["3", 1, "b", 2, 1.0],
    ]


def test_without_values_there_is_no_chart() -> None:
    assert line_chart("Nothing", "unit", [Series("a", "run-0", [])]) is None
    assert columns("Nothing", "step", ["0"], [Part("a", "run-0")], [[0]], unit="things") is None


def test_neighbouring_columns_are_added_up() -> None:
    values = [(step, [1.0, float(step)]) for step in range(100)]
    labels, counts = merged(values, 2)
    assert len(labels) == len(counts) == 34 <= MAX_COLUMNS
    assert (labels[0], counts[0]) == ("0–2", [3, 3])
    assert (labels[-1], counts[-1]) == ("99", [1, 99])


def test_colour_cannot_leave_its_style_attribute() -> None:
    assert charts.variable("verdict-x); background: url(//host)") == "var(--verdict-xbackgroundurlhost)"


def test_missing_chart_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(RasftError, match=r"pip install 'megatron-rasft\[report\]'"):
        charts.script.__wrapped__()
