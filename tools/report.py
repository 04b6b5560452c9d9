"""One self-contained HTML page of a run, or of several side by side: curves, solvability, rollouts, configuration.

report.py RUN_DIR [RUN_DIR ...] --output report.html
report.py [RUN_DIR] [--metrics FILE] [--rollouts FILE] [--train-data FILE ...] --output report.html
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.reading import Row, read_rows
from megatron_rasft.errors import DataError, RasftError
from megatron_rasft.files import write_text
from megatron_rasft.tools.report.page import page
from megatron_rasft.tools.report.records import RunRecords, read_run
from megatron_rasft.tools.report.rollouts import pick_examples, read_statistics
from megatron_rasft.tools.report.views import Problem, RunView

_VAGUE_NAMES = {"save", "checkpoints", "checkpoint"}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the world failed, 2 wrong arguments."""
    args = _build_parser().parse_args(argv)
    try:
        report(args)
    except (ValueError, RasftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def report(args: argparse.Namespace) -> None:
    """Read the runs and write the page."""
    if args.num_examples < 0:
        raise ValueError(f"--num-examples must be >= 0, got {args.num_examples}.")
    if len(args.runs) > 1 and (args.metrics or args.rollouts):
        raise ValueError(
            f"--metrics and --rollouts name the files of one run, but {len(args.runs)} are given. Give one RUN_DIR with them."
        )
    if not args.runs and not (args.metrics or args.rollouts):
        raise ValueError(
            "RUN_DIR is missing: the --save folder of a run. Or name its files by --metrics and --rollouts."
        )
    folders: list[Path | None] = [Path(run) for run in args.runs] or [None]
    runs = [read_run(folder, args.metrics, args.rollouts) for folder in folders]
    _tell_apart(runs, folders)
    output: Path = args.output
    _check_output(
        output, [path for run in runs for path in (run.metrics_path, run.rollouts_path) if path is not None]
    )
    content = page([_view(run, args) for run in runs])
    write_text(output, content)
    print(f"wrote {output}, {len(content) / 1e6:.1f} MB")


def _view(records: RunRecords, args: argparse.Namespace) -> RunView:
    view = RunView(records)
    if records.metrics_path is None:
        view.notes.append("There is no metrics.jsonl: no curves. Name the file by --metrics.")
    elif not records.steps:
        view.notes.append(f"{records.metrics_path} tells of no step yet.")
    if records.num_unreadable:
        view.notes.append(
            f"{records.num_unreadable} line(s) of {records.metrics_path} cannot be read and are left out."
        )
    if records.rollouts_path is None:
        view.notes.append(_without_rollouts(records))
        return view
    view.rollouts = read_statistics(records.rollouts_path)
    if not view.rollouts.refreshes:
        view.notes.append(f"{records.rollouts_path} holds no rollouts.")
    if view.rollouts.num_unreadable:
        view.notes.append(
            f"{view.rollouts.num_unreadable} line(s) of {records.rollouts_path} cannot be read and are left out."
        )
    if view.rollouts.num_repeated:
        view.notes.append(
            f"{view.rollouts.num_repeated:,} rollouts of refreshes that were done again are left out: the later ones count."
        )
    view.examples = pick_examples(records.rollouts_path, view.rollouts.histories(), args.num_examples)
    if view.examples:
        wanted = {example.problem_id for example in view.examples}
        try:
            view.problems = _read_problems(records, args.train_data, wanted)
        except (DataError, ValueError, TypeError, OSError) as error:
            view.notes.append(
                f"The texts of problems are not at hand: {error} Name the file by --train-data."
            )
    return view


def _without_rollouts(records: RunRecords) -> str:
    if records.setting("rollout", "rollout_engine") == "replay":
        return "This run replays stored rollouts and stores none of its own."
    if any(record.get("rollout/num_rollouts") for record in records.refreshes.values()):
        return "There is no rollouts.jsonl: neither solvability of problems nor examples. Name the file by --rollouts."
    return "This run has no rollouts: it trained on demonstrations only, or has not come to a refresh yet."


def _read_problems(records: RunRecords, named: list[str] | None, wanted: set[str]) -> dict[str, Problem]:
    """The texts of some problems, from --train-data, or where the configuration or the card says that they are."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    settings = {k: v for k, v in records.config.get("rasft", {}).get("data", {}).items() if k in known}
    on_card = list(filter(None, records.card.get("Demonstrations", "").split(", ")))
    settings["train_data"] = named or settings.get("train_data") or on_card
    if not settings["train_data"]:
        raise DataError("the run has no configuration that names its data.")
    found: dict[str, Problem] = {}
    for row in read_rows(DataConfig(**settings), require_answer=False):
        if isinstance(row, Row) and row.problem_id in wanted:
            check = row.answer or ""
            if row.tests is not None:
                cases = [f"{case.input} -> {case.output}" for case in row.tests.cases]
                check = "\n".join([*row.tests.tests, *cases])
            found[row.problem_id] = Problem(row.problem, row.response, check)
            if len(found) == len(wanted):
                break
    return found


def _tell_apart(runs: list[RunRecords], folders: list[Path | None]) -> None:
    """Runs in folders of one name, or of one that says nothing, are called by as much of the path as it takes."""
    paths = [folder.resolve() for folder in folders if folder is not None]
    if len(set(paths)) < len(paths):
        raise ValueError("a RUN_DIR is given twice. Name each run once.")
    length = 2 if any(path.name in _VAGUE_NAMES for path in paths) else 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    for run, path in zip(runs, paths):
        run.name = "/".join(path.parts[-length:])


def _check_output(output: Path, inputs: list[Path]) -> None:
    if any(path.resolve() == output.resolve() for path in inputs):
        raise ValueError(f"--output {output} is what is to be read. Name another file.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder. Name a file in it.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab"):
            pass
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written: {error.strerror}. Name another place."
        ) from error


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="--save folders of runs")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; default: report.html",
    )
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="the run's metrics, if not in RUN_DIR")
    parser.add_argument("--rollouts", type=Path, metavar="FILE", help="the run's rollouts, if not in RUN_DIR")
    parser.add_argument(
        "--train-data",
        nargs="+",
        metavar="FILE",
        help="for the problems' texts; default: as config.json says",
    )
    parser.add_argument(
        "--num-examples",
        type=int,
        default=6,
        metavar="N",
        help="problems shown of each kind (never solved, lost, newly, sometimes and always solved), >= 0; default: 6",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
