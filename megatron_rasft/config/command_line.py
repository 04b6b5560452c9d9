"""Answers ``--help`` and refuses wrong flags before torch and Megatron are imported, which takes ten seconds."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TextIO

from megatron_rasft.config import RasftConfig, help
from megatron_rasft.config.config_file import naming_lines
from megatron_rasft.config.defaults import changed_defaults
from megatron_rasft.config.megatron_flags import add_megatron_flags
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.published import published_preset, wants_preset
from megatron_rasft.config.refusals import reasons, refuse_unsupported
from megatron_rasft.errors import is_first_of_node, tell_launcher


def answer_early(argv: Sequence[str]) -> None:
    """Prints the help if it is asked for, and checks the flags. Returns if Megatron's parser must go on.

    Otherwise the process ends, with 0 after the help and 2 after an error. Only the first process of a node prints.
    """
    text, code = "", 0
    word = asked_help(argv)
    if word is not None:
        text = help.overview() if not word else "" if word.startswith(help.MEGATRON) else help.about(word)
    else:
        try:
            with naming_lines(argv):
                check_given(check_flags(argv), needs_data=True)
        except ValueError as error:
            text, code = f"error: {error}", 2
            tell_launcher(text)
    if text:
        print_once(text, sys.stderr if code else sys.stdout)
        sys.exit(code)


def print_once(text: str, stream: TextIO) -> None:
    """Prints a text in the first process of a node. A reader may close its end early, as ``head`` does."""
    if is_first_of_node():
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            # Python flushes the stream again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def asked_help(argv: Sequence[str]) -> str | None:
    """The word of the first --help=WORD, "" for --help alone, or None if no help is asked for."""
    for token in argv:
        flag, _, word = token.partition("=")
        if flag in ("--help", "-h"):
            return word
    return None


def check_flags(argv: Sequence[str]) -> Namespace:
    """Checks names and values of all flags, as far as that does not need the model and the machine.

    Raises:
        ValueError: the message names the flag, the rule and the way out.
    """
    parser, is_complete = run_parser()
    args = _parse(parser, argv, is_complete)
    if wants_preset(args):
        parser.set_defaults(**published_preset())
        args = _parse(parser, argv, is_complete)
    refuse_unsupported(parser, args)
    RasftConfig.from_args(args)
    return args


def run_parser() -> tuple[FlagParser, bool]:
    """The parser of a run, made without importing Megatron, and whether it has all of Megatron's flags."""
    parser = FlagParser(add_help=False)
    for section in RasftConfig.sections().values():
        add_flags(parser, section)
    is_complete = add_megatron_flags(parser)
    parser.set_defaults(**changed_defaults(parser))
    refused = reasons(parser)
    parser.never_suggested = {
        option for option, action in parser._option_string_actions.items() if action.dest in refused
    }
    return parser, is_complete


def _parse(parser: FlagParser, argv: Sequence[str], is_complete: bool) -> Namespace:
    """Parses a command line. An unknown flag is refused, or left to Megatron's parser if not all of its flags are known."""
    return parser.parse_args(list(argv)) if is_complete else parser.parse_known_args(list(argv))[0]


def check_given(args: Namespace, *, needs_data: bool) -> None:
    """Checks that the flags are given without which no run starts.

    Raises:
        ValueError: the message names the flag.
    """
    if args.hf_model is None:
        raise ValueError("--hf-model DIR is missing: the Hugging Face folder of the model to train.")
    if needs_data and not args.train_data:
        raise ValueError(
            "--train-data FILE is missing: the demonstrations to train on (.jsonl, .jsonl.gz or .parquet)."
        )
