"""Writes one HTML page about a run, or about several side by side: curves, problems, rollouts and settings.

report.py RUN_DIR [RUN_DIR ...] --output report.html
report.py [RUN_DIR] [--metrics FILE] [--rollouts FILE] [--train-data FILE ...] --output report.html
report.py RUN_DIR --watch 30        while the run goes on

Needs the extra "report": pip install 'megatron-rasft[report]'
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # lets the file run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.files import replacing
from megatron_rasft.tools import cli
from megatron_rasft.tools.report import charts, mathematics
from megatron_rasft.tools.report.archive import Archive
from megatron_rasft.tools.report.page import page_parts
from megatron_rasft.tools.report.records import NoRecordsError, RunRecords, has_ended, read_run
from megatron_rasft.tools.report.tokens import read_tokens
from megatron_rasft.tools.report.views import RunView, read_view

_VAGUE_NAMES = {"save", "checkpoints", "checkpoint"}
"""Common names of --save folders. They do not identify a run, so the name of the parent folder is taken."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code as ``cli.run`` defines it."""
    args = _build_parser().parse_args(argv)
    return cli.run(report if args.watch is None else watch, args)


def watch(args: argparse.Namespace) -> None:
    """Writes the page whenever files of the runs have changed, until all runs have ended. Ctrl-C ends it earlier.

    Raises:
        ValueError, RasftError: as ``report`` does.
    """
    _check_arguments(args)
    inputs: list[Path] = []
    seen: list[tuple[int, int]] | None = None
    is_over = False
    while not is_over:
        # Before files are read, so that the last page has all records.
        is_over = all(has_ended(Path(run)) for run in args.runs)
        stamps, began = _stamps(inputs), time.monotonic()
        if stamps is None or stamps != seen or is_over:
            inputs, seen = _write_if_begun(args, is_over), stamps
        if not is_over:
            # A page of many rollouts takes a while. Writing must take only a small part of the machine's time.
            time.sleep(max(args.watch, 9 * (time.monotonic() - began)))


def _write_if_begun(args: argparse.Namespace, is_over: bool) -> list[Path]:
    try:
        return _write(args, reload_s=None if is_over else args.watch)
    except NoRecordsError as error:
        if is_over:
            raise
        print(f"waiting for the first records: {error}", flush=True)
        return []


def _stamps(paths: list[Path]) -> list[tuple[int, int]] | None:
    """Size and time of change of each file; None without files."""
    found = [path.stat() for path in paths if path.is_file()]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found] or None


def report(args: argparse.Namespace) -> None:
    """Reads the runs and writes the page.

    Raises:
        ValueError: the arguments contradict each other, or name files that cannot be read or written.
        RasftError: a package that the page needs is not installed.
    """
    _check_arguments(args)
    _write(args, reload_s=None)


def _write(args: argparse.Namespace, reload_s: int | None) -> list[Path]:
    """Writes the page. Returns the files that it read, and that grow with the runs.

    Args:
        args: the flags.
        reload_s: seconds after which a browser loads the page again; None for never.
    """
    # A missing package is reported before files are read, which can take minutes.
    charts.script()
    mathematics.check_installed()
    folders: list[Path | None] = [Path(run) for run in args.runs] or [None]
    runs = [read_run(folder, args.metrics, args.rollouts) for folder in folders]
    _set_unique_names(runs, folders)
    inputs = [path for run in runs for path in (run.metrics_path, run.rollouts_path) if path is not None]
    _check_output(args.output, inputs)
    views = [_view(run, args) for run in runs]
    with replacing(args.output) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page_parts(views, reload_s))
    print(f"wrote {args.output}, {args.output.stat().st_size / 1e6:.1f} MB", flush=True)
    return inputs


def _view(run: RunRecords, args: argparse.Namespace) -> RunView:
    archive = Archive(args.output.parent, args.max_rollouts)
    view = read_view(run, args.train_data, args.num_examples, args.problems, archive)
    view.tokens = read_tokens(run, view.examples, args.tokenizer, args.reference_model)
    return view


def _check_arguments(args: argparse.Namespace) -> None:
    if args.num_examples < 0:
        raise ValueError(f"--num-examples must be >= 0, got {args.num_examples}.")
    if args.max_rollouts < 1:
        raise ValueError(f"--max-rollouts must be >= 1, got {args.max_rollouts}.")
    if args.watch is not None and args.watch < 1:
        raise ValueError(f"--watch must be >= 1, got {args.watch}.")
    if args.watch is not None and not args.runs:
        raise ValueError(
            "--watch needs RUN_DIR, whose status.json says when the run has ended. Give the --save folder of the run."
        )
    if len(args.runs) > 1 and (args.metrics or args.rollouts):
        raise ValueError(
            f"--metrics and --rollouts belong to one run, but {len(args.runs)} RUN_DIRs are given. Give one RUN_DIR."
        )
    if not args.runs and not (args.metrics or args.rollouts):
        raise ValueError(
            "RUN_DIR is missing. Give the --save folder of a run, or its files with --metrics and --rollouts."
        )


def _set_unique_names(runs: list[RunRecords], folders: list[Path | None]) -> None:
    """Names runs by their folders, or by the parents of folders with vague names. Further parents are prepended while names are equal."""
    paths = [folder.resolve() for folder in folders if folder is not None]
    if len(set(paths)) < len(paths):
        raise ValueError("the same RUN_DIR is given twice. Give each run once.")
    names = [path.parent if path.name in _VAGUE_NAMES and path.parent.name else path for path in paths]
    if len(set(names)) < len(names):
        names = paths
    length = 1
    while len({path.parts[-length:] for path in names}) < len(names):
        length += 1
    for run, path in zip(runs, names):
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
    parser.add_argument(
        "--problems",
        nargs="+",
        default=[],
        metavar="ID",
        help="problems that are examples in any case, with all their rollouts",
    )
    parser.add_argument(
        "--max-rollouts",
        type=int,
        default=100_000,
        metavar="N",
        help="maximum number of rollouts of a run that the page can search, the newest ones, >= 1; default: 100000",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with the tokenizer.json of the model, to colour tokens; default: the run's --hf-model",
    )
    parser.add_argument(
        "--reference-model",
        type=Path,
        metavar="FOLDER",
        help="the model before training, which calculates the ratio of examples on the CPU if the run did not store it",
    )
    parser.add_argument(
        "--watch",
        type=int,
        metavar="SECONDS",
        help="write the page again every SECONDS while the run goes on, if its files have changed; the browser reloads it; >= 1",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
