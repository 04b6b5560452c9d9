"""Prints the share of mutants that the tests kill, for each file, and fails below 95 %: the last step of `make mutants`.

A mutant is a copy of a function with one change (an operator, a number, an argument). It is killed if a test fails or takes too long. One
that survives is a change that no test notices, or that changes no result. `python -m mutmut show NAME` prints it.
"""

import json
import sys
from pathlib import Path

KILLED = {1, 3, 24, -24, 152, 36, 255, -9, -11}
"""Exit codes of pytest for a failed test, and of a process that ran out of time or crashed (``status_by_exit_code`` of mutmut)."""
LEAST_SHARE = 0.95


def main(folder: Path) -> int:
    num_killed = num_run = num_left = 0
    for path in sorted(folder.rglob("*.meta")):
        codes: dict[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
        run = {name: code for name, code in codes.items() if code is not None}
        survivors = [name for name, code in run.items() if code not in KILLED]
        if run:
            print(_line(len(run) - len(survivors), len(run), str(path.relative_to(folder).with_suffix(""))))
        for name in survivors:
            print(f"    {name}")
        num_killed += len(run) - len(survivors)
        num_run += len(run)
        num_left += len(codes) - len(run)
    print(_line(num_killed, num_run, f"all files; {LEAST_SHARE:.0%} are required; {num_left} were not run"))
    return int(num_left > 0 or num_killed < LEAST_SHARE * num_run or num_run == 0)


def _line(killed: int, total: int, name: str) -> str:
    return f"{killed:5} of {total:5}  {killed / max(total, 1):6.1%}  {name}"


if __name__ == "__main__":
    sys.exit(main(Path("mutants")))
