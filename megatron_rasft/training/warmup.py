"""The learning rate of a step: the warm-up, counted so that the first optimizer step trains, and the share by the batch's mass."""

from collections.abc import Container
from typing import Any

from torch import Tensor


class WarmUp:
    """Sets the learning rates of the warm-up before each step. After the warm-up Megatron's schedule holds.

    Megatron's step k (from 1) has the rate of its position k - 1 in the schedule, so a warm-up of W steps begins with a step of rate 0,
    which costs rollouts and changes nothing. Here step k of the warm-up has the rate of position k: the fraction k / W of the full
    rate. Positions count samples, W steps are W global batches.

    The rate is a function of Megatron's position alone, which checkpoints store. A resumed run therefore has the same rates.

    Args:
        scheduler: Megatron's OptimizerParamScheduler.
        batch_size: samples of a global batch, by which a step advances the scheduler.
        given: the arguments whose flags are on the command line. With --lr-warmup-init the user has set the rate of the first step,
            and Megatron's schedule is not changed.
    """

    def __init__(self, scheduler: Any, batch_size: int, given: Container[str]) -> None:
        self._scheduler = scheduler
        self._batch_size = batch_size
        self._is_megatrons = "lr_warmup_init" in given

    def set_rates(self, share: float = 1.0) -> None:
        """Sets the learning rate of every parameter group for the next step. Call it before each step.

        Args:
            share: factor of this step's rate. It does not change the rates of later steps, even if Megatron skips this step.
        """
        for group in self._scheduler.optimizer.param_groups:
            rate = share * self._rate(group)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _rate(self, group: dict[str, Any]) -> float:
        scheduler = self._scheduler
        position, end = scheduler.num_steps, scheduler.lr_warmup_steps
        if self._is_megatrons or position >= end:
            return float(scheduler.get_lr(group))
        full: float = group.get("max_lr", scheduler.max_lr)
        return full * min(position + self._batch_size, end) / end
