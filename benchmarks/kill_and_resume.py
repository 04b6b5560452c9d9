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
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interruption_table import Line, known_results, summary, table
from benchmarks.interruptions import Outcome, Result, Round, Strike, draw, judged
from benchmarks.interruptions_under_slurm import UnderSlurm
from tests import forking
from tests.functional import launching
from tests.functional.conftest import Workshop, build_workshop
from tests.functional.test_resume import assert_same_run, flags_of
from tests.slurm.cluster import Cluster, missing

FAILURES: tuple[Outcome, ...] = ("different", "refused", "hung")
_START_S = 3.0
_TIMEOUT_S = 300.0


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
            start_s=_START_S,
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
