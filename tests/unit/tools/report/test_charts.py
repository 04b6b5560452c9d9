"""Axes that hold what they show, and numbers as a reader wants them."""

import math

import pytest

from megatron_rasft.tools.report.charts import (
    MAX_POINTS,
    Series,
    columns,
    line_chart,
    linear_scale,
    log_scale,
    number,
    thinned,
    tick_label,
)
from tests.unit.tools.report.reading import Page


@pytest.mark.parametrize(
    "low,high", [(0, 1), (0.13, 0.44), (-3, 7), (1e-7, 3e-5), (5, 5), (0, 0), (990, 1010)]
)
def test_axis_holds_its_values_between_round_ticks(low: float, high: float) -> None:
    scale = linear_scale(low, high)
    assert scale.low <= low and high <= scale.high
    assert 3 <= len(scale.ticks) <= 8
    assert 0 <= scale.at(low) <= scale.at(high) <= 1
    step = scale.ticks[1] - scale.ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in (1, 2, 5)
    logarithmic = log_scale(low, high) if low > 0 else None
    if logarithmic is not None:
        assert 0 <= logarithmic.at(low) <= logarithmic.at(high) <= 1


@pytest.mark.parametrize(
    "value,text",
    [
        (0, "0"),
        (0.125, "0.125"),
        (1.5e-05, "1.5e-5"),
        (1234567, "1,234,567"),
        (12.3456, "12.35"),
        (-2.0, "-2"),
        (100, "100"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    "value,is_share,text",
    [(0.25, True, "25%"), (15000, False, "15k"), (2e6, False, "2M"), (1500, False, "1,500")],
)
def test_ticks_are_shorter(value: float, is_share: bool, text: str) -> None:
    assert tick_label(value, is_share) == text


def test_long_lines_are_averaged_and_keep_their_extremes() -> None:
    points = [(float(step), float(step % 7)) for step in range(10_000)]
    points[5000] = (5000.0, 1000.0)
    thin = thinned(points)
    assert MAX_POINTS / 2 < len(thin) <= MAX_POINTS
    assert max(high for *_, high in thin) == 1000
    size = 34
    assert thin[0][1] == sum(y for _, y in points[:size]) / size
    assert thinned(points[:10]) == [(x, y, y, y) for x, y in points[:10]]


def test_line_chart_lies_within_its_drawing() -> None:
    points = [(1, 0.5), (2, 3000.0), (3, 0.01)]
    drawn = line_chart("Gradient", "norm", [Series("a", "c0", points)], may_be_log=True)
    page = Page(f"<main>{drawn}</main>")
    (series,) = page.lines["Gradient"]
    assert [(x, y) for _, _, x, y in series["points"]] == points
    assert "log scale" in page.text
    width, height = map(int, (page.tags("svg")[0]["viewbox"] or "").split()[2:])
    assert all(0 < px < width and 0 < py < height for px, py, *_ in series["points"])
    heights = [py for _, py, *_ in series["points"]]
    assert heights[1] < heights[0] < heights[2]
    assert line_chart("Nothing", "units", [Series("a", "c0", [])]) is None


def test_columns_stand_on_each_other() -> None:
    drawn = columns(
        "Kinds",
        "step",
        ["0", "3"],
        [("a", "c0"), ("b", "c1")],
        [[1, 3], [0, 2]],
        unit="things",
        is_share=True,
    )
    page = Page(f"<main>{drawn}</main>")
    rects = [r for r in page.tags("rect") if r["class"] in ("part c0", "part c1") and r["width"] != "10"]
    heights = [float(r["height"] or 0) for r in rects]
    assert heights[0] * 3 == pytest.approx(heights[1], rel=1e-3)
    assert heights[0] + heights[1] == pytest.approx(heights[2], rel=1e-3)
    assert page.texts["title"] == ["0: a 1 of 4 (25.0%)", "0: b 3 of 4 (75.0%)", "3: b 2 of 2 (100.0%)"]
    assert columns("None", "step", ["0"], [("a", "c0")], [[0]], unit="things") is None
