"""A real run names a rank that is slow. If one hangs, it ends on all ranks and names that rank."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.monitoring.status import RunStatus
from tests.functional import launching
from tests.functional.conftest import Workshop


@dataclass(kw_only=True)
class Hang:
    """Makes a rank slow in its first step, and sleep for ever in its second. From then on the run has a deadline of two seconds."""

    is_hanging: bool

    def __call__(self) -> None:
        from megatron_rasft.monitoring import stalls
        from megatron_rasft.monitoring.stragglers import ComputeClock
        from megatron_rasft.training.trainer import Trainer

        stalls.REPORT_S = 0.2
        # On a busy machine a rank may get no CPU for seconds. It must not be called silent, because its stack is asserted.
        stalls._SILENT_ROUNDS = 3000
        measured = ComputeClock.seconds
        start, train, watches = stalls.StallWatch.start, Trainer.train, list[stalls.StallWatch]()

        def started(watch: stalls.StallWatch) -> None:
            watches.append(watch)
            start(watch)

        def seconds(clock: ComputeClock) -> float:
            return measured(clock) + 1000 * self.is_hanging

        def shorten(watch: stalls.StallWatch) -> None:
            # The rank that waits must not be late before it waits, on a machine that stands still for some seconds.
            while not (self.is_hanging or watch._stack()["is_in_collective"]):
                time.sleep(0.05)
            watch.deadline_s = 2.0

        def hangs(trainer: Trainer, prepared: Any) -> Any:
            if trainer.iteration == 1:
                threading.Thread(target=shorten, args=(watches[0],), daemon=True).start()
                while self.is_hanging:
                    time.sleep(1)
            return train(trainer, prepared)

        stalls.StallWatch.start = started  # type: ignore[method-assign]
        ComputeClock.seconds = seconds  # type: ignore[method-assign,assignment]
        Trainer.train = hangs  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_slow_rank_is_named_and_one_that_hangs_ends_the_run(
    workshop: Workshop, tmp_path: Path, hanging: int
) -> None:
    save = tmp_path / "save"
    flags = workshop.flags("--save", str(save), "--objective", "sft", "--train-iters", "3")
    outcome = launching.run(
        tmp_path / "logs", flags, 2, prepare_rank=lambda rank: [Hang(is_hanging=rank == hanging)]
    )
    assert outcome.codes == [1, 1], outcome.output
    (step,) = [line for line in outcome.output.splitlines() if line.startswith("step 1/3")]
    assert f"slow: rank {hanging} on" in step and "100" in step
    (error,) = outcome.errors
    for part in (f"rank {hanging} on", "phase step", "--stall-deadline-s", "hangs"):
        assert part in error
    status = RunStatus.read(save)
    assert status is not None and status.state == "failed" and f"rank {hanging} on" in status.reason
    assert max(launching.steps(save)) == 1
