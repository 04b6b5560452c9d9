"""An interruption of a run: how it is drawn, when the signal comes, and how the resumed run is judged."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Moment = Literal["step", "refresh", "save", "async save", "export", "start"]
Outcome = Literal["identical", "different", "refused", "hung", "missed"]

_WINDOWS_S: dict[Moment, float] = {
    "step": 0.1,
    "refresh": 0.3,
    "save": 0.05,
    "async save": 0.05,
    "export": 0.05,
}
"""The longest delay between the beginning of a moment and the signal, seconds. A start has its own: ``Strike.start_s``."""
CHECK_S = 1.0
"""Time between two questions whether a run is over, which may be expensive."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One interruption."""

    number: int
    num_processes: int
    moment: Moment
    signal: Literal["TERM", "KILL"]
    hits_all: bool
    """Whether all processes get the signal, or one."""
    share: float
    """The place inside the moment, from 0 to 1; it also draws the step."""

    @property
    def name(self) -> str:
        return f"round{self.number:04d}"


def draw(number: int, seed: int) -> Round:
    """Returns the round of this number. Six rounds in a row have all moments."""
    moments: list[Moment] = list(get_args(Moment))
    random.Random(f"{seed}-{number // len(moments)}").shuffle(moments)
    choose = random.Random(f"{seed}-{number}-round")
    return Round(
        number=number,
        num_processes=choose.choice((1, 2, 4)),
        moment=moments[number % len(moments)],
        signal=choose.choice(("TERM", "KILL")),
        hits_all=choose.random() < 0.5,
        share=choose.random(),
    )


@dataclass(frozen=True, kw_only=True)
class Strike:
    """Waits for a moment of a run by the files that the run writes."""

    round: Round
    save: Path
    export: Path
    saved_steps: tuple[int, ...]
    """Steps whose checkpoint a round may interrupt."""
    last_steps: tuple[int, ...]
    """The last steps before the refreshes."""
    start_s: float
    """The longest delay between the beginning of a start and the signal."""
    logs: Path | None = None
    """Folder in which logs and torchrun's folders appear with the start; None for a run that has started."""

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Returns at the time of the signal; False if the run was over before."""
        check_at = time.monotonic()
        while not self.has_begun():
            if time.monotonic() >= check_at:
                if is_over():
                    return False
                check_at = time.monotonic() + CHECK_S
            time.sleep(0.005)
        window = self.start_s if self.round.moment == "start" else _WINDOWS_S[self.round.moment]
        time.sleep(window * self.round.share)
        return not is_over()

    def has_begun(self) -> bool:
        """Whether the moment has begun."""
        moment = self.round.moment
        if moment == "start":
            # torchrun itself ignores SIGTERM in the job script. It makes the folders of an attempt just before the ranks.
            begun = "torchrun/*/attempt_*" if self.round.signal == "TERM" else "trainer-*.log"
            return self.logs is None or any(self.logs.glob(begun))
        if moment == "export":
            return self.export.exists() or any(self.export.parent.glob(f".{self.export.name}.partial-*"))
        if moment in ("save", "async save"):
            return (self.save / f"iter_{self._pick(self.saved_steps):07d}").exists()
        steps = self.last_steps if moment == "refresh" else range(1, max(self.last_steps))
        return self._num_steps() >= self._pick(steps)

    def _pick(self, steps: Sequence[int]) -> int:
        return steps[int(self.round.share * 1000) % len(steps)]

    def _num_steps(self) -> int:
        with suppress(OSError):
            return (self.save / "metrics.jsonl").read_bytes().count(b'"event": "step"')
        return 0

    def __call__(self) -> None:
        """Makes this process send itself the signal."""
        threading.Thread(target=self._strike, daemon=True).start()

    def _strike(self) -> None:
        self.wait()
        os.kill(os.getpid(), signal.Signals[f"SIG{self.round.signal}"])


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a round."""

    round: Round
    outcome: Outcome
    detail: str = ""
    first_step_s: float | None = None
    """Seconds to the first new step of the resumed run, from its start, or under Slurm from the signal; None if no step was left, or it
    failed."""


def judged(
    round_: Round,
    compare: Callable[[], None],
    save: Path,
    began_at: float,
    *,
    resumed_at: float | None = None,
    is_missed: bool,
) -> Result:
    """Compares the resumed run with the undisturbed one.

    Args:
        began_at: the time from which the first new step is measured, seconds since 1970.
        resumed_at: start of the resumed run; None for ``began_at``. Steps between the two are the interrupted run's.
        is_missed: whether the run was over before the signal or in spite of it.
    """
    try:
        compare()
    except AssertionError as error:
        return Result(round=round_, outcome="different", detail=str(error)[:2000])
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    times = [r["time"] for r in records if r["event"] == "step" and r["time"] > (resumed_at or began_at)]
    return Result(
        round=round_,
        outcome="missed" if is_missed else "identical",
        first_step_s=None if is_missed or not times else min(times) - began_at,
    )
