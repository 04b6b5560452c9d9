"""Command-line flags: a parser that says a mistake in one line, and flags from a documented dataclass.

Megatron's parser makes flags of a dataclass in its own way.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

_BAD_CHOICE = re.compile(r"argument \S+: invalid choice: '?([^']*?)'? \(choose from (.*)\)")


class _WholeFlags(argparse.HelpFormatter):
    """Does not break a line within the name of a flag."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        words = " ".join(text.split())
        return textwrap.fill(
            words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


class FlagParser(argparse.ArgumentParser):
    """Raises a mistake as a ValueError of one line, with the flag or the choice that was probably meant.

    After parsing, ``given_flags`` of the namespace are the flags that were typed, as typed, by their destination.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _WholeFlags, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        typed = [token.partition("=")[0] for token in (sys.argv[1:] if args is None else args)]
        names = {option: action.dest for action in self._actions for option in action.option_strings}
        parsed, rest = super().parse_known_args(args, namespace)
        parsed.given_flags = {names[token]: token for token in typed if token in names}
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        mistyped, known = "", list[str]()
        if message.startswith("unrecognized arguments: "):
            mistyped = message.split()[2].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
        elif match := _BAD_CHOICE.match(message):
            mistyped, known = match[1], [name.strip("'") for name in match[2].split(", ")]
        close = difflib.get_close_matches(mistyped, known, n=1)
        raise ValueError(
            f"{message}. " + (f"Did you mean {close[0]}?" if close else "--help lists the flags.")
        )

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)  # type: ignore[misc]
        except KeyError:  # Megatron looks the name up in an enumeration
            names: Iterable[Any] = action.choices or ()
            choices = ", ".join(repr(name.name) for name in names)
            raise argparse.ArgumentError(
                action, f"invalid choice: {text!r} (choose from {choices})"
            ) from None


def with_default(text: str, default: Any) -> str:
    """A flag's help as argparse prints it, with its default unless that is to be unset."""
    if default not in (None, [], ""):
        shown = ("off", "on")[default] if isinstance(default, bool) else repr(default)
        text += f" Default: {shown}"
    return text.replace("%", "%%")


def add_flags(group: argparse._ActionsContainer, config: type) -> None:
    """One flag per field of ``config``, named as the field; the string after the field is its help."""
    types = get_type_hints(config)
    docs = _field_docs(config)
    for field in dataclasses.fields(config):
        kind = types[field.name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            default = None
        options: dict[str, Any] = {"default": default, "help": with_default(docs[field.name], default)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            (item,) = get_args(kind)
            options.update(nargs="+", type=item, metavar="N" if item is int else "FILE")
        else:
            options["type"] = next((part for part in get_args(kind) if part is not NoneType), kind)
            options["metavar"] = "N" if options["type"] in (int, float) else "TEXT"
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def read_flags[T](args: argparse.Namespace, config: type[T]) -> T:
    """The dataclass back from parsed arguments; raises the ValueError of its own checks."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    return config(**{field.name: getattr(args, field.name) for field in fields})


def _field_docs(config: type) -> dict[str, str]:
    """The string literal that follows each field in the class's source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef), "getsource of a class is a class"
    docs = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
        ):
            docs[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return docs
