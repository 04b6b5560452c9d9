"""Checks and converts training data before a run, removes rows of benchmarks, shows one row as the model sees it.

prepare_data.py validate --train-data FILE.jsonl [--tokenizer DIR [--max-tokens N]] [any --data-* or --verify-* flag]
prepare_data.py convert --train-data FILE_OR_FOLDER --output TRAIN.jsonl [--rename OLD=NEW ...] [--grade] [--drop-duplicates]
prepare_data.py --decontaminate BENCHMARK... --train-data FILE.jsonl [--output CLEAN.jsonl] [--report FILE.json]
prepare_data.py inspect --train-data FILE.jsonl --tokenizer DIR [--index N | --line N] [any --data-* flag]
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if not __package__:  # lets the file run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.config.data import DataConfig
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.data.field_names import renamed
from megatron_rasft.data.reading import Row, read_rows
from megatron_rasft.data.records import read_records
from megatron_rasft.data.row_report import DataReport, RowFault
from megatron_rasft.data.tokenizer import Tokenizer, open_tokenizer
from megatron_rasft.data.tokenizing import collect_demonstrations
from megatron_rasft.errors import DataError, ModelFolderError
from megatron_rasft.files import write_json
from megatron_rasft.scratch import use_own_folder
from megatron_rasft.tools import cli
from megatron_rasft.tools.data.contamination import find_contamination
from megatron_rasft.tools.data.converting import with_own_answer, write_rows
from megatron_rasft.tools.data.demonstration_checks import check_demonstrations
from megatron_rasft.tools.data.duplicates import Duplicates
from megatron_rasft.tools.data.inspecting import render_example
from megatron_rasft.wording import counted

_NO_LIMIT = 2**62


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Returns the exit code: 0 if all rows can be used, 1 if some cannot, if a demonstration fails its own answer or tests, or if
    a file is faulty, 2 for a wrong flag.
    """
    if argv is None:  # in a process of its own
        use_own_folder()
        argv = sys.argv[1:]
    if argv and argv[0].startswith("--") and "--decontaminate" in argv:
        argv = ["decontaminate", *argv]
    return cli.run(_run, argv)


def _run(argv: list[str]) -> int:
    args, rest = _build_parser().parse_known_args(argv)
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")  # suggests a flag of this command
    config = renamed(DataConfig.from_args(args), args.rename)
    if not config.train_data:
        raise ValueError("--train-data is missing. Give the files to check.")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError(
            f"--max-tokens must be >= 1, got {args.max_tokens}. Give the --seq-length of the run."
        )
    exit_code: int = args.run(args, config)
    return exit_code


def validate(args: argparse.Namespace, config: DataConfig) -> int:
    """Print how many rows can be used, the reason for each row that cannot, and rows that fail their own answer or tests."""
    if args.max_tokens is not None and args.tokenizer is None:
        raise ValueError(
            "--max-tokens needs --tokenizer, because only a tokenizer can count tokens. Give its folder."
        )
    _check_grade_flags(args)
    duplicates = Duplicates()
    rows = duplicates.watch(_read(args, config, needs_answers=not args.no_answers))
    if args.tokenizer is None:
        report = _count(rows)
    else:
        tokenizer = _load_tokenizer(args.tokenizer)
        _, report = collect_demonstrations(rows, tokenizer, config, args.max_tokens or _NO_LIMIT)
    print(report.describe(num_named=None) + report.advice(config))
    print(duplicates.describe())
    is_refused = report.overlong and config.data_overlong == "refuse"
    is_unfit = args.grade and bool(_grade(args, _read(args, config, needs_answers=not args.no_answers)))
    return 1 if report.faults or not report.num_demonstrations or is_refused or is_unfit else 0


def _read(args: argparse.Namespace, config: DataConfig, *, needs_answers: bool) -> Iterator[Row | RowFault]:
    by_function = args.verify_function is not None
    return read_rows(config, require_answer=needs_answers, keep_fields=by_function)


def _count(rows: Iterable[Row | RowFault]) -> DataReport:
    report = DataReport()
    for row in rows:
        report.num_rows += 1
        if isinstance(row, RowFault):
            report.faults.append(row)
    report.num_demonstrations = report.num_rows - len(report.faults)
    return report


def _check_grade_flags(args: argparse.Namespace) -> None:
    if not args.grade_max_s > 0:
        raise ValueError(f"--grade-max-s must be > 0, got {args.grade_max_s:g}. --no-grade grades nothing.")
    VerifyConfig.from_args(args)  # refuses wrong values before the rows are read


def _grade(args: argparse.Namespace, rows: Iterable[Row | RowFault]) -> list[RowFault]:
    """Grades the demonstrations and prints the result. Returns the rows that fail their own answer or tests."""
    verify_config = VerifyConfig.from_args(args)
    if not verify_config.verify_num_workers:
        verify_config = dataclasses.replace(verify_config, verify_num_workers=len(os.sched_getaffinity(0)))
    usable = (row for row in rows if isinstance(row, Row))
    report = check_demonstrations(usable, verify_config, args.grade_max_s)
    print(report.describe())
    return report.failures


def convert(args: argparse.Namespace, config: DataConfig) -> int:
    """Write the usable rows of any accepted layout with the default names of their fields."""
    _check_grade_flags(args)
    output = Path(args.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"--output must be a .jsonl file, got {args.output!r}. Rename it.")
    _check_new(output)
    duplicates = Duplicates()
    report = _count(duplicates.watch(_rows(args, config)))
    report.check(config)
    print(report.describe())
    print(duplicates.describe())
    left_out = {fault.source for fault in _grade(args, _rows(args, config))} if args.grade else set()
    if args.drop_duplicates:
        left_out |= {row.source for row in duplicates.found}
    kept = (row for row in _rows(args, config) if isinstance(row, Row) and row.source not in left_out)
    num = write_rows(kept, output)
    print(f"wrote           {counted(num, 'row')} to {output}")
    return 0 if num else 1


def _rows(args: argparse.Namespace, config: DataConfig) -> Iterator[Row | RowFault]:
    """Yields the rows to convert."""
    needs_answers = not (args.no_answers or args.answers_from_responses)
    for row in _read(args, config, needs_answers=needs_answers):
        yield with_own_answer(row) if args.answers_from_responses and isinstance(row, Row) else row


def _check_new(output: Path) -> None:
    if output.exists():
        raise ValueError(f"--output {output} exists already. Give the name of a new file.")


def decontaminate(args: argparse.Namespace, config: DataConfig) -> int:
    """Find rows that repeat problems of a benchmark, by their n-grams, and write the other rows."""
    if args.overlap_ngram < 1:
        raise ValueError(f"--overlap-ngram must be >= 1 words, got {args.overlap_ngram}. 13 is usual.")
    if not 0 <= args.overlap_share <= 1:
        raise ValueError(
            f"--overlap-share must be in 0 .. 1, got {args.overlap_share}. 0 drops every row with an overlap."
        )
    if args.output is not None:
        _check_new(Path(args.output))
    faults = [row for row in read_rows(config, require_answer=False) if isinstance(row, RowFault)]
    if faults:
        raise DataError(
            f"{faults[0]}. This is the first of {counted(len(faults), 'faulty row')}. Run validate to see them, and correct them first."
        )
    records = [record for file in config.train_data for _, record in read_records(Path(file))]
    rows = read_rows(config, require_answer=False)
    problems = (
        (row.problem_id, *(message["content"] for message in row.messages))
        for row in rows
        if isinstance(row, Row)
    )
    found = find_contamination(
        problems, [Path(file) for file in args.decontaminate], args.overlap_ngram, args.overlap_share
    )
    print(found.describe())
    if args.report is not None:
        write_json(Path(args.report), found.as_dict())
    if args.output is None:
        return 1 if found.dropped else 0
    kept = [record for row, record in enumerate(records) if row not in found.dropped]
    with open(args.output, "w", encoding="utf-8", newline="\n") as file:
        # dates and decimals of a table become text
        file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in kept)
    print(f"wrote           {counted(len(kept), 'row')} to {args.output}")
    return 0


def show(args: argparse.Namespace, config: DataConfig) -> int:
    """Print one demonstration as the model sees it, with colours on a terminal."""
    from rich.console import Console

    if args.tokenizer is None:
        raise ValueError("inspect needs --tokenizer, because it shows tokens. Give the folder of the model.")
    row = _chosen_row(args, config)
    tokenizer = _load_tokenizer(args.tokenizer)
    limit = args.max_tokens or _NO_LIMIT
    demonstrations, report = collect_demonstrations([row], tokenizer, config, limit)
    for fault in report.faults + report.overlong:
        raise _unusable(fault)
    Console(soft_wrap=True, highlight=False).print(render_example(demonstrations[0], tokenizer))
    return 0


def _chosen_row(args: argparse.Namespace, config: DataConfig) -> Row:
    """Returns the row of --index or --line. Both count all rows, also those that cannot be used."""
    if args.index < 0:
        raise ValueError(f"--index must be >= 0, got {args.index}. 0 is the first row.")
    if args.line is not None and len(config.train_data) > 1:
        raise ValueError(
            f"--line {args.line} needs a single file, and --train-data names {len(config.train_data)}. Name one."
        )
    number = -1
    for number, row in enumerate(read_rows(config, not args.no_answers)):
        if number == args.index if args.line is None else row.source.endswith(f":{args.line}"):
            if isinstance(row, RowFault):
                raise _unusable(row)
            return row
    flag = f"--index {args.index}" if args.line is None else f"--line {args.line}"
    raise DataError(
        f"{flag} names no row: --train-data has {counted(number + 1, 'row')}. --index counts from 0, --line from 1, as messages do."
    )


def _unusable(fault: RowFault) -> DataError:
    return DataError(f"{fault}. A run cannot use this row. Run validate to list all such rows.")


def _build_parser() -> FlagParser:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="validate|convert|decontaminate|inspect")
    runs = {"validate": validate, "convert": convert, "decontaminate": decontaminate, "inspect": show}
    for name, run in runs.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, parser=command, max_tokens=None)
        command.add_argument(
            "--rename",
            nargs="+",
            default=[],
            metavar="OLD=NEW",
            help="Read the field OLD of the rows as NEW: problem, response, answer, tests, messages or id. The same as "
            "--data-NEW-field OLD.",
        )
        if name == "decontaminate":
            _add_overlap_flags(command)
        else:
            command.add_argument(
                "--no-answers",
                action="store_true",
                help="Accept rows without answer and tests, for runs without rollouts.",
            )
        if name in ("validate", "inspect"):
            _add_token_flags(command)
        if name in ("validate", "convert"):
            _add_grade_flags(command, is_on=name == "validate")
        if name == "convert":
            _add_convert_flags(command)
        if name == "inspect":
            command.add_argument(
                "--index",
                type=int,
                default=0,
                metavar="N",
                help="Number of the row, from 0, counting all rows (default: 0).",
            )
            command.add_argument(
                "--line",
                type=int,
                metavar="N",
                help="Number of the row's line, from 1, as messages name it: 3 in FILE.jsonl:3. In place of --index.",
            )
        add_flags(command.add_argument_group("data", DataConfig.__doc__), DataConfig)
    return parser


def _add_convert_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output", metavar="FILE", required=True, help="Write the rows to this file (.jsonl)."
    )
    command.add_argument(
        "--answers-from-responses",
        action="store_true",
        help="Give rows without answer and tests the final answer of their own response, in a box or after ####.",
    )
    command.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="Leave out rows with the problem of an earlier row.",
    )


def _add_token_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tokenizer", metavar="DIR", help="Hugging Face folder of the model or its tokenizer."
    )
    command.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="Largest number of tokens of prompt and response. Unset: no limit.",
    )


def _add_grade_flags(command: argparse.ArgumentParser, is_on: bool) -> None:
    command.add_argument(
        "--grade",
        action=argparse.BooleanOptionalAction,
        default=is_on,
        help="Grade the rows' own responses with their answers and tests, which runs the programs of rows with tests. convert "
        f"leaves out the rows that fail (default: {'on' if is_on else 'off'}).",
    )
    command.add_argument(
        "--grade-max-s",
        type=float,
        default=600.0,
        metavar="X",
        help="Time limit for grading the rows' own responses, seconds (default: 600). Rows after it are counted, but not graded.",
    )
    add_flags(command.add_argument_group("verify", VerifyConfig.__doc__), VerifyConfig)


def _add_overlap_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--decontaminate", nargs="+", required=True, metavar="FILE", help="Benchmark files to compare with."
    )
    command.add_argument(
        "--overlap-ngram",
        type=int,
        default=13,
        metavar="N",
        help="Number of words of an n-gram, >= 1 (default: 13). In scripts without spaces between words, such as Chinese and "
        "Japanese, each character is a word.",
    )
    command.add_argument(
        "--overlap-share",
        type=float,
        default=0.5,
        metavar="X",
        help="Drop a row that has this share of the n-grams of a benchmark row, its exact words or its id, 0 .. 1 (default: "
        "0.5). 0: drop a row with any common n-gram, even a common phrase.",
    )
    command.add_argument(
        "--output", metavar="FILE", help="Write the rows that are kept to this file (.jsonl)."
    )
    command.add_argument("--report", metavar="FILE", help="Write every overlap to this file (.json).")


def _load_tokenizer(folder: str) -> Tokenizer:
    if not Path(folder).is_dir():
        raise ValueError(
            f"--tokenizer must be a folder, got {folder!r}. Give a Hugging Face folder on this machine."
        )
    try:
        return open_tokenizer(folder)
    except ModelFolderError as error:
        raise ValueError(f"--tokenizer: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
