"""A run that stands still ends with one line about the rank for which the others wait."""

import os
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rasft.monitoring import stalls
from megatron_rasft.monitoring.stalls import Report, StallWatch, blame
from megatron_rasft.monitoring.status import RunStatus


def report(rank: int, **changes: Any) -> Report:
    """A rank that waits in a collective."""
    values: dict[str, Any] = {
        "host": f"node{rank}",
        "pid": 100 + rank,
        "phase": "step",
        "num_reports": 9,
        "num_phases": 7,
        "waited_s": 700.0,
        "is_late": True,
        "stack": ("distributed_c10d.py:10 all_reduce", "run.py:3 train_step"),
        "is_in_collective": True,
    }
    return Report(rank=rank, **values | changes)


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({}, 0),
        ({2: {"is_silent": True}, 1: {"is_in_collective": False}}, 2),
        ({0: {"is_in_collective": False}}, 0),
        ({3: {"is_in_collective": False}}, 3),
        ({1: {"num_phases": 6}}, 1),
        ({2: {"stack": ("kernels.py:1 launch",)}}, 2),
        # Each sign separates the ranks that the signs before it have left: rank 0 grades, the others wait for it.
        ({1: {"is_in_collective": False, "num_phases": 8}, 3: {"is_in_collective": False}}, 3),
        ({rank: {"is_in_collective": False} for rank in range(4)} | {2: {"is_in_collective": False, "num_phases": 6}}, 2),
    ],
)  # fmt: skip
def test_the_rank_for_which_the_others_wait_is_blamed(changes: dict[int, dict[str, Any]], rank: int) -> None:
    reports = [report(i, **changes.get(i, {})) for i in range(4)]
    assert blame(reports).rank == blame(reports[::-1]).rank == rank


def test_the_line_names_rank_host_phase_and_stack() -> None:
    line = report(3).line(600)
    for part in (
        "rank 3",
        "node3",
        "700 s",
        "phase step",
        "--stall-deadline-s 600",
        "all_reduce < run.py:3 train_step",
    ):
        assert part in line
    assert "\n" not in line and "does not report" in replace(report(3), is_silent=True).line(600)


class Ranks:
    """The watches of several ranks, with one clock and one store."""

    def __init__(self, num: int, deadline_s: float = 100.0) -> None:
        self.now = 0.0
        self.ends: dict[int, str] = {}
        store = dist.HashStore()
        store.set_timeout(timedelta(seconds=0.1))
        self.watches = [
            StallWatch(
                deadline_s,
                store,
                rank,
                num,
                is_reader=True,
                end=lambda line, rank=rank: self.ends.setdefault(rank, line),  # type: ignore[misc]
                clock=lambda: self.now,
            )
            for rank in range(num)
        ]

    def pass_time(self, seconds: float, *looking: int) -> None:
        """Lets time pass in steps of an interval, in which some ranks (default: all) report."""
        for _ in range(round(seconds / self.watches[0].interval_s)):
            self.now += self.watches[0].interval_s
            for rank in looking or range(len(self.watches)):
                self.watches[rank].look()

    def lines(self) -> list[str]:
        return [line for line in self.ends.values() if line]


def test_a_run_that_stands_still_ends_on_all_ranks_with_one_line() -> None:
    ranks = Ranks(3)
    for watch in ranks.watches:
        watch.enter("step")
    ranks.pass_time(100)
    assert not ranks.ends
    ranks.pass_time(50)
    (line,) = ranks.lines()
    assert set(ranks.ends) == {0, 1, 2} and "phase step" in line
    assert "test_stalls.py" in line or "look" in line, "the stack of this thread"


def test_ranks_that_wait_for_one_that_makes_progress_are_not_late() -> None:
    ranks = Ranks(3)
    for watch in ranks.watches:
        watch.enter("verify")
    for _ in range(20):
        ranks.watches[0].tick()
        ranks.pass_time(75)
    assert not ranks.ends


def test_long_phases_have_three_times_the_deadline() -> None:
    ranks = Ranks(2)
    for watch in ranks.watches:
        watch.enter("save")
    ranks.pass_time(300)
    assert not ranks.ends
    ranks.pass_time(50)
    assert "phase save" in ranks.lines()[0]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_does_not_report_is_blamed(silent: int) -> None:
    ranks = Ranks(2)
    for watch in ranks.watches:
        watch.enter("step")
    ranks.pass_time(25)
    ranks.pass_time(225, 1 - silent)
    (line,) = ranks.lines()
    assert f"rank {silent} " in line and "does not report" in line


def test_a_silent_rank_is_named_with_the_stack_that_py_spy_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stack_of(pid: int) -> tuple[str, ...]:
        asked.append(pid)
        return ("kernels.py:7 holds_the_lock",)

    monkeypatch.setattr(stalls, "stack_of", stack_of)
    ranks = Ranks(3)
    for watch in ranks.watches:
        watch.enter("step")
    ranks.watches[2]._host = "elsewhere"
    ranks.pass_time(25)
    ranks.pass_time(225, 2, 1)
    (line,) = ranks.lines()
    assert "rank 0 " in line and "does not report" in line and "kernels.py:7 holds_the_lock" in line
    assert asked == [os.getpid()]


def test_a_late_rank_ends_without_the_store() -> None:
    class Gone:
        def set(self, key: str, value: str, /) -> None:
            raise dist.DistNetworkError("Broken pipe")

    ranks = Ranks(1)
    (watch,) = ranks.watches
    watch = StallWatch(
        100.0,
        Gone(),  # type: ignore[arg-type]
        0,
        2,
        is_reader=True,
        end=lambda line: ranks.ends.setdefault(0, line),  # type: ignore[arg-type, return-value]
        clock=lambda: ranks.now,
    )
    watch.enter("step")
    for seconds in (25, 25, 25, 25):
        ranks.now += seconds
        watch.look_safely()
    assert not ranks.ends, "it is not late, and the store may come back"
    ranks.now += 25
    watch.look_safely()
    assert "rank 0 " in ranks.ends[0] and "store" in ranks.ends[0] and watch.is_cut_off
    assert not ranks.watches[0].is_cut_off


def test_the_time_of_a_suspended_process_does_not_count() -> None:
    ranks = Ranks(1)
    ranks.watches[0].enter("step")
    ranks.pass_time(25)
    ranks.now += 5000
    ranks.watches[0].look()
    assert not ranks.ends
    ranks.pass_time(100)
    assert ranks.ends


def test_phases_are_entered_only_while_a_run_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    @stalls.phase("weigh")
    def weigh(value: int) -> int:
        return value + 1

    assert weigh(1) == 2
    ranks = Ranks(1)
    monkeypatch.setattr(stalls, "_watch", ranks.watches[0])
    ranks.pass_time(75)
    assert weigh(1) == 2
    ranks.pass_time(75)
    stalls.tick()
    ranks.pass_time(75)
    assert not ranks.ends
    ranks.pass_time(50)
    assert "phase weigh" in ranks.lines()[0]


def test_a_disk_that_hangs_does_not_keep_the_run_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunStatus(state="running", step=3).write(tmp_path)
    stalls._note_failure(str(tmp_path), "rank 1", patience_s=600)
    assert RunStatus.read(tmp_path) == RunStatus(state="failed", step=3, reason="rank 1")
    hangs, began = threading.Event(), threading.Event()

    def write(status: RunStatus, save: str) -> None:
        began.set()
        hangs.wait(600)

    RunStatus(state="running", step=3).write(tmp_path)
    monkeypatch.setattr(RunStatus, "write", write)
    stalls._note_failure(str(tmp_path), "rank 1", patience_s=0.01)
    assert began.wait(600) and not hangs.is_set()
    hangs.set()


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_an_end_that_is_written_down_stays(tmp_path: Path, state: Any) -> None:
    before = RunStatus(state=state, step=3, reason="earlier")
    before.write(tmp_path)
    stalls._note_failure(str(tmp_path), "rank 1", patience_s=600)
    assert RunStatus.read(tmp_path) == before
