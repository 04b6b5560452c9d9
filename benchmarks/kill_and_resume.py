"""Interrupts short runs at random moments, resumes each, and compares it bit for bit with a run without the interruption.

Usage:
    python benchmarks/kill_and_resume.py --rounds 200 --results rounds.jsonl
    python benchmarks/kill_and_resume.py --rounds 100 --slurm --results rounds_slurm.jsonl

A round has 1, 2 or 4 processes, SIGTERM or SIGKILL, for all processes or for one, and a moment: in a step, a refresh, a save, a save in
the background, the export, or the start. It is drawn from --seed and its number. Its result is one line of --results, and a second
call with the same file runs only the rounds that it lacks. The model is tiny and needs no GPU; a round takes about half a minute of CPU
time, and under --slurm, where each start imports everything anew, about two minutes. --slurm starts a Slurm cluster of four nodes on
this machine (root and Debian's slurm-wlm and munge) and submits the job script of examples/slurm; there the runs have two processes.

A round is identical, different, refused (the resumed run ends with an error), hung (it does not end), or missed (the run was over before
the signal, or in spite of it: SIGTERM does not interrupt an export).
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import psutil

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import forking
from tests.functional import launching
from tests.functional.conftest import Workshop, build_workshop
from tests.functional.test_resume import assert_same_run, flags_of
from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import LIMIT_S, Runs

Moment = Literal["step", "refresh", "save", "async save", "export", "start"]
Outcome = Literal["identical", "different", "refused", "hung", "missed"]

_WINDOWS_S: dict[Moment, float] = {
    "step": 0.1,
    "refresh": 0.3,
    "save": 0.05,
    "async save": 0.05,
    "export": 0.05,
    "start": 3.0,
}
"""The longest delay between the beginning of a moment and the signal, seconds. Under Slurm a start takes longer."""
_SLURM_START_S = 30.0
_TIMEOUT_S = 300.0


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


def draw(number: int, seed: int, *, is_slurm: bool = False) -> Round:
    """Returns the round of this number. Six rounds in a row have all moments."""
    moments: list[Moment] = list(get_args(Moment))
    random.Random(f"{seed}-{number // len(moments)}").shuffle(moments)
    choose = random.Random(f"{seed}-{number}-round")
    drawn = Round(
        number=number,
        num_processes=choose.choice((1, 2, 4)),
        moment=moments[number % len(moments)],
        signal=choose.choice(("TERM", "KILL")),
        hits_all=choose.random() < 0.5,
        share=choose.random(),
    )
    if not is_slurm:
        return drawn
    # two nodes with a process each; Slurm sends SIGTERM to every process of a step
    return replace(drawn, num_processes=2, hits_all=drawn.hits_all or drawn.signal == "TERM")


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

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Returns at the time of the signal; False if the run was over before."""
        while not self.has_begun():
            if is_over():
                return False
            time.sleep(0.002)
        window = self.start_s if self.round.moment == "start" else _WINDOWS_S[self.round.moment]
        time.sleep(window * self.round.share)
        return not is_over()

    def has_begun(self) -> bool:
        """Whether the moment has begun."""
        moment = self.round.moment
        if moment == "start":
            return True
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


@dataclass(frozen=True)
class Local:
    """Rounds whose processes are forked on this machine, as if torchrun had started them."""

    workshop: Workshop

    def run(self, round_: Round) -> Result:
        unbroken, save = self._unbroken(round_.num_processes), self.workshop.root / f"round{round_.number}"
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
    """Rounds of the job script of examples/slurm on a Slurm cluster of this machine."""

    runs: Runs

    def run(self, round_: Round) -> Result:
        name, cluster = f"round{round_.number}", self.runs.cluster
        if not self.runs.folder("undisturbed").exists():
            self.runs.undisturbed()
        flags = "--async-save" if round_.moment == "async save" else ""
        job = self.runs.submit(name, flags=flags)
        save = self.runs.folder(name) / "checkpoints"
        strike = Strike(
            round=round_,
            save=save,
            export=self.runs.folder(name) / "hf",
            saved_steps=(3, 6, 9),
            last_steps=(4, 5, 9),
            start_s=_SLURM_START_S,
        )
        cluster.wait_until(job, "RUNNING", timeout_s=LIMIT_S)
        is_hit = strike.wait(lambda: cluster.facts(job).get("JobState") != "RUNNING")
        if is_hit:
            self._send(round_, name, job)
        began_at = time.time()
        try:
            facts = self._finish(job)
            if facts["JobState"] == "FAILED":  # before its first checkpoint a job is not requeued
                began_at = time.time()
                facts = self.runs.wait_for_end(self.runs.submit(name, flags=flags))
        except TimeoutError as error:
            return Result(round=round_, outcome="hung", detail=str(error))
        if facts["JobState"] != "COMPLETED":
            return Result(round=round_, outcome="refused", detail=self.runs.log(name)[-2000:])
        return judged(round_, partial(self.runs.assert_same, name), save, began_at, is_missed=not is_hit)

    def _send(self, round_: Round, name: str, job: str) -> None:
        if round_.signal == "TERM":
            self.runs.cluster.run("scancel", "--signal=TERM", job)
            return
        ranks = {"RANK": "1"} if not round_.hits_all else {}
        for process in self.runs.processes(name, "pretrain_rasft.py", **ranks):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _finish(self, job: str) -> dict[str, str]:
        """Starts the job again as often as it is requeued, and waits for its end."""
        restarts = 0
        deadline = time.monotonic() + LIMIT_S
        while True:
            facts = self.runs.cluster.facts(job)
            if facts.get("JobState") in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"):
                return facts
            if int(facts.get("Restarts", 0)) > restarts:
                restarts += 1
                self.runs.cluster.start_now(job, restarts, LIMIT_S)
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} does not end: {facts}")
            time.sleep(1.0)


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


def known_results(file: Path | None) -> dict[int, dict[str, object]]:
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


def summary(results: Sequence[dict[str, object]]) -> str:
    """Returns the counts of the outcomes, and the times to the first new step."""
    counts = Counter(str(result["outcome"]) for result in results)
    shown = ", ".join(f"{counts[name]} {name}" for name in get_args(Outcome))
    times = [float(str(t)) for result in results if (t := result["first_step_s"]) is not None]
    line = f"{len(results)} rounds: {shown}"
    if times:
        line += (
            f"; first new step after {statistics.median(times):.1f} s (median), {max(times):.1f} s (longest)"
        )
    return line


def run_rounds(
    run: Callable[[Round], Result], args: argparse.Namespace, known: dict[int, dict[str, object]]
) -> list[dict[str, object]]:
    """Runs the rounds that are not known, and appends each to --results."""
    for number in range(args.rounds):
        if number in known:
            continue
        result = run(draw(number, args.seed, is_slurm=args.slurm))
        known[number] = asdict(result)
        if args.results is not None:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[number]) + "\n")
        at = result.round
        whom = "all" if at.hits_all else "one"
        print(
            f"{number}: {at.num_processes} processes, {at.signal} to {whom} in {at.moment}: {result.outcome}",
            flush=True,
        )
    return [known[number] for number in range(args.rounds)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="file of results, which is continued")
    parser.add_argument("--slurm", action="store_true", help="run under a Slurm cluster on this machine")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {args.rounds}. Use 6 to see each moment once.")
    if args.slurm and (reason := missing()):
        parser.error(f"--slurm: {reason}. Or leave the flag out.")
    if args.results is not None and not args.results.absolute().parent.is_dir():
        parser.error(f"--results {args.results}: its folder does not exist. Make it, or name another file.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 1 if a round is different, refused or hung."""
    args = parse(argv)
    known = known_results(args.results)
    with tempfile.TemporaryDirectory() as folder:
        if args.slurm:
            with Cluster() as cluster:
                results = run_rounds(UnderSlurm(Runs(cluster, Path(folder))).run, args, known)
        else:
            results = run_rounds(Local(build_workshop(Path(folder))).run, args, known)
    print(summary(results))
    return int(any(result["outcome"] in ("different", "refused", "hung") for result in results))


if __name__ == "__main__":
    sys.exit(main())
