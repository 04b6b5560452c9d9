"""Trains a small real model with RASFT on a CPU, and prints its solve rate before and after.

Runs pretrain_rasft.py once for each objective, on the same problems, batches, steps and learning rate. That program also
measures the solve rate on held-out problems, on which it never trains.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.quickstart.make_arithmetic import KINDS, write_task

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("rasft", "sft", "dft")
BATCH = 16


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
        "--export-hf": output / "model",
        "--tensorboard-dir": output / "tensorboard",
        "--rollout-store": output / "rollouts.jsonl",
    }
    # Correct solutions are shorter than the shortest response that the filter accepts by default.
    return [str(part) for pair in flags.items() for part in pair] + ["--no-verify-filter-too-short"]


def run(args: argparse.Namespace, objective: str) -> tuple[float, float, float]:
    """Trains with one objective. Returns the held-out solve rate before and after, and the seconds."""
    output = args.output / f"{objective}-{time.strftime('%Y%m%d-%H%M%S')}"
    output.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(ROOT / "pretrain_rasft.py"), *training_flags(args, objective, output)]
    began = time.monotonic()
    rates: list[float] = []
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    metrics = output / "metrics.jsonl"
    process = subprocess.run(
        [*command, "--rasft-metrics", str(metrics)], env={**os.environ, **threads}, check=False
    )
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    for line in metrics.read_text(encoding="utf-8").splitlines():
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
    for objective in OBJECTIVES if args.compare else OBJECTIVES[:1]:
        before, after, seconds = run(args, objective)
        table.add_row(objective, f"{before:.1%}", f"{after:.1%}", f"{seconds / 60:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
