"""Estimates memory and time of every layout of a model on a cluster, before the cluster is rented.

    python tools/plan.py --hf-model DIR --num-gpus 64 [--gpu-memory-gib 80] [--seq-length 8192] [--bf16 | --fp8]
    python tools/plan.py --hf-model DIR --num-gpus 64 --train-data train.jsonl --slurm runs/first    writes a Slurm job
    python tools/plan.py --hf-model DIR --config examples/recipes/qwen3-8b.toml                      plans a recipe

DIR needs only a config.json. The tool prints the layouts that fit with their memory and times, recommends one and prints the
commands that start it. Sizes of parameters, gradients and optimizer states are exactly those that Megatron allocates. All other
figures are calculated from assumed speeds, which are printed with their flags. The tool needs neither a GPU nor torch.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

if not __package__:  # lets the file run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.config.config_file import naming_lines
from megatron_rasft.config.parser import add_flags
from megatron_rasft.tools import cli
from megatron_rasft.tools.capacity.choosing import LayoutEstimate, disk_bytes, estimate_layouts, nothing_fits
from megatron_rasft.tools.capacity.commands import command_lines
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layout_tables import (
    Table,
    as_values,
    assumption_table,
    best_of_each,
    disk_table,
    layout_table,
    memory_table,
    summary,
    time_table,
)
from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.recipes import PLAN_TABLE, PlanParser
from megatron_rasft.tools.capacity.slurm import on_whole_nodes, write_job
from megatron_rasft.wording import counted

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if a layout fits, 1 if none does."""
    argv = sys.argv[1:] if argv is None else argv
    with naming_lines(argv, PLAN_TABLE):
        return _plan(parser().parse_args(argv))


def _plan(args: argparse.Namespace) -> int:
    config, assumed = CapacityConfig.from_args(args), AssumptionConfig.from_args(args)
    precision = "fp8" if args.fp8 else "bf16"
    if args.top < 1:
        raise ValueError(f"--top must be >= 1, got {args.top}. Use 1 for the recommended layout only.")
    model = Model.read(args.hf_model, config.rasft_query_groups)
    estimates = estimate_layouts(model, config, assumed, precision=precision)
    if args.slurm is not None:
        estimates = on_whole_nodes(estimates, config)
    failure = nothing_fits(estimates, model, config, assumed, precision=precision)
    fitting = [p for p in estimates if p.excess_gib(config) <= 0]
    shown = best_of_each(fitting or estimates)[: args.top]
    commands = [] if failure else commands_for(args.slurm, model, shown[0], config, precision)
    disk = disk_bytes(model, config, assumed)
    assumptions = assumption_table(model, config, assumed, precision=precision)
    if args.json:
        values: dict[str, Any] = {
            "model": {
                "path": model.path,
                "architecture": model.family.architecture,
                "num_parameters": model.num_parameters,
                "num_active_parameters": model.num_active_parameters,
            },
            "assumptions": [dict(zip(assumptions.header, row, strict=True)) for row in assumptions.rows],
            "layouts": [as_values(p, config) for p in shown],
            "num_fitting": len(fitting),
            "disk": {name: getattr(disk, name) for name in (*disk.__dataclass_fields__, "total")},
            "commands": commands,
        }
        print(json.dumps(values, indent=1))
    else:
        print(summary(model, config, precision=precision))
        show(layout_table(shown, config))
        show(memory_table(shown))
        show(time_table(shown))
        show(disk_table(disk, shown[0].memory.host, config))
        show(assumptions)
    if failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if not args.json:
        run = shown[0].run
        print(
            f"\nTake layout 1: {counted(run.num_steps, 'step')} and {counted(run.num_refreshes, 'refresh', 'refreshes')}, {run.hours:.1f} hours, "
            f"{run.gpu_hours:.0f} GPU-hours"
        )
        print("\n".join(f"    {line}" for line in commands))
    return 0


def commands_for(
    folder: Path | None, model: Model, estimate: LayoutEstimate, config: CapacityConfig, precision: str
) -> list[str]:
    """Returns the commands that start the run.

    With --slurm it writes the job's files and returns the command that submits them.

    Args:
        folder: --slurm.
    """
    if folder is None:
        return command_lines(model, estimate, config, precision=precision)
    script = write_job(folder, model, estimate, config, precision=precision, checkout=ROOT)
    return [f"sbatch {shlex.quote(str(script))}"]


def show(table: Table) -> None:
    """Prints a table: with colours and lines on a terminal, as aligned text elsewhere."""
    print()
    if not sys.stdout.isatty():
        print(table.plain())
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
    for i, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if i == 0 or name in table.words else "right")
    for number, row in enumerate(table.rows):
        drawn.add_row(*row, style="green" if number == 0 and table.header[0] == "#" else None)
    Console().print(drawn)


def parser() -> argparse.ArgumentParser:
    """Builds the parser with all flags."""
    made = PlanParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--hf-model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face folder. Only its config.json is read.",
    )
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--bf16", action="store_true", help="Train in BF16. This is the default.")
    kinds.add_argument("--fp8", action="store_true", help="Train the linear layers in FP8.")
    made.add_argument(
        "--top", type=int, default=8, metavar="N", help="Number of layouts to print. Default: 8"
    )
    made.add_argument(
        "--slurm",
        type=Path,
        metavar="DIR",
        help="Write a Slurm job for layout 1 into this folder, which all nodes must share: rasft.sbatch, settings.sh and network.sh.",
    )
    made.add_argument(
        "--json", action="store_true", help="Print one JSON object, in bytes, seconds and hours."
    )
    add_flags(made.add_argument_group("cluster and run", CapacityConfig.__doc__), CapacityConfig)
    add_flags(made.add_argument_group("assumptions", AssumptionConfig.__doc__), AssumptionConfig)
    return made


if __name__ == "__main__":
    sys.exit(cli.run(main))
