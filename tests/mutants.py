"""Runs mutmut, and prints the share of mutants that the tests kill: `make mutants`.

    python -m tests.mutants [--sample NUM] [--seed NUM]

A mutant is a copy of a function with one change (an operator, a number, an argument). It is killed if a test fails or takes too long. One
that survives is a change that no test notices, or that changes no result. `python -m mutmut show NAME` prints it.

With --sample, NUM random mutants of each entry of mutmut's only_mutate (pyproject.toml) run, and the share of all has a confidence
interval. The exit status is 1 if fewer than 95 % are killed, for a sample only if the whole interval is below 95 %.
"""

import argparse
import fnmatch
import json
import math
import random
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = {1, 3, 24, -24, 152, 36, 255, -9, -11}
"""Exit codes of pytest for a failed test, and of a process that ran out of time or crashed (``status_by_exit_code`` of mutmut)."""
LEAST_SHARE = 0.95
DEVIATIONS = 1.96
"""Standard deviations of a normal variable on both sides of its mean that have a probability of 95 %."""


@dataclass(kw_only=True)
class Count:
    """The mutants that ran of a file or of an entry of only_mutate."""

    killed: int = 0
    run: int = 0
    total: int = 0

    def add(self, other: "Count") -> None:
        self.killed += other.killed
        self.run += other.run
        self.total += other.total

    @property
    def share(self) -> float:
        return self.killed / max(self.run, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the share of all mutants, if those that ran are a random sample."""
        num = max(self.run, 1)
        square = DEVIATIONS**2 / num
        middle = (self.share + square / 2) / (1 + square)
        half = DEVIATIONS * math.sqrt(self.share * (1 - self.share) / num + square / num / 4) / (1 + square)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def line(self, name: str) -> str:
        shown = f"{self.killed:5} of {self.run:5}  {self.share:6.1%}"
        if self.run < self.total:
            low, high = self.interval
            shown += f"  ({low:.1%} to {high:.1%} of {self.total})"
        return f"{shown}  {name}"


def only_mutate(project: Path = Path("pyproject.toml")) -> list[str]:
    return tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["mutmut"]["only_mutate"]


def entry_of(path: str, entries: Iterable[str]) -> str:
    """The entry of only_mutate to which a source file belongs."""
    return next(entry for entry in entries if fnmatch.fnmatch(path, entry))


def sample(names: dict[str, list[str]], num: int, seed: int) -> set[str]:
    """Draws up to ``num`` mutants of each entry. ``names``: entry -> the names of its mutants."""
    draw = random.Random(seed)
    return {
        name
        for _, all_of_it in sorted(names.items())
        for name in draw.sample(sorted(all_of_it), min(num, len(all_of_it)))
    }


def run_sample(num: int, seed: int) -> None:
    """Runs mutmut on a sample. mutmut itself can only choose by name, which requires that the mutants exist already."""
    from mutmut import __main__ as mutmut  # type: ignore[import-not-found]  # only `make mutants` installs it

    collect = mutmut.collect_source_file_mutation_data

    def collect_sample(*, mutant_names: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        mutants, files = collect(mutant_names=mutant_names)
        names: dict[str, list[str]] = {}
        for file, name, _ in mutants:
            names.setdefault(entry_of(str(file.path), only_mutate()), []).append(name)
        chosen = sample(names, num, seed)
        return [mutant for mutant in mutants if mutant[1] in chosen], files

    mutmut.collect_source_file_mutation_data = collect_sample
    mutmut._run((), None)


def report(folder: Path, entries: Sequence[str]) -> Count:
    """Prints the share of each file and entry and the survivors, and returns the sum."""
    counts = {entry: Count() for entry in entries}
    for path in sorted(folder.rglob("*.meta")):
        name = str(path.relative_to(folder).with_suffix(""))
        codes: dict[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
        survivors = [key for key, code in codes.items() if code is not None and code not in KILLED]
        num_run = sum(code is not None for code in codes.values())
        count = Count(killed=num_run - len(survivors), run=num_run, total=len(codes))
        if num_run:
            print(count.line(name))
        for survivor in survivors:
            print(f"    {survivor}")
        counts[entry_of(name, entries)].add(count)
    print()
    whole = Count()
    for entry, count in counts.items():
        print(count.line(entry))
        whole.add(count)
    print(whole.line(f"all; {LEAST_SHARE:.0%} are required"))
    return whole


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sample", type=int, default=0, metavar="NUM", help="mutants of each entry; 0 runs all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="NUM", help="seed of the sample")
    options = parser.parse_args(given)
    run_sample(options.sample or sys.maxsize, options.seed)
    whole = report(Path("mutants"), only_mutate())
    best = whole.interval[1] if options.sample else whole.share
    is_complete = options.sample > 0 or whole.run == whole.total
    return int(not is_complete or best < LEAST_SHARE or whole.run == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
