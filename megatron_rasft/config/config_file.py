"""``--config FILE.toml``: flags in a file, under their own names with - or _.

    objective = "rasft"
    bf16 = true                            # --bf16
    objective_dft_factor = false           # --no-objective-dft-factor
    train-data = ["a.jsonl", "b.jsonl"]

Tables only group the flags, except those in ``TOOL_TABLES``. Each flag becomes a word of the command line, before the typed ones. Later files,
and the command line, therefore win.
"""

import argparse
import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rasft.errors import RasftError
from megatron_rasft.flags import flag_name

CONFIG_FLAG = "--config"

TOOL_TABLES = ("plan",)
"""Tables with flags of a tool. Only that tool reads them."""

VALUE_MARK = "\0"
"""First character of a word that is a value of a list, even if it begins with a hyphen. The parser removes it."""

_NUMBERS: dict[Any, str] = {int: "an integer", float: "a number"}
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
_FLAG = re.compile(r"--[a-z0-9][\w-]*")


@dataclass(frozen=True)
class FileFlag:
    """One flag in a file."""

    path: str
    line: int
    name: str
    """The key with underscores."""
    value: Any

    @property
    def place(self) -> str:
        """Where the flag is written, for messages."""
        return f"{self.path}, line {self.line}"

    def words(self, options: Mapping[str, argparse.Action]) -> list[str]:
        """Returns the words of the command line that stand for this flag.

        Args:
            options: the parser's flags. A flag that is not among them is refused by the parser, or left to another one.

        Raises:
            ValueError: the flag does not take such a value.
        """
        flag = _spelled_as(flag_name(self.name), options)
        action = options.get(flag)
        if isinstance(self.value, bool) and (action is None or action.nargs == 0):
            return [self._switch(flag, action)]
        if action is not None:
            self._check(flag, action)
        if isinstance(self.value, list):
            return [flag, *(_as_value(str(value)) if action else str(value) for value in self.value)]
        return [f"{flag}={self.value}"]

    def _switch(self, flag: str, action: argparse.Action | None) -> str:
        if self.value:
            return flag
        if action is None or isinstance(action, argparse.BooleanOptionalAction):
            return f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag[2:]}"
        raise self._refusal(
            f"{flag} can only be switched on. Leave the key out, or write {self.name} = true."
        )

    def _check(self, flag: str, action: argparse.Action) -> None:
        """Refuses a value of another type than the flag's. Its range is checked by the parser."""
        kind = _NUMBERS.get(action.type, "text")
        if action.nargs == 0:
            raise self._refusal(f"{flag} takes no value. Write {self.name} = true, or leave the key out.")
        if isinstance(self.value, list) and action.nargs is None:
            raise self._refusal(
                f"{flag} takes a single value, and this is a list. Write {self.name} = VALUE."
            )
        for value in self.value if isinstance(self.value, list) else [self.value]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number or isinstance(value, str)) or (kind != "text" and not is_number):
                raise self._refusal(
                    f"{flag} takes {kind}, and {_toml(value)} is {'text' if isinstance(value, str) else 'of another type'}."
                )

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{self.place}: {reason}")


def _as_value(text: str) -> str:
    """The word of the command line for a value of a list."""
    return VALUE_MARK + text if text.startswith("-") else text


def config_words(argv: Sequence[str], options: Mapping[str, argparse.Action]) -> list[str]:
    """Returns the words that the files of --config stand for, in their order.

    Args:
        argv: the command line.
        options: the flags of its parser.

    Raises:
        ValueError: a file is missing or not TOML, or a flag does not take its value.
    """
    flags = [flag for path in config_files(argv) for flag in read_flags(path)]
    return [word for flag in flags for word in flag.words(options)]


def config_files(argv: Sequence[str]) -> list[str]:
    """Returns the files of every --config on a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(CONFIG_FLAG, nargs="+", action="extend", default=[])
    try:
        return parser.parse_known_args(list(argv))[0].config
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}: name a TOML file of flags.") from error


def read_flags(path: str, table: str = "") -> list[FileFlag]:
    """Reads the flags of a file.

    Args:
        table: read this table of ``TOOL_TABLES``; empty: everything except those tables.

    Raises:
        ValueError: the message names the file and the line.
    """
    text = _read(path)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{CONFIG_FLAG} {path} is not valid TOML: {error}. Text needs quotes, true and false are written in lower case, "
            "and each key may occur once."
        ) from error
    of_tools = {key: content[key] for key in TOOL_TABLES if isinstance(content.get(key), dict)}
    top = {key: value for key, value in content.items() if key not in of_tools}
    found: dict[str, FileFlag] = {}
    for key, value in _flat(of_tools.get(table, {}) if table else top):
        flag = FileFlag(path, _line_of(text, key), key.lstrip("-").replace("-", "_"), value)
        _check_key(flag, found)
        found[flag.name] = flag
    return list(found.values())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{CONFIG_FLAG} {path} does not exist. Name a TOML file of flags.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FLAG} {path} cannot be read as text: {error}") from error


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def _line_of(text: str, key: str) -> int:
    """The number of the line that sets a key, or of a table with this name; 1 if there is none."""
    setting = re.compile(rf"(?:^|[.\s\"'{{,\[]){re.escape(key)}[\"']?\s*[=\]]")
    lines = (line.partition("#")[0] for line in text.splitlines())
    return next((number for number, line in enumerate(lines, 1) if setting.search(line)), 1)


def _check_key(flag: FileFlag, before: Mapping[str, FileFlag]) -> None:
    if flag.name in before:
        raise ValueError(f"{flag.place}: {flag.name} is set before, in line {before[flag.name].line}.")
    if flag_name(flag.name) == CONFIG_FLAG:
        raise ValueError(
            f"{flag.place}: a file cannot name another one. Give both on the command line: {CONFIG_FLAG} FIRST SECOND."
        )
    values = flag.value if isinstance(flag.value, list) else [flag.value]
    if not all(isinstance(value, str | int | float) for value in values):
        raise ValueError(
            f"{flag.place}: {flag.name} is neither text, a number, true, false nor a list of them. Tables may only group flags."
        )


def _spelled_as(flag: str, options: Mapping[str, argparse.Action]) -> str:
    """The flag as the parser spells it: a few of Megatron's have an underscore."""
    return next((option for option in options if option.replace("_", "-") == flag), flag)


@contextlib.contextmanager
def naming_lines(argv: Sequence[str], table: str = "") -> Iterator[None]:
    """Puts file and line before the message of an error about a flag that a file of --config has set.

    Args:
        table: the table of ``TOOL_TABLES`` that is read too.
    """
    try:
        yield
    except (ValueError, RasftError) as error:
        place = _place_of(str(error), argv, table)
        if place and not str(error).startswith(place):
            error.args = (f"{place}: {error}", *error.args[1:])
        raise


def _place_of(message: str, argv: Sequence[str], table: str) -> str:
    """Where the first flag of a message is written; empty if it is typed on the command line."""
    try:
        tables = ["", table] if table else [""]
        read = (read_flags(path, part) for part in tables for path in config_files(argv))
        places = {flag.name: flag.place for flags in read for flag in flags}
    except ValueError:
        return ""
    for match in _FLAG.finditer(message):
        name = match[0].lstrip("-").replace("-", "_")
        if any(word.partition("=")[0] == match[0] for word in argv):
            return ""
        for spelling in (name, name.removeprefix("no_")):
            if spelling in places:
                return places[spelling]
    return ""


def flags_text(tables: Mapping[str, Mapping[str, Any]], comment: str) -> str:
    """Returns the text of a file for --config.

    Args:
        tables: group -> flag -> value. Flags without a value are left out.
        comment: the first line.
    """
    lines = [f"# {comment}"]
    for title, flags in tables.items():
        given = {name: value for name, value in flags.items() if value not in (None, [])}
        if given:
            lines += ["", f"[{title}]", *(f"{name} = {_toml(value)}" for name, value in given.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value in TOML, which has other names for infinity and NaN than JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return '"' + "".join(map(_escaped, str(value))) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() or character == " " else f"\\U{ord(character):08x}"
