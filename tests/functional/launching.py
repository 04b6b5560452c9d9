"""Starts pretrain_rasft.py on several ranks, each in a process forked from one that has imported everything.

A run is then seconds instead of half a minute. Each rank's own exit code is seen, and no launcher ends the
others when one fails: a rank that is left waiting shows as a hang. ``torchrun`` starts the program as a user does.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "pretrain_rasft.py"
TIMEOUT_S = 240

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass
class Outcome:
    """What a run left behind, one entry a rank."""

    codes: list[int | None]
    """Exit codes, negative for a signal; None for a rank that had to be killed after the timeout."""
    logs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{log}" for rank, log in enumerate(self.logs))

    @property
    def errors(self) -> list[str]:
        """Each message from its ``error:`` to the end of the log; several rows at fault take a line each."""
        return [part for log in self.logs for part in f"\n{log}".split("\nerror: ")[1:]]


@dataclass(kw_only=True)
class Interruption:
    """A signal that a run sends to itself once a step is done: when it comes is then no matter of luck."""

    step: int
    number: signal.Signals
    only_rank: int | None = None


@dataclass(kw_only=True)
class Pause:
    """The run stands still once a step is done, until a file is there: what happens meanwhile has its time."""

    step: int
    until: Path


def _preload() -> None:
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain_rasft", "tests.functional.launching"])


def _interrupt(events: Sequence[Interruption | Pause]) -> None:
    from megatron_rasft.report.progress import Progress

    reported = Progress.step

    def step(self: Progress, number: int, values: Any) -> None:
        reported(self, number, values)
        for event in events:
            if event.step == number and isinstance(event, Interruption):
                os.kill(os.getpid(), event.number)
            while event.step == number and isinstance(event, Pause) and not event.until.exists():
                time.sleep(0.05)

    Progress.step = step  # type: ignore[assignment,method-assign]


def _rank(
    flags: Sequence[str],
    variables: dict[str, str],
    log: str,
    events: Sequence[Interruption | Pause],
    file_limit: int,
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if events:
        _interrupt(events)
    sys.argv = [str(PROGRAM), *flags]
    runpy.run_path(str(PROGRAM), run_name="__main__")


def run(
    folder: Path,
    flags: Sequence[str],
    world_size: int = 1,
    *,
    interruption: Interruption | None = None,
    pauses: Sequence[Pause] = (),
    file_limit: int = 0,
    timeout_s: float = TIMEOUT_S,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run the program to its end on ``world_size`` ranks; logs are written to ``folder``.

    Args:
        interruption: a signal for the ranks in mid-run.
        pauses: times at which rank 0, and so the run, stands still.
        file_limit: largest file a rank may write, bytes; 0 is none. Beyond it a write fails with EFBIG, as on a
            full disk it fails with ENOSPC.
        timeout_s: a rank still running then is killed and has no exit code.
        variables: more of the environment.
    """
    _preload()
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    context = multiprocessing.get_context("forkserver")
    ranks: list[ForkServerProcess] = []
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    for rank, log in enumerate(logs):
        events: list[Interruption | Pause] = [] if rank else list(pauses)
        if interruption is not None and interruption.only_rank in (None, rank):
            events.append(interruption)
        process = context.Process(
            target=_rank,
            args=(
                list(flags),
                {**common, **(variables or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                str(log),
                events,
                file_limit,
            ),
        )
        process.start()
        ranks.append(process)
    with _killed_at_the_end(ranks):
        for process in ranks:
            process.join(timeout_s)
        codes = [process.exitcode for process in ranks]
    return Outcome(codes, [log.read_text(errors="replace") if log.exists() else "" for log in logs])


@contextlib.contextmanager
def _killed_at_the_end(ranks: Sequence[ForkServerProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()


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
    command += ["--master-port", str(_free_port()), str(PROGRAM), *flags]
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
