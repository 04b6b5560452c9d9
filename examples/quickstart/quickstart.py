"""Trains a small real model with RASFT on a CPU, and prints its solve rate before and after.

Runs pretrain_rasft.py once for each objective, on the same problems, batches, steps and learning rate. That program also
measures the solve rate on held-out problems, on which it never trains.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.quickstart.make_arithmetic import KINDS, write_task
from tools import report

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("rasft", "sft", "dft")
BATCH = 16
SAVE = "checkpoints"
"""Name of the --save folder of a run."""


def training_flags(args: argparse.Namespace, objective: str, output: Path) -> list[str]:
    """Returns the flags of a run. Runs differ only in the objective."""
    flags = {
        "--hf-model": args.hf_model,
        "--train-data": args.output / "data" / "train.jsonl",
        "--heldout-data": args.output / "data" / "heldout.jsonl",
        "--objective": objective,
        "--data-system-prompt": "You solve arithmetic.",
        "--data-prompt-suffix": "",
        "--seq-length": 128,
        "--micro-batch-size": 4,
        "--global-batch-size": BATCH,
        "--rasft-refresh-interval": 3,
        "--rollout-num-samples": 4,
        "--rollout-max-new-tokens": 40,
        "--lr": args.lr,
        # Adam's first steps are large. A warm-up must be shorter than the run.
        "--lr-warmup-iters": min(2, -(-args.num_train // BATCH) - 1),
        "--save": output / SAVE,
        "--export-hf": output / "model",
        "--tensorboard-dir": output / "tensorboard",
    }
    # Correct solutions are shorter than the shortest response that the filter accepts by default. The optimizer's state is larger than
    # the model, and nothing continues the run.
    switches = ["--no-verify-filter-too-short", "--no-save-optim"]
    return [str(part) for pair in flags.items() for part in pair] + switches


def run(args: argparse.Namespace, objective: str, output: Path) -> tuple[float, float, float]:
    """Trains with one objective. Returns the held-out solve rate before and after, and the seconds."""
    output.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(ROOT / "pretrain_rasft.py"), *training_flags(args, objective, output)]
    began = time.monotonic()
    rates: list[float] = []
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.run(command, env={**os.environ, **threads}, check=False)
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    for line in (output / SAVE / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "heldout/solve_rate" in values:
            rates.append(values["heldout/solve_rate"])
    return rates[0], rates[-1], time.monotonic() - began


def main() -> None:
    """Makes the task, trains, and prints the table of solve rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = ROOT / ".cache"
    parser.add_argument("--hf-model", type=Path, default=cache / "smollm2-135m-instruct", help="model folder")
    parser.add_argument(
        "--output", type=Path, default=cache / "quickstart", help="folder of the problems and the runs"
    )
    parser.add_argument(
        "--num-train",
        type=int,
        default=96,
        help=f"problems to train on, {BATCH} for each step (default: %(default)s)",
    )
    parser.add_argument(
        "--num-heldout", type=int, default=50, help="held-out problems (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--compare", action="store_true", help="also train with sft and dft, for the same steps"
    )
    args = parser.parse_args()
    try:
        write_task(args.output / "data", KINDS, args.num_train, args.num_heldout, seed=1234)
    except ValueError as error:
        parser.error(str(error))
    table = Table(title="held-out problems solved, greedy")
    for column in ("objective", "before", "after", "minutes"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    folders = []
    for objective in OBJECTIVES if args.compare else OBJECTIVES[:1]:
        output = args.output / f"{objective}-{time.strftime('%Y%m%d-%H%M%S')}"
        folders.append(output / SAVE)
        before, after, seconds = run(args, objective, output)
        table.add_row(objective, f"{before:.1%}", f"{after:.1%}", f"{seconds / 60:.1f}")
    Console().print(table)
    print(write_report(folders, args.output / "report.html"))


def write_report(runs: list[Path], output: Path) -> str:
    """Writes the page about the runs. Returns a line with the name of the page, or with the command that writes it."""
    arguments = [*map(str, runs), "--output", str(output)]
    if report.main(arguments) == 0:
        return f"curves, problems and rollouts: open {output} in a browser"
    return f"curves, problems and rollouts: {shlex.join(['python', 'tools/report.py', *arguments])}"


if __name__ == "__main__":
    main()
