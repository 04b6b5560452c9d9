"""Runs a program on several ranks, each in a process forked from one that has already imported everything.

A rank then starts at once, instead of importing torch, Megatron and transformers for ten seconds.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.ports import new_port

REPOSITORY = Path(__file__).parents[1]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass
class Parent:
    """The process that ranks are forked from. It starts at its first use."""

    preload: str
    """Name of the module that it imports."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Additional environment variables of this process and its ranks."""
    _server: forkserver.ForkServer = field(default_factory=forkserver.ForkServer)

    @contextlib.contextmanager
    def forks(self) -> Iterator[None]:
        """Makes multiprocessing's forkserver context fork new processes from this parent until the end of the context."""
        self._server.set_forkserver_preload([self.preload])
        before = dict(os.environ)
        os.environ.update(self.variables)
        try:
            self._server.ensure_running()
        finally:
            for name in self.variables.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
        connect = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = self._server.connect_to_new_process
        try:
            yield
        finally:
            forkserver.connect_to_new_process = connect


ON_CPU = Parent("tests.preloaded")


@dataclass
class Outcome:
    """Exit codes and logs of a run, with one entry per rank."""

    codes: list[int | None]
    """Exit codes, negative for a signal; None for a rank that was killed after the timeout."""
    logs: list[str]
    """Standard output and standard error of each rank."""

    @property
    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{log}" for rank, log in enumerate(self.logs))

    @property
    def errors(self) -> list[str]:
        """The error messages in the logs: from ``error:`` to the end of the log, because messages may have several lines."""
        return [part for log in self.logs for part in f"\n{log}".split("\nerror: ")[1:]]


@dataclass(kw_only=True)
class Rank:
    """The program of one rank, with arguments and environment."""

    program: Path
    arguments: Sequence[str]
    log: Path
    """File for standard output and standard error."""
    variables: dict[str, str]
    """Additional environment variables."""
    prepare: Sequence[Callable[[], None]] = ()
    """Functions to call in the process before the program. They are pickled."""

    def __call__(self) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ.update(self.variables)
        _fork_workers_from_the_parent()
        for prepare in self.prepare:
            prepare()
        sys.argv = [str(self.program), *self.arguments]
        runpy.run_path(str(self.program), run_name="__main__")


def run(
    ranks: Sequence[Rank],
    *,
    timeout_s: float,
    ends_with_first_failure: bool = False,
    parent: Parent = ON_CPU,
    has_launcher: bool = True,
) -> Outcome:
    """Runs all ranks at the same time and waits for their end.

    Args:
        ranks: one entry per rank.
        timeout_s: ranks that still run after this time are killed and have no exit code.
        ends_with_first_failure: if a rank fails, the others are killed. Otherwise ranks that wait for it run into the
            timeout, which shows that they hang.
        parent: the process that ranks are forked from.
        has_launcher: set the environment variables of torchrun.
    """
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    common = {
        "WORLD_SIZE": str(len(ranks)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(new_port()),
    }
    processes: list[ForkServerProcess] = []
    for number, rank in enumerate(ranks):
        if has_launcher:
            rank.variables = {**common, **rank.variables, "RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(context.Process(target=rank))
    with parent.forks(), _killed_at_the_end(processes):
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if ends_with_first_failure and any(process.exitcode for process in processes):
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
    return Outcome(codes, [r.log.read_text(errors="replace") if r.log.exists() else "" for r in ranks])


def _fork_workers_from_the_parent() -> None:
    """Lets the verifier's workers be forked from this rank's parent, which has imported the grader.

    A process that multiprocessing has forked knows its parent's address, but Python starts another fork server for its children.
    """
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]


def run_program(program: Path, arguments: Sequence[str], log: Path) -> int:
    """Stands in for examples.benchmark_reproduction.preloading.run_program, and raises an AssertionError if the program fails."""
    rank = Rank(program=program, arguments=arguments, log=log, variables={})
    outcome = run([rank], timeout_s=1100)
    assert outcome.codes == [0], outcome.output
    return 0


@contextlib.contextmanager
def _killed_at_the_end(processes: Sequence[ForkServerProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def call_on_ranks(function: Callable[[int, str], None], folder: Path, num: int) -> None:
    """Calls ``function(rank, folder)`` in ``num`` processes; an error that one of them raises is raised here."""
    import torch.multiprocessing as mp

    os.environ.update(ENVIRONMENT)
    with ON_CPU.forks():
        mp.start_processes(function, args=(str(folder),), nprocs=num, start_method="forkserver")
