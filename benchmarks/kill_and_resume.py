"""Interrupts short runs at random moments, resumes each, and compares it bit for bit with a run without the interruption.

Usage:
    python benchmarks/kill_and_resume.py --rounds 200 --results rounds.jsonl
    python benchmarks/kill_and_resume.py --rounds 100 --slurm --results rounds_slurm.jsonl

A round has 1, 2 or 4 processes, SIGTERM or SIGKILL, for all processes or for one, and a moment: in a step, a refresh, a save, a save in
the background, the export, or the start. It is drawn from --seed and its number. Its result is one line of --results, and a second
call with the same file runs only the rounds that it lacks. The model is tiny and needs no GPU. --slurm starts a Slurm cluster of four
nodes on this machine (root and Debian's slurm-wlm and munge) and submits the job script of examples/slurm: one node with a process, or
two nodes with one or two. A round takes about half a minute of CPU time, and under --slurm, where each start imports everything anew,
about a minute.

A round is identical, different, refused (the resumed run ends with an error), hung (it does not end), or missed (the run was over before
the signal, or in spite of it: SIGTERM does not interrupt an export). Files of a round that is different, refused or hung are kept beside
--results. --table prints the counts of several files of results, without running anything:

    python benchmarks/kill_and_resume.py --table rounds.jsonl rounds_slurm.jsonl
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import psutil

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import forking
from tests.functional import launching
from tests.functional.conftest import Workshop, build_workshop
from tests.functional.test_resume import assert_same_run, flags_of
from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import Runs

Moment = Literal["step", "refresh", "save", "async save", "export", "start"]
Outcome = Literal["identical", "different", "refused", "hung", "missed"]
Line = dict[str, Any]
"""A line of --results: the fields of ``Result``."""
FAILURES: tuple[Outcome, ...] = ("different", "refused", "hung")

_WINDOWS_S: dict[Moment, float] = {
    "step": 0.1,
    "refresh": 0.3,
    "save": 0.05,
    "async save": 0.05,
    "export": 0.05,
    "start": 3.0,
}
"""The longest delay between the beginning of a moment and the signal, seconds. Under Slurm a start takes longer."""
_SLURM_START_S = 20.0
_TIMEOUT_S = 300.0
_SLURM_TIMEOUT_S = 1800.0
"""The longest wait for a job, of which several run at the same time. A run that stands still ends itself much earlier."""
_CHECK_S = 1.0
"""Time between two questions to Slurm about a job."""
_ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
"""Slurm's states of a job that is over."""
_LAYOUTS = {
    1: "--num-gpus 1 --gpus-per-node 1",
    2: "--num-gpus 2 --gpus-per-node 1",
    4: "--num-gpus 4 --gpus-per-node 2 --micro-batch-size 2",
}
"""Number of processes -> flags of tools/plan.py for a run under Slurm."""


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
    logs: Path | None = None
    """Folder in which the trainer's logs begin with the start; None for a run that has started."""

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Returns at the time of the signal; False if the run was over before."""
        check_at = time.monotonic()
        while not self.has_begun():
            if time.monotonic() >= check_at:
                if is_over():
                    return False
                check_at = time.monotonic() + _CHECK_S
            time.sleep(0.002)
        window = self.start_s if self.round.moment == "start" else _WINDOWS_S[self.round.moment]
        time.sleep(window * self.round.share)
        return not is_over()

    def has_begun(self) -> bool:
        """Whether the moment has begun."""
        moment = self.round.moment
        if moment == "start":
            return self.logs is None or any(self.logs.glob("trainer-*.log"))
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
    """Seconds from the start of the resumed run to its first new step; None if no step was left, or it failed."""


class Rounds(Protocol):
    """A way to run rounds."""

    def run(self, round_: Round) -> Result:
        """Interrupts a run, resumes it, and compares it."""

    def root(self, round_: Round) -> Path:
        """The folder in which the names of this round's files begin with the round's name."""


@dataclass(frozen=True)
class Local:
    """Rounds whose processes are forked on this machine, as if torchrun had started them."""

    workshop: Workshop

    def root(self, round_: Round) -> Path:
        return self.workshop.root

    def run(self, round_: Round) -> Result:
        unbroken, save = self._unbroken(round_.num_processes), self.workshop.root / round_.name
        strike = Strike(
            round=round_,
            save=save,
            export=Path(f"{save}-exported"),
            saved_steps=(2, 4, 6, 8),
            last_steps=(3, 5, 8),
            start_s=_WINDOWS_S["start"],
        )
        began = time.monotonic()
        codes = self._start(save, round_, strike).codes
        if time.monotonic() - began >= _TIMEOUT_S:
            return Result(round=round_, outcome="hung", detail="the interrupted run")
        is_missed = codes == [0] * round_.num_processes and strike.export.exists()
        began, began_at = time.monotonic(), time.time()
        outcome = self._start(save, round_)
        if time.monotonic() - began >= _TIMEOUT_S:
            return Result(round=round_, outcome="hung", detail="the resumed run")
        if any(outcome.codes):
            return Result(round=round_, outcome="refused", detail=outcome.output[-2000:])
        return judged(round_, partial(assert_same_run, save, unbroken), save, began_at, is_missed=is_missed)

    def _start(self, save: Path, round_: Round, strike: Strike | None = None) -> forking.Outcome:
        more = ["--async-save"] if round_.moment == "async save" else []
        flags = self.workshop.flags("--save", str(save), *_flags(save, round_.num_processes), *more)
        logs = save.with_name(f"{save.name}-logs")
        logs.mkdir(exist_ok=True)
        hit = range(round_.num_processes) if round_.hits_all else [round_.num_processes - 1]
        ranks = [
            forking.Rank(
                program=launching.PROGRAM,
                arguments=flags,
                log=logs / f"rank{number}.log",
                variables={},
                prepare=[strike] if strike is not None and number in hit else [],
            )
            for number in range(round_.num_processes)
        ]
        return forking.run(ranks, timeout_s=_TIMEOUT_S, ends_with_first_failure=True)

    def _unbroken(self, num_processes: int) -> Path:
        save = self.workshop.root / f"unbroken{num_processes}"
        if not save.exists():
            self.workshop.train(save, _flags(save, num_processes), num_processes)
        return save


def _flags(save: Path, num_processes: int) -> list[str]:
    """Two replicas of two processes, if there are four: a batch of the tiny model has two micro-batches."""
    return [*flags_of(save), "--tensor-model-parallel-size", "2" if num_processes == 4 else "1"]


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
            start_s=_SLURM_START_S,
            logs=runs.folder(name) / "logs",
        )
        try:
            self._wait_for(job, "RUNNING", *_ENDS)
            is_missed = not strike.wait(lambda: self.cluster.facts(job).get("JobState") in _ENDS)
            if not is_missed:
                self._send(round_, job)
            began_at = time.time()
            facts = self._finish(job)
            is_missed = is_missed or (facts["JobState"] == "COMPLETED" and facts["Restarts"] == "0")
            if facts["JobState"] == "FAILED":  # before its first checkpoint a job is not requeued
                began_at = time.time()
                job = runs.submit(name, flags=flags)
                facts = self._finish(job)
        except TimeoutError as error:
            self.cluster.run("scancel", "--signal=KILL", "--full", job)
            return Result(round=round_, outcome="hung", detail=f"{error}\n{runs.log(name)[-2000:]}")
        if facts["JobState"] != "COMPLETED":
            return Result(round=round_, outcome="refused", detail=runs.log(name)[-2000:])
        return judged(round_, partial(runs.assert_same, name), save, began_at, is_missed=is_missed)

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
        return self.cluster.wait_until(job, *states, timeout_s=_SLURM_TIMEOUT_S, every_s=_CHECK_S)

    def _finish(self, job: str) -> dict[str, str]:
        """Starts the job again as often as it is requeued, and waits for its end."""
        restarts = 0
        while (facts := self._wait_for(job, *_ENDS, "PENDING"))["JobState"] == "PENDING":
            restarts = max(restarts, int(facts["Restarts"]))
            if restarts:
                self.cluster.start_now(job, restarts, _SLURM_TIMEOUT_S)
            else:
                self._wait_for(job, "RUNNING", *_ENDS)
        return facts


def judged(
    round_: Round, compare: Callable[[], None], save: Path, began_at: float, *, is_missed: bool
) -> Result:
    """Compares the resumed run with the undisturbed one.

    Args:
        began_at: start of the resumed run, seconds since 1970.
        is_missed: whether the run was over before the signal or in spite of it.
    """
    try:
        compare()
    except AssertionError as error:
        return Result(round=round_, outcome="different", detail=str(error)[:2000])
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    times = [r["time"] for r in records if r["event"] == "step" and r["time"] > began_at]
    return Result(
        round=round_,
        outcome="missed" if is_missed else "identical",
        first_step_s=None if is_missed or not times else min(times) - began_at,
    )


def known_results(file: Path | None) -> dict[int, Line]:
    """Reads the results of an earlier call: number of a round -> its line.

    Raises:
        ValueError: a line is not a result.
    """
    if file is None or not file.exists():
        return {}
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            found[values["round"]["number"]] = values
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--results {file}, line {number} is not the result of a round. Remove the line, or name another file."
            ) from error
    return found


def summary(results: Sequence[Line]) -> str:
    """Returns the counts of the outcomes, and the times to the first new step."""
    counts = Counter(result["outcome"] for result in results)
    shown = ", ".join(f"{counts[name]} {name}" for name in get_args(Outcome))
    line = f"{len(results)} rounds: {shown}"
    if times := _times(results):
        line += (
            f"; first new step after {statistics.median(times):.1f} s (median), {max(times):.1f} s (longest)"
        )
    return line


def _times(results: Sequence[Line]) -> list[float]:
    return [time_s for result in results if (time_s := result["first_step_s"]) is not None]


_GROUPS: tuple[tuple[str, Callable[[Line], str]], ...] = (
    ("all", lambda round_: ""),
    ("processes", lambda round_: str(round_["num_processes"])),
    ("signal", lambda round_: f"SIG{round_['signal']} to {'all' if round_['hits_all'] else 'one'}"),
    ("moment", lambda round_: round_["moment"]),
)
"""The lines of the table: a word, and the part of a round whose values have a line each."""


def table(results: Sequence[Line]) -> str:
    """Returns a Markdown table with the outcomes of all rounds, and by processes, signal and moment."""
    heads = ["rounds", "", *get_args(Outcome), "first new step, s (median)", "(longest)"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for word, part in _GROUPS:
        for value in sorted({part(result["round"]) for result in results}):
            chosen = [result for result in results if part(result["round"]) == value]
            lines.append([word, value, *_cells(chosen)])
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def _cells(results: Sequence[Line]) -> list[str]:
    counts = Counter(result["outcome"] for result in results)
    times = _times(results)
    measured = [f"{statistics.median(times):.1f}", f"{max(times):.1f}"] if times else ["", ""]
    return [*(str(counts[name]) for name in get_args(Outcome)), *measured]


def run_rounds(rounds: Rounds, args: argparse.Namespace, known: dict[int, Line]) -> None:
    """Runs the rounds that are not known, ``--at-once`` at a time, and appends each to --results."""
    with _pool(args.at_once) as pool:
        lacking = [draw(number, args.seed) for number in range(args.rounds) if number not in known]
        for done in as_completed([pool.submit(rounds.run, round_) for round_ in lacking]):
            result = done.result()
            known[result.round.number] = asdict(result)
            _report(result, args.results)
            _clear(result, rounds.root(result.round), args.results)


@contextmanager
def _pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool. An error ends it without the rounds that have not begun."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _report(result: Result, file: Path | None) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(asdict(result)) + "\n")
    at = result.round
    whom = "all" if at.hits_all else "one"
    print(
        f"{at.number}: {at.num_processes} processes, {at.signal} to {whom} in {at.moment}: {result.outcome}",
        flush=True,
    )


def _clear(result: Result, root: Path, file: Path | None) -> None:
    """Removes the files of a round, or moves those of a failed one beside --results."""
    is_kept = file is not None and result.outcome in FAILURES
    for path in root.glob(f"{result.round.name}*"):
        if file is not None and is_kept:
            kept = file.with_name(f"{file.stem}-failed")
            kept.mkdir(exist_ok=True)
            shutil.move(path, kept / path.name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="file of results, which is continued")
    parser.add_argument("--slurm", action="store_true", help="run under a Slurm cluster on this machine")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="rounds at the same time, with --slurm (default: 1)",
    )
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="print the counts of these results"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {args.rounds}. Use 6 to see each moment once.")
    if args.at_once < 1 or (args.at_once > 1 and not args.slurm):
        parser.error(
            f"--at-once must be 1, or more with --slurm, got {args.at_once}. Add --slurm, or leave it out."
        )
    if args.slurm and (reason := missing()):
        parser.error(f"--slurm: {reason}. Or leave the flag out.")
    if absent := [str(file) for file in args.table or [] if not file.is_file()]:
        parser.error(f"--table: {', '.join(absent)} not found. Name files of --results.")
    if args.results is not None and not args.results.absolute().parent.is_dir():
        parser.error(f"--results {args.results}: its folder does not exist. Make it, or name another file.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 1 if a round is different, refused or hung."""
    args = parse(argv)
    if args.table:
        print(table([line for file in args.table for line in known_results(file).values()]))
        return 0
    known = known_results(args.results)
    with tempfile.TemporaryDirectory() as folder:
        if args.slurm:
            with Cluster() as cluster:
                under_slurm = UnderSlurm(cluster, Path(folder))
                under_slurm.prepare()
                run_rounds(under_slurm, args, known)
        else:
            run_rounds(Local(build_workshop(Path(folder))), args, known)
    results = [known[number] for number in range(args.rounds)]
    print(summary(results))
    return int(any(result["outcome"] in FAILURES for result in results))


if __name__ == "__main__":
    sys.exit(main())
