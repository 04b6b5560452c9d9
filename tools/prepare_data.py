"""Look at training data before a run: every row with ``validate``, one as the model sees it with ``inspect``.

prepare_data.py validate --train-data FILE.jsonl [--tokenizer DIR [--max-tokens N]] [any --data-* flag]
prepare_data.py inspect --train-data FILE.jsonl --tokenizer DIR [--index N] [any --data-* flag]
"""

import argparse
import dataclasses
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from megatron_rasft.config.data import DataConfig
from megatron_rasft.config.flags import add_flags, read_flags
from megatron_rasft.data.inspecting import render_example
from megatron_rasft.data.reading import DataReport, Row, RowFault, read_rows
from megatron_rasft.data.tokenizing import Tokenizer, build_demonstrations, collect_demonstrations
from megatron_rasft.errors import DataError

_NO_LIMIT = 2**62


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all rows are usable, 1 some are not, 2 wrong arguments or an unreadable file."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    try:
        config = read_flags(args, DataConfig)
        if args.max_tokens is not None and args.max_tokens < 1:
            raise ValueError(
                f"--max-tokens must be >= 1, got {args.max_tokens}. Give the --seq-length of the run."
            )
        return args.run(args, config)
    except (DataError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def validate(args: argparse.Namespace, config: DataConfig) -> int:
    """Print what becomes of every row."""
    if args.max_tokens is not None and args.tokenizer is None:
        raise ValueError(
            "--max-tokens needs --tokenizer: tokens can be counted with a tokenizer only. Give its folder."
        )
    rows = read_rows(config, require_answer=not args.no_answers)
    if args.tokenizer is None:
        report = DataReport()
        for row in rows:
            report.num_rows += 1
            if isinstance(row, RowFault):
                report.faults.append(row)
        num_usable = report.num_demonstrations = report.num_rows - len(report.faults)
    else:
        demonstrations, report = collect_demonstrations(
            rows,
            _load_tokenizer(args.tokenizer),
            config,
            max_tokens=args.max_tokens or _NO_LIMIT,
            require_answer=not args.no_answers,
        )
        num_usable = len(demonstrations)
    print(report.describe())
    is_refused = report.faults or not num_usable or (report.overlong and config.data_overlong == "refuse")
    return 1 if is_refused else 0


def show(args: argparse.Namespace, config: DataConfig) -> int:
    """Print one demonstration, coloured on a terminal."""
    from rich.console import Console

    if args.tokenizer is None:
        raise ValueError(
            "inspect needs --tokenizer: it shows the tokens a model is given. Give the model's folder."
        )
    if args.index < 0:
        raise ValueError(f"--index must be >= 0, got {args.index}. 0 is the first usable row.")
    require_answer = not args.no_answers
    usable = (row for row in read_rows(config, require_answer) if isinstance(row, Row))
    rows = list(islice(usable, args.index, args.index + 1))
    if not rows:
        raise DataError(
            f"there is no usable row {args.index} (the first is 0). Try a smaller --index, or validate."
        )
    strict = dataclasses.replace(config, data_bad_rows="refuse", data_overlong="refuse")
    tokenizer = _load_tokenizer(args.tokenizer)
    demonstrations, _ = build_demonstrations(
        rows, tokenizer, strict, args.max_tokens or _NO_LIMIT, require_answer
    )
    Console(soft_wrap=True, highlight=False).print(render_example(demonstrations[0], tokenizer))
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="validate|inspect")
    for name, run in (("validate", validate), ("inspect", show)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument(
            "--tokenizer", metavar="DIR", help="Hugging Face folder of the model or its tokenizer."
        )
        command.add_argument(
            "--max-tokens", type=int, metavar="N", help="Most tokens of prompt and response. Unset: no limit."
        )
        command.add_argument(
            "--no-answers", action="store_true", help="Rows need no gold answer: for runs without rollouts."
        )
        if name == "inspect":
            command.add_argument(
                "--index", type=int, default=0, metavar="N", help="Which usable row, from 0 (default: 0)."
            )
        add_flags(command.add_argument_group("data", DataConfig.__doc__), DataConfig)
    return parser


def _load_tokenizer(folder: str) -> Tokenizer:
    if not Path(folder).is_dir():
        raise ValueError(
            f"--tokenizer must be a folder, {folder!r} is none. Give a Hugging Face folder on this machine."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a broken file makes it stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--tokenizer {folder} holds no tokenizer that transformers can load: {reason}"
        ) from error
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
