"""Interrupted rounds of the job script of examples/slurm, on a Slurm cluster of this machine."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import psutil

from benchmarks.interruptions import CHECK_S, Result, Round, Strike, judged
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ENDS, Runs

_START_S = 20.0
"""A start under Slurm takes longer than a local one."""
_TIMEOUT_S = 1800.0
"""The longest wait for a job, of which several run at the same time. A run that stands still ends itself much earlier."""
_LAYOUTS = {
    1: "--num-gpus 1 --gpus-per-node 1",
    2: "--num-gpus 2 --gpus-per-node 1",
    4: "--num-gpus 4 --gpus-per-node 2 --micro-batch-size 2",
}
"""Number of processes -> flags of tools/plan.py."""


@dataclass(frozen=True)
class UnderSlurm:
    """Rounds of the job script of examples/slurm on a Slurm cluster of this machine. Several may run at the same time."""

    cluster: Cluster
    folder: Path
    runs: dict[int, Runs] = field(default_factory=dict)
    """Number of processes -> the runs with this number, which are compared with their run ``undisturbed``."""

    def prepare(self) -> None:
        """Runs the undisturbed run of each number of processes."""
        for num, layout in _LAYOUTS.items():
            root = self.folder / str(num)
            root.mkdir()
            self.runs[num] = Runs(self.cluster, root, layout)
        for job in [runs.submit("undisturbed") for runs in self.runs.values()]:
            if self._finish(job)["JobState"] != "COMPLETED":
                raise RuntimeError("".join(runs.log("undisturbed") for runs in self.runs.values()))

    def root(self, round_: Round) -> Path:
        return self.runs[round_.num_processes].root

    def run(self, round_: Round) -> Result:
        runs, name = self.runs[round_.num_processes], round_.name
        flags = "--async-save" if round_.moment == "async save" else ""
        job, save = runs.submit(name, flags=flags), runs.folder(name) / "checkpoints"
        strike = Strike(
            round=round_,
            save=save,
            export=runs.folder(name) / "hf",
            saved_steps=(3, 6, 9),
            last_steps=(4, 5, 9),
            start_s=_START_S,
            logs=runs.folder(name) / "logs",
        )
        try:
            self._wait_for(job, "RUNNING", *ENDS)
            is_missed = not strike.wait(lambda: self.cluster.facts(job).get("JobState") in ENDS)
            if not is_missed:
                self._send(round_, job)
            began_at = time.time()
            facts = self._finish(job)
            is_missed = is_missed or (facts["JobState"] == "COMPLETED" and facts["Restarts"] == "0")
            # before its first checkpoint a job is not requeued
            if (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"):
                began_at = time.time()
                job = runs.submit(name, flags=flags)
                facts = self._finish(job)
        except TimeoutError as error:
            self.cluster.run("scancel", "--signal=KILL", "--full", job)
            return Result(round=round_, outcome="hung", detail=f"{error}\n{runs.log(name)[-2000:]}")
        if facts["JobState"] != "COMPLETED":
            return Result(round=round_, outcome="refused", detail=runs.log(name)[-2000:])
        resumed_at = datetime.fromisoformat(facts["StartTime"]).timestamp()  # in local time, without a zone
        compare = partial(runs.assert_same, name)
        return judged(round_, compare, save, began_at, resumed_at=resumed_at, is_missed=is_missed)

    def _send(self, round_: Round, job: str) -> None:
        if round_.signal == "TERM" and round_.hits_all:
            self.cluster.run("scancel", "--signal=TERM", job)
            return
        for process in self._targets(round_):
            with suppress(psutil.Error):
                process.send_signal(signal.Signals[f"SIG{round_.signal}"])

    def _targets(self, round_: Round) -> list[psutil.Process]:
        """The ranks that the signal hits; before there are ranks, torchrun's agents."""
        find = self.runs[round_.num_processes].processes
        number = {} if round_.hits_all else {"RANK": str(round_.num_processes - 1)}
        if ranks := find(round_.name, "pretrain_rasft.py", WORLD_SIZE=str(round_.num_processes), **number):
            return ranks
        agents = find(round_.name, " -m torch.distributed.run")
        return agents if round_.hits_all else agents[-1:]

    def _wait_for(self, job: str, *states: str) -> dict[str, str]:
        return self.cluster.wait_until(job, *states, timeout_s=_TIMEOUT_S, every_s=CHECK_S)

    def _finish(self, job: str) -> dict[str, str]:
        """Starts the job again as often as it is requeued, and waits for its end."""
        restarts = 0
        while (facts := self._wait_for(job, *ENDS, "PENDING"))["JobState"] == "PENDING":
            restarts = max(restarts, int(facts["Restarts"]))
            if restarts:
                self.cluster.start_now(job, restarts, _TIMEOUT_S)
            else:
                self._wait_for(job, "RUNNING", *ENDS)
        return facts
