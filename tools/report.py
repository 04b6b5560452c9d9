"""Writes one HTML page about a run, or about several side by side: curves, problems, rollouts and settings.

report.py RUN_DIR [RUN_DIR ...] --output report.html
report.py [RUN_DIR] [--metrics FILE] [--rollouts FILE] [--train-data FILE ...] --output report.html

Needs the extra "report": pip install 'megatron-rasft[report]'
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # lets the file run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.files import write_text
from megatron_rasft.tools import cli
from megatron_rasft.tools.report import charts
from megatron_rasft.tools.report.page import page
from megatron_rasft.tools.report.records import RunRecords, read_run
from megatron_rasft.tools.report.views import read_view

_VAGUE_NAMES = {"save", "checkpoints", "checkpoint"}
"""Common names of --save folders, which do not identify a run."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code as ``cli.run`` defines it."""
    return cli.run(report, _build_parser().parse_args(argv))


def report(args: argparse.Namespace) -> None:
    """Reads the runs and writes the page.

    Raises:
        ValueError: the arguments contradict each other, or name files that cannot be read or written.
        RasftError: the package that draws the charts is not installed.
    """
    _check_arguments(args)
    charts.script()  # A missing package is reported before files are read, which can take minutes.
    folders: list[Path | None] = [Path(run) for run in args.runs] or [None]
    runs = [read_run(folder, args.metrics, args.rollouts) for folder in folders]
    _set_unique_names(runs, folders)
    inputs = [path for run in runs for path in (run.metrics_path, run.rollouts_path) if path is not None]
    _check_output(args.output, inputs)
    content = page([read_view(run, args.train_data, args.num_examples) for run in runs])
    write_text(args.output, content)
    print(f"wrote {args.output}, {len(content) / 1e6:.1f} MB")


def _check_arguments(args: argparse.Namespace) -> None:
    if args.num_examples < 0:
        raise ValueError(f"--num-examples must be >= 0, got {args.num_examples}.")
    if len(args.runs) > 1 and (args.metrics or args.rollouts):
        raise ValueError(
            f"--metrics and --rollouts belong to one run, but {len(args.runs)} RUN_DIRs are given. Give one RUN_DIR."
        )
    if not args.runs and not (args.metrics or args.rollouts):
        raise ValueError(
            "RUN_DIR is missing. Give the --save folder of a run, or its files with --metrics and --rollouts."
        )


def _set_unique_names(runs: list[RunRecords], folders: list[Path | None]) -> None:
    """Names runs by their folders. Parent folders are prepended while names are equal or do not identify a run."""
    paths = [folder.resolve() for folder in folders if folder is not None]
    if len(set(paths)) < len(paths):
        raise ValueError("the same RUN_DIR is given twice. Give each run once.")
    length = 2 if any(path.name in _VAGUE_NAMES for path in paths) else 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    for run, path in zip(runs, paths):
        run.name = "/".join(path.parts[-length:])


def _check_output(output: Path, inputs: list[Path]) -> None:
    """Creates the folder and the file, so that a wrong --output is reported before the rollouts are read."""
    if any(path.resolve() == output.resolve() for path in inputs):
        raise ValueError(f"--output {output} is an input file. Give another path.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder. Give a file in it.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab"):
            pass
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written: {error.strerror}. Give another path."
        ) from error


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="the --save folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write; default: report.html",
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="FILE", help="the run's metrics; default: as in RUN_DIR/config.json"
    )
    parser.add_argument(
        "--rollouts", type=Path, metavar="FILE", help="the run's rollouts; default: as in RUN_DIR/config.json"
    )
    parser.add_argument(
        "--train-data",
        nargs="+",
        metavar="FILE",
        help="files of demonstrations with the problems' texts; default: as in RUN_DIR/config.json",
    )
    parser.add_argument(
        "--num-examples",
        type=int,
        default=6,
        metavar="N",
        help="maximum number of problems shown for each course (never solved, lost, newly, sometimes and always solved), >= 0; default: 6",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
