"""The learning rate of every step, against formulas, and after a resume."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rasft.training.warmup import WarmUp

LR, MIN_LR, STEPS, BATCH = 0.4, 0.1, 12, 8


def schedule(warmup: int, style: str = "cosine", init: float = 0.0, decay: int = STEPS) -> Any:
    """Megatron's scheduler of a run of 12 steps with batches of 8, over three groups of parameters."""
    groups: list[dict[str, Any]] = [
        {"lr": 0.0},
        {"lr": 0.0, "max_lr": 2 * LR, "min_lr": 2 * MIN_LR},
        {"lr": torch.tensor(0.0, dtype=torch.float64)},
    ]
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=groups),  # type: ignore[arg-type]
        init_lr=init,
        max_lr=LR,
        min_lr=MIN_LR,
        lr_warmup_steps=warmup * BATCH,
        lr_decay_steps=decay * BATCH,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=STEPS * BATCH,
        wd_incr_style="constant",
        wsd_decay_steps=4 * BATCH,
        lr_wsd_decay_style="linear",
    )


def rates(scheduler: Any, given: tuple[str, ...] = (), num_steps: int = STEPS) -> list[float]:
    """The learning rate that each of the next steps uses."""
    warm_up, found = WarmUp(scheduler, BATCH, given), []
    for _ in range(num_steps):
        warm_up.set_rates()
        first, double, tensor = (float(group["lr"]) for group in scheduler.optimizer.param_groups)
        assert (double, tensor) == (pytest.approx(2 * first, abs=scheduler.init_lr), pytest.approx(first))
        found.append(first)
        scheduler.step(increment=BATCH)
    return found


def decayed(share: float) -> float:
    return MIN_LR + (LR - MIN_LR) * share


STYLES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda k, w: LR,
    "linear": lambda k, w: decayed(1 - (k - 1 - w) / (STEPS - w)),
    "cosine": lambda k, w: decayed((1 + math.cos(math.pi * (k - 1 - w) / (STEPS - w))) / 2),
    "WSD": lambda k, w: decayed(1 - max(0, k - 1 - (STEPS - 4)) / 4),
}
"""Decay -> the rate of step k (from 1) after a warm-up of w steps."""


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("warmup", [0, 1, 2, 4, 7])
def test_every_step_has_its_rate_and_the_first_step_trains(style: str, warmup: int) -> None:
    expected = [LR * k / warmup if k <= warmup else STYLES[style](k, warmup) for k in range(1, STEPS + 1)]
    assert rates(schedule(warmup, style)) == pytest.approx(expected, rel=1e-12)
    assert expected[0] > 0


@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
def test_a_resumed_schedule_has_the_rates_of_an_uninterrupted_one(after: int) -> None:
    whole = rates(schedule(4))
    stopped = schedule(4)
    assert rates(stopped, num_steps=after) == whole[:after]
    resumed = schedule(4)
    resumed.load_state_dict(stopped.state_dict())
    assert rates(resumed, num_steps=STEPS - after) == whole[after:]


@pytest.mark.parametrize("init", [0.0, 0.1])
def test_an_initial_rate_of_the_user_leaves_megatrons_schedule(init: float) -> None:
    expected = [init + (LR - init) * k / 4 for k in range(5)]
    assert rates(schedule(4, init=init), given=("lr_warmup_init",), num_steps=5) == pytest.approx(expected)


def test_a_warm_up_that_ends_within_a_step_stays_within_its_rate() -> None:
    scheduler = schedule(1)
    scheduler.lr_warmup_steps = 12  # 12 samples are one and a half steps
    assert rates(scheduler, num_steps=2) == pytest.approx([LR * 8 / 12, LR])


@pytest.mark.parametrize("given", [(), ("lr_warmup_init",)])
def test_a_share_changes_the_rate_of_its_step_alone(given: tuple[str, ...]) -> None:
    """Also if Megatron skips the step and does not advance the schedule: the next step then has the same rate."""
    full, scheduler = rates(schedule(3), given), schedule(3)
    warm_up = WarmUp(scheduler, BATCH, given)
    for step, rate in enumerate(full):
        for share in (0.25, 0.5, 1.0):
            warm_up.set_rates(share)
            first, double, tensor = (float(group["lr"]) for group in scheduler.optimizer.param_groups)
            assert first == pytest.approx(share * rate) and tensor == pytest.approx(first), step
            assert double == pytest.approx(2 * first)
        scheduler.step(increment=BATCH)
