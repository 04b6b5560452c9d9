"""Command-line flags of a program of this package's own from a documented dataclass; Megatron's parser has its own way."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints


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
        options: dict[str, Any] = {"default": default, "help": docs[field.name].replace("%", "%%")}
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
        if default not in (None, [], ""):
            options["help"] += f" Default: {repr(default).replace('%', '%%')}"
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
