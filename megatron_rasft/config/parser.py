"""The parser of the command line, and the functions that add the flags of the sections (``megatron_rasft/flags.py``)."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from itertools import starmap
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from megatron_rasft.config.config_file import CONFIG_FLAG, VALUE_MARK, config_files, config_words
from megatron_rasft.config.suggestions import other_name, suggest
from megatron_rasft.flags import FlagSection, OneOf, Range, flag_name

_UNKNOWN = "unrecognized arguments: "
_BAD_CHOICE = re.compile(r"argument \S+: invalid choice: '?([^']*?)'? \(choose from (.*)\)")


class _WholeFlags(argparse.HelpFormatter):
    """Breaks the lines of help texts between words only, so that the name of a flag is never split."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        words = " ".join(text.split())
        return textwrap.fill(
            words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


class FlagParser(argparse.ArgumentParser):
    """A parser that reports a mistake as a ValueError of one line, which suggests the most similar flag or choice.

    The flags in the files of --config come before those on the command line, if the parser has this flag.

    The parsed namespace has two more attributes. ``given_flags``: attribute name -> flag as typed, for the flags on the command line and
    in those files. ``given_values``: name of a flag in such a file -> its value there.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _WholeFlags, "allow_abbrev": False, **options})
        self._typed_values: dict[str, list[str]] = {}
        self._words: list[str] = []
        self._unknown: list[str] = []
        self.never_suggested: Collection[str] = ()
        """Flags that no error suggests."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        if CONFIG_FLAG in self._option_string_actions:
            words = [*self.file_words(words), *words]
        self._typed_values, self._words = {}, words
        parsed, self._unknown = super().parse_known_args(words, namespace)
        typed = [word.partition("=")[0] for word in words]
        actions = self._option_string_actions
        given = {actions[word].dest: word for word in typed if word in actions}
        # Words after a -- are no flags
        parsed.given_flags = {dest: flag for dest, flag in given.items() if dest in self._typed_values}
        if CONFIG_FLAG in actions:
            parsed.config = config_files(words)  # also of several --config
        parsed.given_values = dict(starmap(self._given_value, parsed.given_flags.items()))
        return parsed, self._unknown

    def suggestible(self) -> list[str]:
        """The flags that errors may suggest."""
        return [flag for flag in self._option_string_actions if flag not in self.never_suggested]

    def file_words(self, words: Sequence[str]) -> list[str]:
        """The words that stand for the files of --config on a command line."""
        return config_words(words, self._option_string_actions)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        arg_strings = [text.removeprefix(VALUE_MARK) for text in arg_strings]
        self._typed_values[action.dest] = arg_strings
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def _given_value(self, dest: str, flag: str) -> tuple[str, Any]:
        """Name and value of a flag in a file of --config."""
        action = self._option_string_actions[flag]
        name = flag.removeprefix("--").replace("-", "_")
        if isinstance(action, argparse.BooleanOptionalAction):
            return name.removeprefix("no_"), not flag.startswith("--no-")
        if action.nargs == 0:
            return name, True
        convert = action.type if action.type in (int, float) else str
        values = [convert(text) for text in self._typed_values[dest]]  # type: ignore[operator]
        return name, values[0] if action.nargs is None else values

    def error(self, message: str) -> NoReturn:
        close = ""
        if message.startswith(_UNKNOWN):
            self.refuse_unknown(self._unknown)
        if match := _BAD_CHOICE.match(message):
            choices = [name.strip("'") for name in match[2].split(", ")]
            close = next(iter(difflib.get_close_matches(match[1], choices, n=1)), "")
        raise ValueError(f"{message}. " + (f"Did you mean {close}?" if close else "--help lists the flags."))

    def refuse_unknown(self, words: Sequence[str], others: Collection[str] = ()) -> NoReturn:
        """Refuses words that belong to no flag, with the flags that they probably mean.

        Args:
            words: in their order on the command line. A word that follows an unknown flag is its value.
            others: flags of another parser that are accepted too. They are suggested if none of this parser is meant.

        Raises:
            ValueError: always.
        """
        found = [self._closest(words[i:], others) for i, word in enumerate(words) if word.startswith("-")]
        close = {typed: meant for typed, meant in found if meant}
        hints = [f"Did you mean {meant}?" for meant in close.values()]
        if len(found) > 1 and close:
            hints = [f"Did you mean {', '.join(f'{meant} for {typed}' for typed, meant in close.items())}?"]
        hints += self._stray(words)
        raise ValueError(f"{_UNKNOWN}{' '.join(words)}. {' '.join(hints) or '--help lists the flags.'}")

    def _closest(self, words: Sequence[str], others: Collection[str]) -> tuple[str, str]:
        """The unknown flag that ``words`` begins with, and the flag that it probably means."""
        typed, known = words[0].partition("=")[0], self.suggestible()
        if len(words) > 1 and not words[1].startswith("-"):
            joined = f"{typed}-{words[1]}"  # "learning rate" in two words
            if meant := other_name(joined, known) or other_name(joined, others):
                return f"{typed} {words[1]}", meant
        return typed, suggest(typed, known) or suggest(typed, others)

    def _stray(self, words: Sequence[str]) -> list[str]:
        """A sentence for each flag that is followed by more words than it takes."""
        lines, flags = [], self._option_string_actions
        left, last = list(words), ""
        for word in self._words:
            is_unknown = bool(left) and word == left[0]
            if is_unknown:
                left.pop(0)
            if word.startswith("-") and (is_unknown or word.partition("=")[0] in flags):
                last = word.partition("=")[0]
            elif is_unknown and last in flags:
                number = "no value" if flags[last].nargs == 0 else "a single value"
                lines.append(f"{last} takes {number}, so {word!r} belongs to no flag.")
            elif is_unknown and not last:
                lines.append(f"{word!r} stands before the first flag.")
        return lines

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)  # type: ignore[misc]
        except KeyError:  # Megatron's type functions look the name up in an enumeration.
            names: Iterable[Any] = action.choices or ()
            choices = ", ".join(repr(name.name) for name in names)
            raise argparse.ArgumentError(
                action, f"invalid choice: {text!r} (choose from {choices})"
            ) from None


def help_text(doc: str, rule: Range | OneOf | None, default: Any) -> str:
    """The help text of a flag for argparse: the field's doc, its range and its default."""
    parts = [doc]
    if isinstance(rule, Range):
        parts.append(f"Range: {str(rule).removeprefix('in ')}.")
    if isinstance(rule, OneOf) and rule.meanings:  # argparse lists the values itself
        parts.append(rule.meanings)
    if default not in (None, [], ""):
        parts.append(f"Default: {('off', 'on')[default] if isinstance(default, bool) else repr(default)}")
    return " ".join(parts).replace("%", "%%")


def add_flags(
    group: argparse._ActionsContainer, section: type[FlagSection], only: Collection[str] | None = None
) -> None:
    """Adds one flag per field of ``section``, or per field in ``only``."""
    types, rules, docs = section.types(), section.rules(), section.docs()
    for name, default in section.flag_fields().items():
        if only is not None and name not in only:
            continue
        rule = rules.get(name)
        options: dict[str, Any] = {"default": default, "help": help_text(docs[name], rule, default)}
        kind = types[name]
        if get_origin(kind) in (Union, UnionType):  # ``X | None``
            kind = next(part for part in get_args(kind) if part is not NoneType)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(rule, OneOf):
            options.update(choices=rule.values, type=type(rule.values[0]))
        elif get_origin(kind) is list:
            (item,) = get_args(kind)
            options.update(nargs="+", type=item, metavar="N" if item is int else "VALUE")
        else:
            options.update(type=kind, metavar="N" if kind in (int, float) else "TEXT")
        group.add_argument(flag_name(name), **options)
