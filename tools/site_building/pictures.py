"""Draws the pictures of README and docs/method.md, each for a light and a dark page: python -m tools.site_building.pictures

The numbers in the pictures are those of the method's own functions with their default flags.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rasft.objective.weighting import (
    WeightingConfig,
    demonstration_weight,
    estimate_solvability,
    neutral_solvability,
    rollout_total,
)

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
WEIGHTING = WeightingConfig()


@dataclass(frozen=True, kw_only=True)
class Colors:
    """The colours of a page."""

    text: str
    faint: str
    box: str
    right: str
    wrong: str
    demonstration: str
    own: str


THEMES = {
    "light": Colors(
        text="#1f2328",
        faint="#8c959f",
        box="#f3f5f8",
        right="#1a7f37",
        wrong="#cf222e",
        demonstration="#0969da",
        own="#2da44e",
    ),
    "dark": Colors(
        text="#e6edf3",
        faint="#7d8590",
        box="#1c2128",
        right="#3fb950",
        wrong="#f85149",
        demonstration="#4493f8",
        own="#3fb950",
    ),
}
STAGES = (
    ("1 sample", "the policy answers each", "problem n times"),
    ("2 verify", "workers that can be", "killed grade them"),
    ("3 weigh", "demonstration and own solutions", "by the share of correct ones, s"),
    ("4 compare", "clipped ratio to the", "frozen reference"),
    ("5 train", "the next steps, on", "Megatron-Core"),
)
EDGES = (20, 195, 365, 645, 805, 960)
"""Left edges of the stages, and the right edge of the last one."""
EXAMPLES = (("never solved", 0), ("sometimes solved", 2), ("always solved", 4))
NUM_SAMPLES = 4
LESSONS = ("imitate more", "learn from both", "keep own solutions")


def text(
    x: float, y: float, words: str, color: str, *, size: int = 13, anchor: str = "start", bold: bool = False
) -> str:
    """A line of text that starts, ends or is centred at (x, y)."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, color: str, *, radius: int = 2) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{radius}" fill="{color}"/>'
    )


def line(points: str, color: str, *, width: float = 1.5, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{points}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashes}/>'


def page(width: int, height: int, title: str, parts: Iterator[str]) -> str:
    """A complete SVG file."""
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    font = 'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
    return "\n".join([f"{start} {font}>", f"<title>{title}</title>", *parts, "</svg>\n"])


def refresh(colors: Colors) -> str:
    """The five stages of a refresh, and three problems that go through them."""
    return page(980, 330, "One refresh of RASFT", _refresh(colors))


def _refresh(c: Colors) -> Iterator[str]:
    yield from _return_arrow(c)
    for (title, *captions), left, right in zip(STAGES, EDGES, EDGES[1:], strict=False):
        yield box(left, 48, right - left - 14, 62, c.box, radius=8)
        yield text(left + 10, 68, title, c.text, size=14, bold=True)
        for row, caption in enumerate(captions):
            yield text(left + 10, 86 + 16 * row, caption, c.faint, size=11)
        if right != EDGES[-1]:
            yield text(right - 7, 84, "›", c.text, size=18, anchor="middle")
    yield text(EDGES[2] + 10, 136, "demonstration", c.demonstration, size=12)
    yield text(EDGES[2] + 150, 136, "own correct rollouts", c.own, size=12)
    for row, ((name, num_correct), lesson) in enumerate(zip(EXAMPLES, LESSONS, strict=True)):
        yield from _problem(c, 172 + 56 * row, name, num_correct, lesson)
    note = f"n = {NUM_SAMPLES}, default weights. An unsampled problem has a demonstration of weight 1. s is smoothed over refreshes."
    yield text(EDGES[0] + 10, 318, note, c.faint, size=11)


def _return_arrow(c: Colors) -> Iterator[str]:
    left, right = EDGES[0] + 80, EDGES[4] + 70
    yield line(f"M{right} 44 V28 H{left} V40", c.faint)
    yield f'<path d="M{left - 5} 38 h10 l-5 8 z" fill="{c.faint}"/>'
    yield text(
        (left + right) / 2, 20, "next refresh: the new weights sample", c.faint, size=12, anchor="middle"
    )


def _problem(c: Colors, y: int, name: str, num_correct: int, lesson: str) -> Iterator[str]:
    solvability = estimate_solvability(num_correct, NUM_SAMPLES, WEIGHTING)
    assert solvability is not None, "a sampled problem has a solvability"
    yield text(EDGES[0] + 10, y + 5, name, c.text)
    for sample in range(NUM_SAMPLES):
        is_right = sample < num_correct
        yield f'<circle cx="{EDGES[1] + 20 + 30 * sample}" cy="{y}" r="11" fill="{c.right if is_right else c.wrong}"/>'
        yield text(
            EDGES[1] + 20 + 30 * sample,
            y + 5,
            "✓" if is_right else "✗",
            "#ffffff",
            anchor="middle",
            bold=True,
        )
    shares = (
        (EDGES[2] + 10, demonstration_weight(solvability, WEIGHTING), c.demonstration),
        (EDGES[2] + 150, rollout_total(solvability, WEIGHTING) if num_correct else 0.0, c.own),
    )
    for x, weight, color in shares:
        yield box(x, y - 9, 62 * weight, 18, color)
        yield text(x + 62 * weight + 6, y + 5, f"{weight:.2f}", c.text, size=12)
    yield text(EDGES[3] + 10, y + 5, "× 0.4 … 1.2", c.text)
    yield text(EDGES[4] + 10, y + 5, lesson, c.text, size=12)


def weights(colors: Colors) -> str:
    """The weights of a problem over its solvability."""
    return page(620, 320, "Weights over solvability", _weights(colors))


def _weights(c: Colors) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        yield line(f"M{_x(share):g} {_y(0):g} v6", c.faint)
        yield text(_x(share), _y(0) + 22, f"{share:g}", c.text, size=12, anchor="middle")
    for weight in (0.0, 0.5, 1.0, 1.5):
        yield line(f"M{_x(0):g} {_y(weight):g} H{_x(1):g}", c.faint, width=0.5)
        yield text(_x(0) - 8, _y(weight) + 4, f"{weight:g}", c.text, size=12, anchor="end")
    yield text(_x(0.5), _y(0) + 42, "solvability s", c.text, size=12, anchor="middle")
    neutral = neutral_solvability(WEIGHTING)
    yield line(f"M{_x(neutral):g} {_y(0):g} V{_y(1):g}", c.faint, dash="4 4")
    yield text(_x(neutral) + 6, _y(0) - 8, f"s = {neutral:.3f}", c.faint, size=12)
    curves: tuple[tuple[str, str, Callable[[float], float]], ...] = (
        ("demonstration(s)", c.demonstration, lambda s: demonstration_weight(s, WEIGHTING)),
        ("rollouts(s)", c.own, lambda s: rollout_total(s, WEIGHTING)),
        ("sum", c.faint, lambda s: demonstration_weight(s, WEIGHTING) + rollout_total(s, WEIGHTING)),
    )
    for name, color, function in curves:
        points = " L".join(f"{_x(i / 20):.1f} {_y(function(i / 20)):.1f}" for i in range(21))
        yield line(f"M{points}", color, width=2.5, dash="6 4" if name == "sum" else "")
        yield text(_x(1) + 8, _y(function(1)) + 4, name, color, size=12)


def _x(solvability: float) -> float:
    return 50 + 430 * solvability


def _y(weight: float) -> float:
    return 265 - 150 * weight


PICTURES = {"refresh": refresh, "weights": weights}


def files() -> dict[str, str]:
    """Name of each picture's file -> its content."""
    return {
        f"{name}-{theme}.svg": draw(colors)
        for name, draw in PICTURES.items()
        for theme, colors in THEMES.items()
    }


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
