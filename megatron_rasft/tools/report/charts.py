"""Drawings of numbers as inline SVG. Colours are the page's; what the pointer reads off is data beside the drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rasft.tools.report.markup import Content, Html, data, tag

WIDTH, HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 26, 36
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
MAX_POINTS = 300
"""More are averaged: a line shows no more than this many."""
_MARKED_POINTS = 40
"""A line of at most this many points shows each."""
_NUM_X_LABELS = 6
MAX_COLUMNS = 48

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line."""

    label: str
    colour: str
    """A class of the style sheet."""
    points: Sequence[Point]


@dataclass(frozen=True)
class Scale:
    """Values -> places along an axis of length 1."""

    low: float
    high: float
    ticks: list[float]
    is_log: bool = False

    def at(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_scale(low: float, high: float, num_ticks: int = 5) -> Scale:
    """Round steps of 1, 2 or 5 times a power of ten that hold ``low`` .. ``high``."""
    if high <= low:
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    return Scale(ticks[0], ticks[-1], ticks)


def log_scale(low: float, high: float) -> Scale:
    """Powers of ten that hold ``low`` .. ``high``, both > 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, round((last - first) / 5))
    return Scale(10.0**first, 10.0**last, [10.0**n for n in range(first, last + 1, every)], is_log=True)


def number(value: float, digits: int = 4) -> str:
    """A number as a reader wants it: no tail of zeros, thousands set apart, an exponent where it must be."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) >= 1e15 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def tick_label(value: float, is_share: bool) -> str:
    """A value at an axis."""
    if is_share:
        return f"{number(100 * value, 3)}%"
    if abs(value) < 1e-12:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (size > 1e3 and abs(value) >= size):
            return f"{number(value / size, 3)}{letter}"
    return number(value, 3)


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of neighbouring points, as many to each, at most ``limit`` of them."""
    size = max(1, -(-len(points) // limit))
    thin = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [y for _, y in part]
        x = part[-1][0] if size == 1 else (part[0][0] + part[-1][0]) / 2
        thin.append((x, sum(values) / len(values), min(values), max(values)))
    return thin


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    is_share: bool = False,
    may_be_log: bool = False,
    from_zero: bool = False,
) -> Html | None:
    """Lines over steps; None without any point.

    Of more than MAX_POINTS points neighbours are averaged, and a band holds the lowest and the highest of them.

    Args:
        title: of the figure.
        unit: of the values.
        series: the lines.
        is_share: values are shares, shown in percent.
        may_be_log: the axis is logarithmic if the values span more than a factor of 30.
        from_zero: the axis begins at 0.
    """
    lines = [(s, thinned(s.points)) for s in series if s.points]
    if not lines:
        return None
    xs = [x for _, points in lines for x, *_ in points]
    lows = [low for _, points in lines for *_, low, _ in points]
    highs = [high for _, points in lines for *_, high in points]
    x_scale = _step_scale(min(xs), max(xs))
    low, high = min(lows), max(highs)
    if may_be_log and low > 0 and high > 30 * low:
        y_scale = log_scale(low, high)
    else:
        y_scale = linear_scale(
            min(0.0, low) if from_zero or is_share else low, high if high or not is_share else 0.1
        )
    shapes: list[Content] = []
    sent = []
    for one, points in lines:
        places = [(_x(x_scale, x), _y(y_scale, y)) for x, y, *_ in points]
        if len(one.points) > len(points):
            top = [(px, _y(y_scale, high)) for (px, _), (*_, high) in zip(places, points)]
            bottom = [(px, _y(y_scale, low)) for (px, _), (_, _, low, _) in zip(places, points)]
            shapes.append(
                tag("polygon", points=_path([*top, *reversed(bottom)]), class_=f"band {one.colour}")
            )
        shapes.append(tag("polyline", points=_path(places), class_=f"line {one.colour}"))
        if len(points) <= _MARKED_POINTS:
            radius = 2.5 if len(points) > 1 else 4
            shapes += [
                tag("circle", cx=px, cy=py, r=radius, class_=f"mark {one.colour}") for px, py in places
            ]
        values = [
            [round(px, 1), round(py, 1), x, float(f"{y:.5g}")] for (px, py), (x, y, *_) in zip(places, points)
        ]
        sent.append({"label": one.label, "colour": one.colour, "points": values})
    axes = [*_y_axis(y_scale, unit + (", log scale" if y_scale.is_log else ""), is_share), *_x_axis(x_scale)]
    chart = _svg(f"{title}, {unit}", [*axes, *shapes, tag("g", class_="pointer")])
    return _figure(
        title,
        chart,
        data({"share": is_share, "series": sent}, class_="points"),
        class_="chart lines",
    )


def columns(
    title: str,
    x_label: str,
    labels: Sequence[str],
    parts: Sequence[tuple[str, str]],
    counts: Sequence[Sequence[float]],
    *,
    unit: str,
    is_share: bool = False,
) -> Html | None:
    """Stacked columns; None without any count.

    Args:
        title: of the figure.
        x_label: what the columns stand for.
        labels: one for each column.
        parts: (name, class of the style sheet) of each part of a column, from the bottom.
        counts: [columns][parts].
        unit: of the counts.
        is_share: each column is shown as shares of its sum.
    """
    sums = [sum(column) for column in counts]
    if not any(sums):
        return None
    scale = Scale(0, 1, [0, 0.25, 0.5, 0.75, 1]) if is_share else linear_scale(0, max(sums))
    width = _PLOT_WIDTH / len(counts)
    gap = min(2.0, width * 0.15)
    shapes: list[Content] = []
    for place, (column, total) in enumerate(zip(counts, sums)):
        base = 0.0
        for (name, colour), count in zip(parts, column):
            if not count:
                continue
            size = count / total if is_share else count
            top, bottom = _y(scale, base + size), _y(scale, base)
            base += size
            said = f"{labels[place]}: {name} {number(count)} of {number(total)} ({count / total:.1%})"
            shapes.append(
                tag(
                    "rect",
                    tag("title", said),
                    x=_LEFT + place * width + gap / 2,
                    y=top,
                    width=max(0.5, width - gap),
                    height=max(0.0, bottom - top),
                    class_=f"part {colour}",
                )
            )
    every = max(1, -(-len(labels) // _NUM_X_LABELS))
    ticks: list[Content] = [
        tag("text", label, x=_LEFT + (place + 0.5) * width, y=HEIGHT - _BOTTOM + 15, class_="tick middle")
        for place, label in enumerate(labels)
        if place % every == 0
    ]
    axes = [*_y_axis(scale, unit, is_share), *ticks, _x_title(x_label)]
    chart = _svg(f"{title}, {unit}", [*axes, *shapes])
    return _figure(title, legend(parts), chart, class_="chart")


def strip(parts: Sequence[tuple[str, str, float, str]]) -> Html:
    """One bar in parts: (name, class of the style sheet, size, what it says)."""
    total = sum(size for _, _, size, _ in parts) or 1.0
    left, shapes = 0.0, []
    for name, colour, size, said in parts:
        share = 1000 * size / total
        shapes.append(
            tag(
                "rect",
                tag("title", f"{name}: {said}"),
                x=left,
                y=0,
                width=share,
                height=14,
                class_=f"part {colour}",
            )
        )
        left += share
    return tag("svg", shapes, viewBox="0 0 1000 14", preserveAspectRatio="none", class_="strip", role="img")


def legend(parts: Sequence[tuple[str, str]]) -> Html:
    """Names beside their colours."""
    return tag("div", [tag("span", swatch(colour), name) for name, colour in parts], class_="legend")


def swatch(colour: str) -> Html:
    """A spot of colour."""
    spot = tag("rect", x=0, y=0, width=10, height=10, rx=2, class_=f"part {colour}")
    return tag("svg", spot, viewBox="0 0 10 10", class_="swatch", aria_hidden="true")


def _figure(title: str, *content: Content, class_: str) -> Html:
    return tag("figure", tag("figcaption", title), *content, class_=class_)


def _svg(title: str, content: Content) -> Html:
    return tag("svg", content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)


def _step_scale(low: float, high: float) -> Scale:
    """Steps are whole numbers, and the plot ends where they end."""
    if high <= low:
        return Scale(low - 1, low + 1, [low])
    ticks = [t for t in linear_scale(low, high, _NUM_X_LABELS).ticks if low <= t <= high and t == round(t)]
    return Scale(low, high, ticks or [low, high])


def _x(scale: Scale, value: float) -> float:
    return _LEFT + 6 + scale.at(value) * (_PLOT_WIDTH - 12)


def _y(scale: Scale, value: float) -> float:
    return _TOP + (1 - scale.at(value)) * _PLOT_HEIGHT


def _path(places: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _y_axis(scale: Scale, unit: str, is_share: bool) -> list[Content]:
    parts: list[Content] = [tag("text", unit, x=0, y=10, class_="unit")]
    for tick in scale.ticks:
        y = _y(scale, tick)
        base = " base" if tick == scale.ticks[0] else ""
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_=f"grid{base}"))
        parts.append(tag("text", tick_label(tick, is_share), x=_LEFT - 6, y=y + 3.5, class_="tick end"))
    return parts


def _x_axis(scale: Scale) -> list[Content]:
    parts: list[Content] = []
    for tick in scale.ticks:
        x = _x(scale, tick)
        parts.append(
            tag("line", x1=x, x2=x, y1=HEIGHT - _BOTTOM, y2=HEIGHT - _BOTTOM + 3, class_="grid base")
        )
        parts.append(tag("text", tick_label(tick, False), x=x, y=HEIGHT - _BOTTOM + 15, class_="tick middle"))
    return [*parts, _x_title("step")]


def _x_title(text: str) -> Html:
    return tag("text", text, x=WIDTH - _RIGHT, y=HEIGHT - 4, class_="unit end")
