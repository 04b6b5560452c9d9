"""Megatron's flags, read from its source. Megatron is not imported, which takes ten seconds.

``megatron/training/arguments.py`` declares flags with ``add_argument``, and makes flags of the fields of its configuration classes
(``ArgumentGroupFactory``). Both are read from the syntax tree.
"""

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

_ARGUMENTS = "training/arguments.py"
_CLASS_FILES = ("training/**/*config*.py", "core/**/*config*.py", "core/*.py")
_TYPES = {"int": int, "float": float, "str": str, "bool": bool}
_KEPT = ("action", "choices", "const", "default", "dest", "nargs", "type")

Options = dict[str, Any]
"""Keywords of ``add_argument``, and ``arg_names``."""


def add_megatron_flags(parser: argparse.ArgumentParser) -> bool:
    """Adds Megatron's flags, in groups with Megatron's titles.

    Values that only Megatron's own functions can convert or check are accepted as text.

    Returns:
        Whether the whole source was understood. If not, there may be more flags.
    """
    package = importlib.util.find_spec("megatron")
    for folder in (package.submodule_search_locations or []) if package else []:
        if Path(folder, _ARGUMENTS).exists():
            return _Declarations(Path(folder), parser).add()
    return False


@dataclass
class _Declarations:
    """The declarations of flags in Megatron's source."""

    root: Path
    parser: argparse.ArgumentParser
    is_complete: bool = True
    variables: dict[str, Any] = field(default_factory=dict)
    """Values of the variables in the present function: groups, factories and lists."""

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        nodes = _parsed(_text(self.root / _ARGUMENTS))
        return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}

    def add(self) -> bool:
        for statement in ast.walk(self.functions["add_megatron_arguments"]):
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
                self._run(self.functions[ast.unparse(statement.value.func)])
        return self.is_complete

    def _run(self, function: ast.FunctionDef) -> None:
        self.variables = {function.args.args[0].arg: self.parser}
        for statement in _statements(function.body):
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self.variables[statement.targets[0].id] = self._value(statement.value)
            elif isinstance(statement, ast.Expr):
                self._value(statement.value)

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression; calls of argparse and of the factory take effect."""
        if isinstance(node, ast.Name):
            return self.variables.get(node.id)
        if not isinstance(node, ast.Call):
            return _literal(node)
        if ast.unparse(node.func) == "ArgumentGroupFactory":
            excluded = {k.arg: self._value(k.value) for k in node.keywords}.get("exclude")
            return ast.unparse(node.args[0]), set(excluded or [])
        if isinstance(node.func, ast.Attribute):
            return self._call(self._value(node.func.value), node.func.attr, node)
        return None

    def _call(self, target: Any, method: str, call: ast.Call) -> Any:
        match method:
            case "add_argument_group":
                words = [*call.args, *(k.value for k in call.keywords if k.arg == "title")]
                return self.parser.add_argument_group(_literal(words[0]))
            case "build_group":
                words = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "title")]
                kind, excluded = target
                return self._build_group(kind, excluded, _literal(words[0]))
            case "add_mutually_exclusive_group":
                return target
            case "add_argument":
                options = _options({k.arg or "": k.value for k in call.keywords})
                self._add_flag(target, [_literal(word) for word in call.args], options)
        return None

    def _add_flag(self, group: Any, names: list[str], options: Options) -> None:
        try:
            group.add_argument(*names, **options)
        except (argparse.ArgumentError, AttributeError, TypeError, ValueError):
            self.is_complete = False

    def _build_group(self, kind: str, excluded: set[str], title: str) -> Any:
        group = self.parser.add_argument_group(title)
        for name, options in self._fields(kind).items():
            if name not in excluded:
                self._add_flag(group, options["arg_names"], {k: options[k] for k in options if k in _KEPT})
        return group

    def _fields(self, kind: str) -> dict[str, Options]:
        """Field -> the options of its flag, for a class and its bases."""
        definition = self._class(kind)
        if definition is None:
            self.is_complete = self.is_complete and kind in ("object", "ABC")
            return {}
        found: dict[str, Options] = {}
        for base in definition.bases:
            found |= self._fields(ast.unparse(base).split(".")[-1])
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_set(node):
                found[node.target.id] = _field_options(node.target.id, node)
        return found

    def _class(self, name: str) -> ast.ClassDef | None:
        head = re.compile(rf"^class {name}\b", re.MULTILINE)
        for source in map(_text, _class_files(self.root)):
            if head.search(source):
                return next(n for n in _parsed(source) if isinstance(n, ast.ClassDef) and n.name == name)
        return None


@cache
def _class_files(root: Path) -> list[Path]:
    return [path for pattern in _CLASS_FILES for path in sorted(root.glob(pattern))]


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _parsed(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a function in their order, also those inside ``if`` and ``try``."""
    for statement in body:
        yield statement
        yield from _statements(getattr(statement, "body", []))


def _literal(node: ast.expr | None, otherwise: Any = None) -> Any:
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except ValueError:
        return otherwise


def _options(keywords: dict[str, ast.expr]) -> Options:
    """The options of a flag. A type or choice that is not written out accepts every text."""
    options: Options = {}
    for name in set(keywords) & set(_KEPT):
        node = keywords[name]
        if name == "type":
            options["type"] = _TYPES.get(ast.unparse(node), str)
        elif ast.unparse(node).endswith("BooleanOptionalAction"):
            options["action"] = argparse.BooleanOptionalAction
        elif name != "choices" or _literal(node) is not None:
            options[name] = _literal(node, "*" if name == "nargs" else None)
    if "action" in options:
        options.pop("type", None)
    return options


def _is_set(field: ast.AnnAssign) -> bool:
    """Whether a field is an argument of its class. Others get no flag."""
    return not any(
        k.arg == "init" and _literal(k.value) is False for k in getattr(field.value, "keywords", [])
    )


def _field_options(name: str, node: ast.AnnAssign) -> Options:
    """The options of a field's flag, as Megatron's ``ArgumentGroupFactory`` makes them."""
    given: dict[str, ast.expr] = {}
    default = _literal(node.value)
    if isinstance(node.value, ast.Call):
        given = {k.arg or "": k.value for k in node.value.keywords}
        default = _literal(given.get("default"))
    spelled = name.replace("_", "-")
    options: Options = {"arg_names": [f"--{spelled}"], "dest": name, "default": default}
    options |= _kind(node.annotation)
    if options.get("type") is bool:
        del options["type"]
        options["action"] = "store_false" if default is not False else "store_true"
        if default is not False:
            options["arg_names"] = [f"--no-{spelled}", f"--disable-{spelled}"]
    return options | _metadata(given.get("metadata"))


def _metadata(node: ast.expr | None) -> Options:
    """The options in ``metadata={"argparse_meta": {...}}``, which take precedence."""
    if not isinstance(node, ast.Dict):
        return {}
    for key, value in zip(node.keys, node.values, strict=True):
        if _literal(key) == "argparse_meta" and isinstance(value, ast.Dict):
            words = {_literal(k): v for k, v in zip(value.keys, value.values, strict=True)}
            return _options(words) | (
                {"arg_names": _literal(words["arg_names"])} if "arg_names" in words else {}
            )
    return {}


def _kind(annotation: ast.expr) -> Options:
    """Type, number of values and choices of an annotation; {"type": str} for types of Megatron."""
    match annotation:
        case ast.Constant(value=str(text)):
            return _kind(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return {"type": _TYPES.get(name, str)}
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return _kind(left)
        case ast.Subscript(value=ast.Name(id="Optional") | ast.Attribute(attr="Optional"), slice=inner):
            return _kind(inner)
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            return {**_kind(inner), "nargs": "+"}
        case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal"), slice=inner):
            values = _literal(inner)
            values = values if isinstance(values, tuple) else (values,)
            return {"type": type(values[0]), "choices": values}
    return {"type": str}
