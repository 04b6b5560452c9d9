"""Answers ``--help`` and refuses wrong flags before torch and Megatron are imported, which takes ten seconds."""

import importlib.util
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from megatron_rasft.config import RasftConfig, help
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.published import published_preset, wants_preset
from megatron_rasft.config.suggestions import suggest
from megatron_rasft.errors import is_first_of_node
from megatron_rasft.flags import flag_name

_ARGUMENTS = "training/arguments.py"
_ALL = "**/*.py"
_MEGATRON_FILES = (_ARGUMENTS, "training/**/*config*.py", "core/**/*config*.py", _ALL)
_MEGATRON_CLASS = re.compile(r"ArgumentGroupFactory\(\s*(\w+)")
# A flag's text, or a field of such a class: Megatron makes flags of most fields
_MEGATRON_NAME = re.compile(r"""(?:["']--|^    )([a-z][a-z0-9_-]*)(?:["']| *:)""", re.MULTILINE)
_NEGATIONS = ("no_", "disable_")


def answer_early(argv: Sequence[str]) -> None:
    """Prints the help if it is asked for, and checks this package's flags. Returns if Megatron's parser must go on.

    Otherwise the process ends, with 0 after the help and 2 after an error. Only the first process of a node prints.
    """
    text, code = "", 0
    word = asked_help(argv)
    if word is not None:
        text = help.overview() if not word else "" if word.startswith(help.MEGATRON) else help.about(word)
    else:
        try:
            check_flags(argv)
        except ValueError as error:
            text, code = f"error: {error}", 2
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


def check_flags(argv: Sequence[str]) -> None:
    """Checks the values of this package's flags, and that every other flag may be one of Megatron's.

    Raises:
        ValueError: the message names the flag, the rule and the way out.
    """
    parser = FlagParser(add_help=False)
    for section in RasftConfig.sections().values():
        add_flags(parser, section)
    args, rest = parser.parse_known_args(list(argv))
    if wants_preset(args):
        parser.set_defaults(**published_preset())
        args, rest = parser.parse_known_args(list(argv))
    _refuse_unknown([token for token in rest if token.startswith("--")], parser)
    RasftConfig.from_args(args)


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


def _refuse_unknown(typed: Sequence[str], parser: FlagParser) -> None:
    """Refuses flags that occur nowhere in Megatron's source. The others are left to Megatron's parser."""
    unknown = [token.partition("=")[0] for token in typed]
    known: set[str] = set()
    # Nearly all flags are declared in the first files, and the others are read only if a flag is not found there
    for pattern in _MEGATRON_FILES:
        if not unknown:
            return
        for source in _megatron_sources(pattern):
            known |= {name.replace("-", "_") for name in _MEGATRON_NAME.findall(source)}
        unknown = [flag for flag in unknown if not _names_of(flag) & known]
    if not known or not unknown:
        return  # without Megatron's source its own parser decides
    own = [option for action in parser._actions for option in action.option_strings]
    close = suggest(unknown[0], [*own, *sorted(map(flag_name, known))])
    raise ValueError(
        f"unrecognized arguments: {unknown[0]}. "
        + (f"Did you mean {close}?" if close else "--help lists the flags, --help=megatron Megatron's.")
    )


def _names_of(flag: str) -> set[str]:
    """The names from which Megatron may have made the flag."""
    name = flag.lstrip("-").replace("-", "_")
    return {name, *(name.removeprefix(negation) for negation in _NEGATIONS)}


def _megatron_sources(pattern: str) -> Iterator[str]:
    """The texts of the files of Megatron that declare flags. Nothing is imported."""
    package = importlib.util.find_spec("megatron")
    for root in (package.submodule_search_locations or []) if package else []:
        if not Path(root, _ARGUMENTS).exists():
            continue
        sources = (path.read_text(errors="replace") for path in Path(root).glob(pattern))
        if pattern == _ALL:
            declares = _declaration_of_flags(Path(root, _ARGUMENTS))
            sources = (source for source in sources if declares.search(source))
        yield from sources


def _declaration_of_flags(arguments: Path) -> re.Pattern[str]:
    """Matches the head of a class of which Megatron's parser makes flags."""
    classes = "|".join(_MEGATRON_CLASS.findall(arguments.read_text(errors="replace")))
    return re.compile(rf"^class (?:{classes})\b", re.MULTILINE)
