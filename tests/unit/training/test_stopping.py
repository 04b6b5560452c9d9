"""A signal or the end of the given time stops a run at its next check."""

import time

import pytest

from megatron_rasft.training.stopping import Stopped, StopRequest


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
