"""The own time of each rank in a step, and the ranks that are named as slow."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from megatron_rasft.monitoring import stragglers
from megatron_rasft.monitoring.stragglers import ComputeClock, RankTime, compare


def ranks(*seconds: float, stages: list[int] | None = None) -> list[RankTime]:
    return [RankTime(f"n{i}", stages[i] if stages else 0, value) for i, value in enumerate(seconds)]


@pytest.mark.parametrize(
    ("times", "named"),
    [
        (ranks(4.0, 4.1, 7.0, 4.2), [2]),
        (ranks(7.0, 4.0), [0]),
        (ranks(4.0, 5.9, 4.1), []),
        (ranks(9.0), []),
        # Shorter than half a second: the tenfold time is chance.
        (ranks(0.04, 0.4, 0.05), []),
        # The second stage has more to compute. Its ranks are compared with each other.
        (ranks(2.0, 2.1, 6.0, 6.1, stages=[0, 0, 1, 1]), []),
        (ranks(2.0, 2.1, 9.9, 6.1, stages=[0, 0, 1, 1]), [2]),
        # One rank for each stage: all are compared.
        (ranks(2.0, 2.1, 2.2, 9.9, stages=[0, 1, 2, 3]), [3]),
    ],
)
def test_ranks_slower_than_the_factor_times_the_median_are_named(
    times: list[RankTime], named: list[int]
) -> None:
    result = compare(times, 1.5)
    for rank, own in enumerate(times):
        assert (f"rank {rank} on {own.host} {own.seconds:.2f} s" in result.stragglers) == (rank in named)
    assert result.slowest_s == max(own.seconds for own in times)
    assert bool(result.stragglers) == bool(named)


def test_the_factor_decides() -> None:
    times = ranks(4.0, 5.0, 4.0)
    assert "rank 1" in compare(times, 1.2).stragglers
    assert compare(times, 1.3).stragglers == ""


def test_a_line_does_not_name_hundreds_of_ranks() -> None:
    line = compare(ranks(*[1.0] * 60, *[3.0] * 40), 1.5).stragglers
    assert "rank 67" in line and "rank 68" not in line and "32 more" in line


def test_only_forward_and_backward_passes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(stragglers, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    clock = ComputeClock(torch.device("cpu"))
    clock("forward-backward", log_level=1).start(barrier=False)
    for name in ("forward-recv", "forward-compute", "backward-compute", "all-grads-sync"):
        clock(name, log_level=2).start()
        clock(name).stop()
    clock("forward-backward").stop()
    assert clock.seconds() == 2.0
    clock.restart()
    assert clock.seconds() == 0.0


def test_on_a_gpu_the_time_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Event number n is at 10 * n milliseconds."""

        recorded = count()

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.number = next(self.recorded)

        def elapsed_time(self, later: "Event") -> float:
            return 10.0 * (later.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = ComputeClock(torch.device("cuda", 0))
    for _ in range(3):
        clock("forward-compute", log_level=2).start()
        clock("forward-compute").stop()
    assert clock.seconds() == pytest.approx(0.03)
