"""A signal or the end of the given time stops a run at its next check."""

import os
import signal
import time

import pytest

from megatron_rasft.monitoring.stopping import Allocation, Stopped, StopRequest


@pytest.mark.parametrize(
    ("has_signal", "minutes_ago", "reason"),
    [(False, 1, ""), (True, 1, "a signal"), (False, 3, "--exit-duration-in-mins 2")],
)
def test_a_signal_and_the_end_of_the_time_ask_to_stop(
    has_signal: bool, minutes_ago: int, reason: str
) -> None:
    stop = StopRequest(lambda: has_signal, 2, time.time() - 60 * minutes_ago)
    assert stop.reason() == reason
    assert stop.is_asked() == bool(reason)
    if reason:
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(Stopped):
            stop.on_rank_zero(stop.check_here)
    else:
        stop.check()
        assert stop.on_rank_zero(lambda: 5) == 5


def test_without_a_duration_a_run_has_no_time_limit() -> None:
    assert not StopRequest(lambda: False).is_asked()


def slurm(ends: float, starts: float | None = None) -> dict[str, str]:
    start = {} if starts is None else {"SLURM_JOB_START_TIME": str(int(starts))}
    return {"SLURM_JOB_END_TIME": str(int(ends)), **start}


@pytest.mark.parametrize(
    ("before_s", "variables"),
    [
        (None, {}),
        (0.0, slurm(10**10)),
        (30.0, {"SLURM_JOB_END_TIME": "NOT_SET"}),
        (None, slurm(0)),
        (30.0, slurm(time.time() - 5)),
    ],
)
def test_without_an_end_there_is_no_allocation(before_s: float | None, variables: dict[str, str]) -> None:
    assert Allocation.of_slurm(before_s, None, variables) is None


def test_a_run_stops_at_the_given_time_before_the_end() -> None:
    allocation = Allocation.of_slurm(30.0, 500.0, slurm(1000), now=0.0)
    assert allocation is not None
    assert [bool(allocation.reason(now)) for now in (0.0, 969.0, 970.0, 1001.0)] == [False, False, True, True]
    assert "--exit-before-end-s 30" in allocation.reason(970.0)


def test_the_default_covers_a_save_the_longest_step_and_a_margin() -> None:
    allocation = Allocation.of_slurm(None, None, slurm(100_000), now=0.0)
    assert allocation is not None and allocation.needed_s() == 300 + 60
    for now in (0.0, 40.0, 50.0):
        assert not allocation.reason(now)
    assert allocation.needed_s() == 40 + 300 + 60
    allocation.note_save(20.0)
    allocation.note_save(10.0)
    assert allocation.needed_s() == 40 + 1.5 * 20 + 60


def test_a_short_allocation_is_used_for_the_most_part() -> None:
    allocation = Allocation.of_slurm(None, None, slurm(1060, 1000), now=1000.0)
    assert allocation is not None and allocation.needed_s() == 6 + 6


def test_the_first_ctrl_c_asks_to_stop_and_the_second_ends_the_process() -> None:
    request, before = StopRequest(lambda: False), signal.getsignal(signal.SIGINT)
    with request.catching_interrupt():
        assert not request.is_asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason() == "Ctrl-C"
        for second in (signal.SIGINT, signal.SIGTERM):  # SIGTERM if torchrun gets the second Ctrl-C
            child = os.fork()
            if not child:
                os.kill(os.getpid(), second)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_that_the_process_ignores_stays_ignored() -> None:
    request, before = StopRequest(lambda: False), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with request.catching_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
        assert not request.is_asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_end_of_the_allocation_asks_to_stop() -> None:
    near, far = (Allocation.of_slurm(60.0, None, slurm(time.time() + s)) for s in (30, 3000))
    assert "Slurm" in StopRequest(lambda: False, allocation=near).reason()
    assert not StopRequest(lambda: False, allocation=far).is_asked()


@pytest.mark.parametrize("starts", [1000, None])
def test_no_earlier_save_stops_a_run_at_its_first_check(starts: float | None) -> None:
    allocation = Allocation.of_slurm(None, 1e6, slurm(5000, starts), now=1000.0)
    assert allocation is not None and allocation.needed_s() == 1000 + 60
    assert not allocation.reason(1100.0)


def test_the_time_of_a_suspended_job_is_no_step() -> None:
    allocation = Allocation.of_slurm(None, 10.0, slurm(11_000, 1000), now=1000.0)
    assert allocation is not None
    assert [bool(allocation.reason(now)) for now in (1000.0, 7000.0, 8000.0)] == [False, False, False]
    assert allocation.needed_s() == 2500 + 15 + 60
