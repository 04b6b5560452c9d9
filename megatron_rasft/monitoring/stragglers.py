"""Names the ranks that compute a step more slowly than other ranks with the same work.

Collectives make every rank as slow as the slowest one, so the duration of a step does not show which rank that is. Each rank measures
its own work instead: the wait for its batch, which it cuts itself, and its forward and backward passes without the transfers between
pipeline stages and the reduction of gradients.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

import torch

_COMPUTATIONS = frozenset({"forward-compute", "backward-compute"})
"""Names of Megatron's timers around the passes of one micro-batch (pipeline_parallel/schedules.py). They never nest."""

_SHORTEST_DELAY_S = 0.5
"""A rank is not named for a shorter delay in a step: short steps vary by more than any useful factor."""

_MOST_NAMED = 8
"""A node of eight ranks, which wait for each other within their layers."""


class ComputeClock:
    """Measures the forward and backward passes of one step. Takes the place of Megatron's timers, ``config.timers``.

    Layers wait for each other within tensor-, context- and expert-parallel groups. This time is part of the measurement, so the ranks of
    such a group have nearly the same time.

    Args:
        device: on a GPU the times are those of events in its stream, so they are known after a synchronization.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self._is_computation = False

    def restart(self) -> None:
        """Forgets the passes measured so far."""
        self._marks.clear()

    def seconds(self) -> float:
        """The time of all passes since ``restart``. On a GPU they must have been computed."""
        return sum(map(self._between, self._marks[::2], self._marks[1::2]))

    def __call__(self, name: str, log_level: int = 0) -> "ComputeClock":
        """Returns the timer of a name, as Megatron's timers do."""
        self._is_computation = name in _COMPUTATIONS
        return self

    def start(self, barrier: bool = False) -> None:
        """Called by Megatron before the part that the last name denotes."""
        self._mark()

    def stop(self, barrier: bool = False) -> None:
        """Called by Megatron after the part that the last name denotes."""
        self._mark()

    def _mark(self) -> None:
        if not self._is_computation:
            return
        if self._is_on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.monotonic())

    def _between(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended)) / 1000 if self._is_on_gpu else float(ended - began)


class RankTime(NamedTuple):
    """One rank's own time of a step. A tuple, because every rank sends it at every step."""

    host: str
    stage: int
    """Pipeline stage. Ranks of a stage compute micro-batches of one shape through the same layers."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The own times of all ranks in one step."""

    slowest_s: float
    median_s: float
    stragglers: str
    """Names the slow ranks, for the step's line; "" if there are none."""


def compare(times: Sequence[RankTime], factor: float) -> StepTimes:
    """Compares each rank with the median of its pipeline stage.

    The median of two ranks is the faster one. If every stage has a single rank, each rank is compared with the median of all.

    Args:
        times: of every rank, in rank order.
        factor: --straggler-factor.
    """
    stages = [time.stage for time in times]
    if len({*stages}) == len(stages):
        stages = [0] * len(stages)
    peers: dict[int, list[float]] = defaultdict(list)
    for stage, own in zip(stages, times, strict=True):
        peers[stage].append(own.seconds)
    medians = {stage: median_low(seconds) for stage, seconds in peers.items()}
    slow = [
        f"rank {rank} on {own.host} {own.seconds:.2f} s, median {medians[stage]:.2f}"
        for rank, (stage, own) in enumerate(zip(stages, times, strict=True))
        if own.seconds > max(factor * medians[stage], medians[stage] + _SHORTEST_DELAY_S)
    ]
    seconds = [own.seconds for own in times]
    return StepTimes(slowest_s=max(seconds), median_s=median_low(seconds), stragglers=_named(slow))


def _named(slow: Sequence[str]) -> str:
    if not slow:
        return ""
    rest = f"; and {len(slow) - _MOST_NAMED} more" if len(slow) > _MOST_NAMED else ""
    return f"slow: {'; '.join(slow[:_MOST_NAMED])}{rest}"
