"""Numbers and durations as the page prints them."""

import pytest

from megatron_rasft.tools.report.formats import duration, number, short_count


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
        (float("nan"), "–"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    "value,text",
    [(0, "0"), (1500, "1,500"), (15000, "15k"), (2e6, "2M"), (3.25e9, "3.25G"), (780_400, "780k")],
)
def test_short_count(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize("seconds,text", [(90, "90 s"), (600, "10 min"), (9000, "2.5 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
