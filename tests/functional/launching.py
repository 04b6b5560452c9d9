"""Starts pretrain_rasft.py on several ranks.

``run`` forks the ranks, which takes seconds instead of half a minute. It returns every rank's exit code, and no launcher ends the
other ranks when one fails, so a rank that waits forever is noticed. ``torchrun`` starts the program as a user does.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from tests import forking
from tests.forking import ENVIRONMENT, REPOSITORY, Outcome
from tests.ports import new_port

PROGRAM = REPOSITORY / "pretrain_rasft.py"
TIMEOUT_S = 600


Phase = Literal["step", "generate", "verify", "score"]


@dataclass(kw_only=True)
class Interruption:
    """A signal that a run sends to itself after a step, so that its time does not depend on the machine's speed."""

    step: int
    number: signal.Signals
    only_rank: int | None = None
    phase: Phase = "step"
    """The time of the signal: the end of the step ("step"), or the start of the first phase of this name after it."""


@dataclass(kw_only=True)
class Pause:
    """Pauses the run after a step until a file exists, so that a test can do something in between."""

    step: int
    until: Path


def _interrupt(events: Sequence[Interruption | Pause]) -> None:
    from megatron_rasft.monitoring.progress import Progress
    from megatron_rasft.training.trainer import Trainer
    from megatron_rasft.verify.pool import VerifierPool

    reported = Progress.step
    due: dict[Phase, signal.Signals] = {}

    def step(self: Progress, number: int, *args: Any) -> None:
        reported(self, number, *args)
        for event in events:
            if event.step == number and isinstance(event, Interruption):
                due[event.phase] = event.number
            while event.step == number and isinstance(event, Pause) and not event.until.exists():
                time.sleep(0.05)
        interrupt("step")

    def interrupt(phase: Phase) -> None:
        if phase in due:
            os.kill(os.getpid(), due.pop(phase))

    def interrupted(phase: Phase, work: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*args: Any, **kwargs: Any) -> Any:
            interrupt(phase)
            return work(*args, **kwargs)

        return begin

    Progress.step = step  # type: ignore[assignment,method-assign]
    for owner, phase in ((Trainer, "generate"), (Trainer, "score"), (VerifierPool, "verify")):
        setattr(owner, phase, interrupted(phase, getattr(owner, phase)))


@dataclass(kw_only=True)
class HeldWrites:
    """Delays the background write of the checkpoint of ``step`` until the metrics of step ``until`` are written."""

    step: int
    until: int
    metrics: Path
    timeout_s: float = 400.0
    """The longest delay, seconds. After it the write continues even if training waits for it, without ``evidence``."""

    @property
    def evidence(self) -> Path:
        """File that is written after the delay: the newest checkpoint by the tracker file at that time."""
        return self.metrics.with_name(f"held-{self.step}.json")

    def __call__(self) -> None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        write = FileSystemWriterAsync.write_preloaded_data

        def held(*args: Any, **kwargs: Any) -> Any:
            if f"iter_{self.step:07d}" in str(kwargs["write_bucket"][0]):
                self._hold()
            return write(*args, **kwargs)

        FileSystemWriterAsync.write_preloaded_data = held  # type: ignore[method-assign]

    def _hold(self) -> None:
        ends = time.monotonic() + self.timeout_s
        while time.monotonic() < ends:
            if self.metrics.exists() and self.until in steps(self.metrics.parent):
                tracker = self.metrics.with_name("latest_checkpointed_iteration.txt")
                newest = tracker.read_text() if tracker.exists() else ""
                self.evidence.write_text(json.dumps({"newest": newest}))
                return
            time.sleep(0.02)


def _limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def run(
    folder: Path,
    flags: Sequence[str],
    world_size: int = 1,
    *,
    interruption: Interruption | None = None,
    pauses: Sequence[Pause] = (),
    held_writes: Sequence[HeldWrites] = (),
    file_limit: int = 0,
    timeout_s: float = TIMEOUT_S,
    variables: Mapping[str, str] | None = None,
    prepare_rank: Callable[[int], Sequence[Callable[[], None]]] = lambda rank: (),
    parent: forking.Parent = forking.ON_CPU,
    has_launcher: bool = True,
    program: Path = PROGRAM,
) -> Outcome:
    """Runs the program to its end on ``world_size`` ranks; writes their logs to ``folder``.

    Args:
        interruption: a signal for the ranks during the run.
        pauses: pauses of rank 0. The other ranks wait for it.
        held_writes: delayed background writes, on every rank.
        file_limit: largest file that a rank may write, bytes; 0 for no limit. A longer write fails with EFBIG, similar to ENOSPC
            on a full disk.
        timeout_s: a rank that runs longer is killed and has no exit code.
        variables: environment variables to add.
        prepare_rank: rank -> functions that are called in its process before the program.
        parent: the process from which the ranks are forked.
        has_launcher: whether the ranks have the variables that torchrun sets.
        program: the file to run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = []
    for number in range(world_size):
        events: list[Interruption | Pause] = [] if number else list(pauses)
        if interruption is not None and interruption.only_rank in (None, number):
            events.append(interruption)
        prepare: list[Callable[[], None]] = [partial(_interrupt, events)] if events else []
        prepare += held_writes
        if file_limit:
            prepare.append(partial(_limit_files, file_limit))
        ranks.append(
            forking.Rank(
                program=program,
                arguments=list(flags),
                log=folder / f"rank{number}.log",
                variables=dict(variables or {}),
                prepare=[*prepare, *prepare_rank(number)],
            )
        )
    return forking.run(ranks, timeout_s=timeout_s, parent=parent, has_launcher=has_launcher)


def succeed(folder: Path, flags: Sequence[str], world_size: int = 1) -> Outcome:
    """Calls ``run``; fails unless every rank succeeds."""
    outcome = run(folder, flags, world_size)
    assert outcome.codes == [0] * world_size, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    return outcome


def torchrun(
    flags: Sequence[str],
    num_processes: int,
    *,
    ended_when: Callable[[], bool] | None = None,
    timeout_s: float = TIMEOUT_S,
    hides_gpu: bool = True,
) -> Outcome:
    """Runs the command that a user types, in new interpreters; returns one exit code and one log.

    Args:
        ended_when: when this returns true, all processes get SIGTERM, as those of a Slurm step do. The command is then the one that
            docs/training.md gives for Slurm: torchrun ignores the signal and waits for its processes.
        hides_gpu: whether the run uses the CPU even if the machine has a GPU.
    """
    launcher = ["-m", "torch.distributed.run", "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    command = [
        "env",
        "--ignore-signal=TERM",
        sys.executable,
        *launcher,
        "--nproc-per-node",
        str(num_processes),
    ]
    command += ["--master-port", str(new_port()), str(PROGRAM), *flags]
    variables = os.environ | ENVIRONMENT
    if not hides_gpu:
        del variables["CUDA_VISIBLE_DEVICES"]
    own_folder = tempfile.TemporaryDirectory(prefix="torchrun-", ignore_cleanup_errors=True)
    with tempfile.TemporaryFile("w+") as log, own_folder as folder:
        variables["TMPDIR"] = folder  # torchrun leaves its own folder there
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + timeout_s
            while ended_when is not None and not ended_when() and process.poll() is None:
                assert time.monotonic() < deadline, "the condition of the test was not met in time"
                time.sleep(0.05)
            if ended_when is not None:
                _terminate_all(process.pid)
            process.wait(timeout_s)
        finally:
            process.send_signal(signal.SIGINT)  # torchrun ends its ranks; SIGKILL would leave them behind
            process.wait(300)
        log.seek(0)
        return Outcome([process.returncode], [log.read()])


def _terminate_all(pid: int) -> None:
    """Sends SIGTERM to a process and all its descendants, which is how Slurm signals a step."""
    parent = psutil.Process(pid)
    for process in (*parent.children(recursive=True), parent):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()


def steps(save: Path) -> dict[int, dict[str, float]]:
    """Returns each step's record in metrics.jsonl without times. For a step that ran twice it is the last record.

    The run may be writing the last line at this moment, which is then left out.
    """
    records: dict[int, dict[str, float]] = {}
    text = (save / "metrics.jsonl").read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():
        record = json.loads(line)
        if record.pop("event") == "step":
            records[record["step"]] = {
                k: v for k, v in record.items() if k != "time" and not k.endswith(("_s", "_per_s"))
            }
    return records


def losses(save: Path) -> list[float]:
    """Returns the objective's loss of every step, in order."""
    return [record["objective/loss"] for _, record in sorted(steps(save).items())]
