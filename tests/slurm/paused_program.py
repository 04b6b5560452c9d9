"""Stands for pretrain_rasft.py in the checkout of the tests: the same program, but its first start pauses after a step.

``PAUSE_AFTER`` is the step. Rank 0 then writes the file ``paused`` into ``RUN`` and waits for SIGTERM, which the run receives as it
would without the pause, for the file ``go``, or for the time ``PAUSE_BEFORE_END_S`` before the end of the allocation. With
``PAUSE_FOR_EVER`` the step has no end, and the run must be killed.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

PROGRAM = Path(os.environ["REAL_CHECKOUT"]) / "pretrain_rasft.py"


def pause_after(step: int, folder: Path) -> None:
    """Makes this process pause after a step."""
    sys.path.insert(0, str(PROGRAM.parent))
    from megatron_rasft.monitoring.progress import Progress

    reported = Progress.step
    received: list[int] = []
    for_ever = "PAUSE_FOR_EVER" in os.environ
    before_end = os.environ.get("PAUSE_BEFORE_END_S")
    ends_at = int(os.environ["SLURM_JOB_END_TIME"]) - float(before_end) if before_end else float("inf")

    def reported_and_paused(self: Progress, number: int, *args: Any) -> None:
        reported(self, number, *args)
        if number == step:
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler), "the run handles SIGTERM"

            def receive(number: int, frame: FrameType | None) -> None:
                received.append(number)
                handler(number, frame)

            signal.signal(signal.SIGTERM, receive)
            (folder / "paused").touch()
            while for_ever or not (received or (folder / "go").exists() or time.time() >= ends_at):
                time.sleep(0.05)

    Progress.step = reported_and_paused  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    after = int(os.environ.get("PAUSE_AFTER", "0"))
    is_first_start = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if after and is_first_start and os.environ["RANK"] == "0":
        pause_after(after, Path(os.environ["RUN"]))
    sys.argv[0] = str(PROGRAM)
    runpy.run_path(str(PROGRAM), run_name="__main__")
