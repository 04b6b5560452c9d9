"""Starts pretrain_rasft.py on several ranks.

A forked run is seconds instead of half a minute. Each rank's own exit code is seen, and no launcher ends the
others when one fails: a rank that is left waiting shows as a hang. ``torchrun`` starts the program as a user does.
"""

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

from megatron_rasft.tools.ports import free_port
from tests import forking
from tests.forking import ENVIRONMENT, REPOSITORY, Outcome

PROGRAM = REPOSITORY / "pretrain_rasft.py"
TIMEOUT_S = 240


Phase = Literal["step", "generate", "verify", "score"]


@dataclass(kw_only=True)
class Interruption:
    """A signal that a run sends to itself once a step is done: when it comes is then no matter of luck."""

    step: int
    number: signal.Signals
    only_rank: int | None = None
    phase: Phase = "step"
    """It comes when the first of these begins after the step; with ``step`` at the end of the step itself."""


@dataclass(kw_only=True)
class Pause:
    """The run stands still once a step is done, until a file is there: what happens meanwhile has its time."""

    step: int
    until: Path


def _interrupt(events: Sequence[Interruption | Pause]) -> None:
    from megatron_rasft.training.progress import Progress
    from megatron_rasft.training.trainer import Trainer
    from megatron_rasft.verify.pool import VerifierPool

    reported = Progress.step
    due: dict[Phase, signal.Signals] = {}

    def step(self: Progress, number: int, values: Any) -> None:
        reported(self, number, values)
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
    """Background writes of the checkpoint of ``step`` stand still until the metrics of step ``until`` are there."""

    step: int
    until: int
    metrics: Path
    timeout_s: float = 20.0
    """A write that training waits for is let go then, and leaves no ``evidence``."""

    @property
    def evidence(self) -> Path:
        """Written when the step came: the newest checkpoint that the tracker named then."""
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
    """Run the program to its end on ``world_size`` ranks; logs are written to ``folder``.

    Args:
        interruption: a signal for the ranks in mid-run.
        pauses: times at which rank 0, and so the run, stands still.
        held_writes: checkpoints whose writers wait, on every rank.
        file_limit: largest file a rank may write, bytes; 0 is none. Beyond it a write fails with EFBIG, as on a
            full disk it fails with ENOSPC.
        timeout_s: a rank still running then is killed and has no exit code.
        variables: more of the environment.
        prepare_rank: rank -> what is called in it before the program.
        parent: the process that the ranks are forked from.
        has_launcher: whether each rank finds the variables that torchrun sets.
        program: another one than pretrain_rasft.py.
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
    """``run``, which must end well on every rank."""
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
    """The command a user types, in fresh interpreters; one exit code and one log for all.

    Args:
        ended_when: once this is true torchrun itself is sent SIGTERM, as a scheduler does it.
        hides_gpu: whether the run is one on the CPU wherever it is started.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
    command += ["--master-port", str(free_port()), str(PROGRAM), *flags]
    variables = os.environ | ENVIRONMENT
    if not hides_gpu:
        del variables["CUDA_VISIBLE_DEVICES"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + timeout_s
            while ended_when is not None and not ended_when() and process.poll() is None:
                assert time.monotonic() < deadline, "what the test waits for has not come"
                time.sleep(0.05)
            if ended_when is not None:
                process.terminate()
            process.wait(timeout_s)
        finally:
            process.terminate()  # torchrun ends its ranks; SIGKILL would leave them behind
            process.wait(60)
        log.seek(0)
        return Outcome([process.returncode], [log.read()])


def steps(save: Path) -> dict[int, dict[str, float]]:
    """Each step's record in metrics.jsonl, times left out; of a step done twice the last."""
    records: dict[int, dict[str, float]] = {}
    for line in (save / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.pop("event") == "step":
            records[record["step"]] = {
                k: v for k, v in record.items() if k != "time" and not k.endswith(("_s", "_per_s"))
            }
    return records


def losses(save: Path) -> list[float]:
    """The objective's loss of each step, in order."""
    return [record["objective/loss"] for _, record in sorted(steps(save).items())]
