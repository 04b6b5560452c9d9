"""Reads the scripts of tests without running them: their syntax, the names they take from the program, whether they can fail."""

import ast
import builtins
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from megatron_rasft.types import CodeTests

_CHECKING_CALL = re.compile(r"_*(?:assert|fail|raises|expect|should|verify|exit|quit|abort)", re.IGNORECASE)
_CATCHES_ASSERTIONS = frozenset({"AssertionError", "Exception", "BaseException"})
_HANDLING = re.compile(r"\bexcept\b|[Rr]aises|\bsuppress\b|__exit__|contextmanager")


@lru_cache(maxsize=256)
def parse_script(source: str) -> ast.Module:
    """Returns the syntax tree of a script. Do not change it: the next call returns the same object.

    Raises:
        SyntaxError: the script is not valid Python, or too deeply nested.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error) or type(error).__name__) from None


def find_fault(tests: CodeTests) -> str:
    """Returns why these tests cannot check any program, or an empty string.

    They cannot if a script is not valid Python, or if no statement of them can fail, for example because ``assert`` is
    missing.
    """
    if not tests.tests:
        return ""
    trees = []
    for name, source in _named_scripts(tests):
        try:
            trees.append(parse_script(source))
        except SyntaxError as error:
            return f"{name} is not valid Python: {error.msg}"
    if tests.style == "pytest" and any(map(_is_async_test, trees[0].body)):
        return "asynchronous test functions need a plugin of pytest"
    if not any(_can_fail(tree.body) for tree in trees):
        return "the tests cannot fail: they have no assert that can be false"
    return ""


def _is_async_test(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AsyncFunctionDef) and statement.name.startswith("test")


def _named_scripts(tests: CodeTests) -> Iterator[tuple[str, str]]:
    if tests.style == "pytest":
        # one file, which may begin with imports from __future__
        yield "the test file", "\n".join([tests.setup, *tests.tests])
        return
    if tests.setup:
        yield "the setup", tests.setup
    for number, source in enumerate(tests.tests, 1):
        yield f"test {number} of {len(tests.tests)}", source


def handles_errors(source: str) -> bool:
    """Returns whether a script has handlers for exceptions, so that an exception of the program may be expected."""
    return _HANDLING.search(source) is not None


def parts_of(source: str) -> list[tuple[str, str]]:
    """Returns the name ("" if it has none) and the source of each statement of a valid script."""
    lines = source.split("\n")
    return [
        (getattr(node, "name", ""), "\n".join(lines[node.lineno - 1 : node.end_lineno]))
        for node in parse_script(source).body
    ]


@dataclass
class _Names:
    """Names in a script, by their use."""

    read: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    """Names that the script defines, without arguments of functions and without names imported from ``solution``."""
    arguments: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    """Names imported from ``solution``, or read as its attributes."""
    aliases: set[str] = field(default_factory=set)
    """The names under which these are imported."""


@lru_cache(maxsize=256)
def _names_in(source: str) -> _Names:
    found = _Names()
    try:
        tree = parse_script(source)
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        record = _RECORDERS.get(type(node))
        if record is not None:
            record(node, found)
    return found


def _record_name(node: ast.Name, found: _Names) -> None:
    (found.read if isinstance(node.ctx, ast.Load) else found.bound).add(node.id)


def _record_call(node: ast.Call, found: _Names) -> None:
    if isinstance(node.func, ast.Name):
        found.called.add(node.func.id)


def _record_attribute(node: ast.Attribute, found: _Names) -> None:
    if isinstance(node.value, ast.Name) and node.value.id == "solution":
        found.asked.add(node.attr)


def _record_import(node: ast.Import | ast.ImportFrom, found: _Names) -> None:
    if isinstance(node, ast.Import) or node.module != "solution":
        found.bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        return
    found.asked.update(alias.name for alias in node.names if alias.name != "*")
    found.aliases.update(alias.asname or alias.name for alias in node.names)


_RECORDERS: dict[type, Callable[[Any, _Names], None]] = {
    ast.Name: _record_name,
    ast.Call: _record_call,
    ast.Attribute: _record_attribute,
    ast.Import: _record_import,
    ast.ImportFrom: _record_import,
    ast.arg: lambda node, found: found.arguments.add(node.arg),
    **dict.fromkeys(
        (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), lambda node, found: found.bound.add(node.name)
    ),
}


def free_names(sources: Iterable[str]) -> set[str]:
    """Returns the names that the scripts read and do not define. Names imported from ``solution`` are among them."""
    names = [_names_in(source) for source in sources]
    read: set[str] = set().union(*(found.read for found in names))
    return read.difference(*(found.bound for found in names))


def names_called(sources: Iterable[str]) -> set[str]:
    """Returns the names that the scripts call as functions."""
    return set().union(*(_names_in(source).called for source in sources))


@lru_cache(maxsize=64)
def names_of_program(tests: CodeTests) -> tuple[str, ...]:
    """Returns the names that the tests take from the program: imported from ``solution``, or read and defined nowhere."""
    sources = [tests.setup, *tests.tests]
    names = [_names_in(source) for source in sources]
    asked: set[str] = set().union(*(found.asked for found in names))
    own: set[str] = set().union(*(found.arguments | found.aliases for found in names))
    return tuple(sorted(asked | free_names(sources) - own - set(dir(builtins)) - {"solution"}))


def aliases_of_program(tests: CodeTests) -> set[str]:
    """Returns the names under which the tests import names of the program."""
    return set().union(*(_names_in(source).aliases for source in (tests.setup, *tests.tests)))


def _can_fail(statements: Iterable[ast.AST]) -> bool:
    """Returns whether any of these statements may raise an exception that ends the test, other than by using the program."""
    return any(_node_can_fail(statement) for statement in statements)


def _node_can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not _is_always_true(node.test)
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.Call) and _CHECKING_CALL.match(_last_name(node.func)):
        return True
    if isinstance(node, ast.Try) and any(map(_catches_assertions, node.handlers)):
        parts = [*node.handlers, *node.orelse, *node.finalbody]
        return _can_fail(parts)
    if isinstance(node, ast.With) and any(map(_suppresses_assertions, node.items)):
        return False
    return _can_fail(ast.iter_child_nodes(node))


def _last_name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _catches_assertions(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(_last_name(kind) in _CATCHES_ASSERTIONS for kind in kinds)


def _suppresses_assertions(item: ast.withitem) -> bool:
    call = item.context_expr
    if not isinstance(call, ast.Call) or _last_name(call.func) != "suppress":
        return False
    return any(_last_name(kind) in _CATCHES_ASSERTIONS for kind in call.args)


def _is_always_true(test: ast.expr) -> bool:
    """Returns whether an asserted expression is true whatever the program does."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Tuple | ast.List | ast.Set):
        return bool(test.elts)
    if isinstance(test, ast.BoolOp):
        combine = any if isinstance(test.op, ast.Or) else all
        return combine(map(_is_always_true, test.values))
    if isinstance(test, ast.NamedExpr):
        return _is_always_true(test.value)
    if isinstance(test, ast.JoinedStr):
        return any(isinstance(part, ast.Constant) for part in test.values)
    return isinstance(test, ast.GeneratorExp | ast.Lambda) or (isinstance(test, ast.Dict) and bool(test.keys))
