"""The live line shows work that takes long: in a log at intervals, on a terminal in place."""

import io
import time

import pytest
from rich.console import Console

from megatron_rasft.monitoring import live
from megatron_rasft.monitoring.live import LiveLine


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def line_on(*, is_terminal: bool) -> tuple[LiveLine, io.StringIO, Clock]:
    text, clock = io.StringIO(), Clock()
    console = Console(file=text, force_terminal=is_terminal, width=120, soft_wrap=True)
    return LiveLine(console, 30.0, clock), text, clock


def test_a_log_gets_a_line_at_least_every_interval_with_rate_and_time_left() -> None:
    line, text, clock = line_on(is_terminal=False)
    done = 24
    with line.shows("sampling", "rollouts", 2000, lambda: done, lambda: 50 * done):
        for second in range(1, 91):
            clock.now, done = 1000.0 + second, 24 + 2 * second
            line.look()
    first, *others = text.getvalue().splitlines()
    assert first == "sampling: 82 of 2,000 rollouts, 2.0 per s, 16 min left, 100 tokens/s, after 29 s"
    assert len(others) == 2


def test_short_work_and_no_work_are_silent() -> None:
    line, text, clock = line_on(is_terminal=False)
    with line.shows("scoring", "samples", 10, lambda: 0, lambda: 0):
        line.look()
    clock.now += 500
    line.look()
    assert text.getvalue() == ""


def test_work_of_unknown_size_shows_its_time_and_repeated_work_has_no_negative_time_left() -> None:
    line, text, clock = line_on(is_terminal=False)
    counts = {0: iter([0, 0]), 10: iter([0, 20])}  # at the start, and when the line is shown
    for total, done in counts.items():
        with line.shows("sending weights", "MiB", total, done.__next__, lambda: 0):
            clock.now += 30
            line.look()
    unknown, repeated = text.getvalue().splitlines()
    assert unknown == "sending weights, after 30 s"
    assert "20 of 10 MiB" in repeated and ", 0 s left" in repeated


def test_work_within_work_is_shown_after_it() -> None:
    line, text, clock = line_on(is_terminal=False)
    done = 4
    with line.shows("outer", "samples", 10, lambda: done, lambda: 0):
        clock.now, done = clock.now + 20, 6
        with line.shows("inner", "rollouts", 2, lambda: 0, lambda: 0):
            clock.now += 20
            line.look()
        clock.now += 40
        line.look()
    inner, outer = text.getvalue().splitlines()
    assert inner == "outer: 6 of 10 samples, 80 s left; inner: 0 of 2 rollouts, after 20 s"
    assert outer.startswith("outer") and outer.endswith("after 80 s")


def test_a_terminal_shows_the_line_at_once_and_removes_it_at_the_end() -> None:
    line, text, clock = line_on(is_terminal=True)
    with line.shows("verifying", "rollouts", 8, lambda: 4, lambda: 0):
        clock.now += 1
        line.look()
        line.look()
    assert "verifying: 4 of 8 rollouts" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K"), "the line is erased"


def test_a_thread_looks_while_the_main_thread_is_busy(capsys: pytest.CaptureFixture[str]) -> None:
    with live.work("scoring", "samples", 10, lambda: 3):
        pass  # nothing shows work yet
    live.start(Console(soft_wrap=True), 0.02)
    seen = ""
    with live.work("scoring", "samples", 10, lambda: 3):
        while "scoring: 3 of 10" not in seen:
            time.sleep(0.01)
            seen += capsys.readouterr().out
    live.stop()
    live.stop()
    live.start(Console(), 0)
    assert live._live is None
