"""Reads the scripts of tests without running them: their syntax, the names they take from the program, whether they can fail."""

import ast
import builtins
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache

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
            compile(source, "tests", "exec", dont_inherit=True)
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
    if not any(_can_fail(tree.body) for tree in trees):
        return "the tests cannot fail: they have no assert that can be false"
    return ""


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


def names_bound(sources: Iterable[str]) -> set[str]:
    """Returns the names that the scripts define themselves. Names imported from ``solution`` are the program's."""
    bound: set[str] = set()
    for node in _nodes(sources):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import):
            bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module != "solution":
            bound.update(alias.asname or alias.name for alias in node.names)
    return bound


def names_read(sources: Iterable[str]) -> set[str]:
    """Returns the names that the scripts read."""
    return {
        node.id for node in _nodes(sources) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def names_called(sources: Iterable[str]) -> set[str]:
    """Returns the names that the scripts call as functions."""
    calls = (node.func for node in _nodes(sources) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def names_of_program(tests: CodeTests) -> list[str]:
    """Returns the names that the tests take from the program: imported from ``solution``, or read and defined nowhere."""
    sources = [tests.setup, *tests.tests]
    aliases = [
        alias
        for node in _nodes(sources)
        if isinstance(node, ast.ImportFrom) and node.module == "solution"
        for alias in node.names
    ]
    imported = {alias.name for alias in aliases} - {"*"}
    attributes = {
        node.attr
        for node in _nodes(sources)
        if isinstance(node, ast.Attribute) and _last_name(node.value) == "solution"
    }
    arguments = {node.arg for node in _nodes(sources) if isinstance(node, ast.arg)}
    bound = names_bound(sources) | arguments | {alias.asname or alias.name for alias in aliases}
    return sorted(imported | attributes | names_read(sources) - bound - set(dir(builtins)) - {"solution"})


def _nodes(sources: Iterable[str]) -> Iterator[ast.AST]:
    for source in sources:
        try:
            yield from ast.walk(parse_script(source))
        except SyntaxError:
            continue


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
