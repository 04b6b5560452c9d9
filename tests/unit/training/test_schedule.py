"""The refreshes of a run, compared with those of a curriculum, and the problems that a short run leaves out."""

import pytest

from megatron_rasft.config import RunConfig
from megatron_rasft.training.schedule import Schedule
from tests.unit.training.stand_ins import config_of, refresh_of


@pytest.mark.parametrize("num_problems", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("interval", [1, 3, 100])
@pytest.mark.parametrize("num_steps", [1, 5, 12])
def test_refreshes_are_those_of_the_run(num_problems: int, interval: int, num_steps: int) -> None:
    config = config_of(run=RunConfig(rasft_refresh_interval=interval))
    refresh = refresh_of(config, num_problems, total_steps=num_steps)
    step, starts, visits = 0, [], 0
    while step < num_steps:
        starts.append(step)
        num = len(refresh.next_problems(step))
        visits += num
        step += -(-num // 2)
    schedule = Schedule.of(num_problems, 2, num_steps, interval)
    assert (list(schedule.refreshes), schedule.num_visits) == (starts, visits)


def test_problems_that_no_step_reaches_are_counted() -> None:
    line = Schedule.of(40, 8, 3, 2).left_out()
    assert line.startswith("warning: ") and "16 of 40 problems" in line and "--train-iters 5" in line
    assert Schedule.of(40, 8, 5, 2).left_out() == ""
