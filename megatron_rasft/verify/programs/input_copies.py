"""Rewrites tests so that a reference sees the inputs as they were before the program changed them.

In ``assert f(a) == sorted(a)`` a program that empties ``a`` and returns an empty list would be right. The rewritten test holds
the changes back until the statement ends. After ``r = f(a)`` they are held back as long as the next statements calculate
what ``r`` is compared with. A program that returns None changes its inputs at once: that is its purpose. Tests that compare
an input itself (``assert f(a) is None and a == [1, 2]``) see the changes.
"""

import ast
import contextlib
import warnings
from collections.abc import Iterator

HOLD, RELEASE = "__hold_changes__", "__release_changes__"
"""Names that rewritten tests use: ``HOLD(f)`` is ``f`` with its changes held back, ``RELEASE()`` applies them."""

_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def holding_changes(source: str, program_names: set[str]) -> ast.Module:
    """Returns the syntax tree of rewritten tests.

    Args:
        source: the tests.
        program_names: names in the tests that refer to the program.

    Raises:
        SyntaxError: the tests are not valid.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    rewriter = _Rewriter(_with_assigned(tree, set(program_names)))
    # An expression may be too deep, as only machine-made ones are
    with contextlib.suppress(RecursionError):
        rewriter.rewrite(tree)
    return ast.fix_missing_locations(tree) if rewriter.is_changed else tree


def _with_assigned(tree: ast.Module, names: set[str]) -> set[str]:
    """Adds the variables that hold results of the program, and the argument of ``check``, to the names of the program."""
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "check" and node.args.args:
            names.add(node.args.args[0].arg)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _root(node.value) in names:
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields every statement below a node, without looking into expressions, which may be large tables of inputs."""
    for part in _BLOCKS:
        for statement in getattr(node, part, None) or ():
            yield statement
            yield from _statements(statement)


def _root(node: ast.AST) -> str:
    """Returns the name with which a chain of attributes and calls begins: "s" for ``s.f(1).g``."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _program_calls(node: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Call) and _root(n.func) in names)


def _names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _inputs(call: ast.Call) -> set[str]:
    return set().union(*map(_names_in, [*call.args, *(keyword.value for keyword in call.keywords)]), set())


def _operands(node: ast.AST, names: set[str]) -> list[ast.expr]:
    """Returns the values that an expression relates to each other: sides of a comparison or operator, arguments of a call."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Call) and _root(node.func) not in names:
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return []


def _derived(node: ast.AST, operand: ast.expr) -> set[str]:
    """Returns the names from which an operand is calculated. A plain name counts only as argument of a checking function."""
    is_checker = isinstance(node, ast.Call) and not _called_name(node).lower().startswith("assert")
    return set() if isinstance(operand, ast.Name) and not is_checker else _names_in(operand)


def _called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else _root(call.func)


def _pairs(expression: ast.AST, names: set[str]) -> Iterator[tuple[ast.AST, ast.expr, ast.expr]]:
    """Yields (expression, operand, other operand) for all operands that are related to each other."""
    for node in ast.walk(expression):
        operands = _operands(node, names)
        yield from ((node, one, other) for one in operands for other in operands if one is not other)


class _Rewriter:
    """Marks the calls of the program whose changes are held back, and adds statements that apply them."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.is_changed = False

    def rewrite(self, node: ast.AST) -> None:
        """Rewrites the statements below a node."""
        for part in _BLOCKS:
            statements = getattr(node, part, None)
            if isinstance(statements, list):
                setattr(node, part, self._rewritten(statements))
                for statement in statements:
                    self.rewrite(statement)

    def _rewritten(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        if statements and not isinstance(statements[0], ast.stmt):
            return statements  # handlers of a try, or cases of a match
        releases = {}
        for index, statement in enumerate(statements):
            if not any(_program_calls(statement, self._names)):
                continue
            if self._hold_within(statement):
                releases[index] = True
            last = self._last_related(statements, index)
            if last is not None:
                releases[last] = True
        found: list[ast.stmt] = []
        for index, statement in enumerate(statements):
            found.append(statement)
            if index in releases:
                if hasattr(statement, "body"):
                    statement.body.insert(0, _release())
                found.append(_release())
        return found

    def _hold_within(self, statement: ast.stmt) -> bool:
        """Marks calls whose inputs another part of the same statement uses. Returns whether there are any."""
        is_found = False
        for part in ast.iter_child_nodes(statement):
            if not isinstance(part, ast.expr):
                continue
            for node, one, other in _pairs(part, self._names):
                for call in _program_calls(one, self._names):
                    if _inputs(call) & _derived(node, other):
                        is_found |= self._mark(call)
        return is_found

    def _last_related(self, statements: list[ast.stmt], index: int) -> int | None:
        """Marks the calls of ``r = f(a)`` if following statements relate ``r`` to something calculated from ``a``.

        Returns the index of the last of these, or None.
        """
        first = statements[index]
        if not isinstance(first, ast.Assign) or not isinstance(first.targets[0], ast.Name):
            return None
        calls = list(_program_calls(first.value, self._names))
        inputs = set().union(*map(_inputs, calls))
        results, references, last = {first.targets[0].id}, dict[str, int](), None
        for number, statement in enumerate(statements[index + 1 :], index + 1):
            if self._ends(statement, inputs, results):
                break
            is_assigned = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
            if is_assigned and _names_in(statement.value) & inputs:  # type: ignore[attr-defined]
                references[statement.targets[0].id] = number  # type: ignore[attr-defined]
            for node, one, other in _pairs(statement, self._names):
                if _names_in(one) & results:
                    if _derived(node, other) & inputs:
                        last = number
                    last = max([references[n] for n in _names_in(other) & references.keys()], default=last)
        if last is None:
            return None
        marked = [self._mark(call) for call in calls]
        return last if any(marked) else None

    def _ends(self, statement: ast.stmt, inputs: set[str], results: set[str]) -> bool:
        """Returns whether a statement compares an input itself, gives it to the program, or binds a name anew."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Compare):
                operands = [node.left, *node.comparators]
                if any(isinstance(o, ast.Name) and o.id in inputs for o in operands):
                    return True
            if (
                isinstance(node, ast.Name)
                and not isinstance(node.ctx, ast.Load)
                and node.id in inputs | results
            ):
                return True
        return any(_inputs(call) & inputs for call in _program_calls(statement, self._names))

    def _mark(self, call: ast.Call) -> bool:
        if isinstance(call.func, ast.Call) and _root(call.func) == HOLD:
            return True
        call.func = ast.Call(func=ast.Name(id=HOLD, ctx=ast.Load()), args=[call.func], keywords=[])
        self.is_changed = True
        return True


def _release() -> ast.stmt:
    return ast.Expr(value=ast.Call(func=ast.Name(id=RELEASE, ctx=ast.Load()), args=[], keywords=[]))
