"""The tester: the process that runs the tests and gives the verdict.

It never runs a line of the program. The program's names are bound to stand-ins in the tests.
"""

import ast
import builtins
import importlib
import inspect
import io
import json
import os
import re
import socket
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rasft.types import CodeTests, Verdict
from megatron_rasft.verify.programs.messages import CandidateEndedError, CannotCrossError
from megatron_rasft.verify.programs.stand_ins import TesterSide

_MODULE = "program_tests"
_FRESH_GLOBALS = {"__name__": _MODULE, "__builtins__": builtins}


def judge(tests: CodeTests, stream: socket.socket, max_bytes: int) -> tuple[Verdict, str]:
    """Runs the tests against the program at the other end of ``stream``.

    Args:
        tests: of any style but ``stdin``.
        stream: the socket to the candidate.
        max_bytes: the longest message in either direction.

    Returns:
        The verdict (never ``timeout``, which the launcher decides) and a short reason.
    """
    side = TesterSide(stream, max_bytes, _MODULE)
    sys.stdout = io.StringIO()
    _compare_empty_arrays_as_different(tests)
    try:
        failure = side.started()
        if failure:
            return "wrong", failure
        verdict, reason = _RUNNERS[tests.style](tests, side)
        if side.fault is not None:
            raise side.fault
        if verdict == "correct" and not side.num_uses:
            return "unverifiable", "the tests pass without using the program"
        return verdict, reason
    except CandidateEndedError as error:
        return "wrong", str(error)
    except CannotCrossError as error:
        return "unverifiable", str(error)
    except MemoryError:
        return "unverifiable", "the tests ran out of memory"


def _compare_empty_arrays_as_different(tests: CodeTests) -> None:
    """Patches numpy and pytest in this process, so that an empty array does not equal every number.

    ``numpy.allclose([], 4)`` and ``[] == pytest.approx(4)`` with an array are true. A program could pass by returning
    an empty array.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return
    modules = {numpy: "allclose isclose array_equiv"}
    if any("testing" in script for script in (tests.setup, *tests.tests)):
        names = "assert_allclose assert_array_equal assert_almost_equal assert_array_almost_equal assert_array_less"
        modules[importlib.import_module("numpy.testing")] = names
    for module, names in modules.items():
        for name in names.split():
            setattr(module, name, _refusing_empty(getattr(module, name), numpy))
    pytest = sys.modules.get("pytest")
    if pytest is not None:
        near: Any = type(pytest.approx(0.0))
        equals = near.__eq__

        def is_near(own: Any, value: Any) -> bool:
            is_empty = isinstance(value, numpy.ndarray) and not value.size
            return not is_empty and equals(own, value)

        near.__eq__ = is_near


def _refusing_empty(compare: Callable[..., Any], numpy: Any) -> Callable[..., Any]:
    """Returns ``compare`` with one change: an empty array differs from every array that is not empty."""
    signature = inspect.signature(compare)

    def comparison(*args: Any, **keywords: Any) -> Any:
        call = signature.bind(*args, **keywords)
        sizes = set()
        for name in list(call.arguments)[:2]:
            # Converted only once, because an object of the program could return another array at the second conversion
            array = call.arguments[name] = numpy.asanyarray(call.arguments[name])
            sizes.add(bool(array.size))
        if len(sizes) == 1:
            return compare(*call.args, **call.kwargs)
        assert not compare.__name__.startswith("assert"), "an empty array equals only another empty array"
        return False

    return comparison


def _run_asserts(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    # All tests share one scope: a statement may use what an earlier one assigned
    scope = dict(_FRESH_GLOBALS)
    scope.update(_names_of_program([tests.setup, *tests.tests], tests.entry_point, side))
    if tests.setup:
        failure = _run(tests.setup, "setup", scope)
        if failure:
            return "wrong", f"setup of the tests: {failure}"
    for number, test in enumerate(tests.tests, 1):
        failure = _run(test, f"test {number}", scope)
        if failure:
            return "wrong", f"test {number} of {len(tests.tests)}: {failure}"
    return "correct", f"{len(tests.tests)} tests passed"


def _run_check(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    scope = dict(_FRESH_GLOBALS)
    if tests.prompt:
        # The prompt may define helper functions beside the one to complete (HumanEval/32), and the tests call them
        failure = _run(_closed(tests.prompt), "prompt", scope)
        if failure:
            return "unverifiable", f"prompt of the tests: {failure}"
    try:
        program = side.get(tests.entry_point)
    except AttributeError:
        return "wrong", f"the program does not define {tests.entry_point}"
    scope[tests.entry_point] = program
    for script in (tests.setup, *tests.tests):
        failure = _run(script, "tests", scope)
        if failure:
            return "wrong", failure
    check = scope.get("check")
    if not isinstance(check, types.FunctionType):
        return "unverifiable", "the tests do not define a function check"
    failure = _failure_of(lambda: check(program))
    return ("wrong", failure) if failure else ("correct", "check passed")


def _run_functional(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    try:
        owner: Any = side.get("Solution")
    except AttributeError:
        owner = None
    for number, case in enumerate(tests.cases, 1):
        failure = _failure_of(partial(_compare_json, case.input, case.output, owner, tests.entry_point, side))
        if failure:
            return "wrong", f"case {number} of {len(tests.cases)}: {failure}"
    return "correct", f"{len(tests.cases)} cases passed"


def _compare_json(inputs: str, output: str, owner: Any, entry_point: str, side: TesterSide) -> None:
    arguments = [json.loads(line) for line in inputs.split("\n") if line.strip()]
    function = side.get(entry_point) if owner is None else getattr(owner(), entry_point)
    result = function(*arguments)
    # JSON has no tuples. Like LiveCodeBench's own harness, accept a tuple in place of a list
    as_list = list(result) if type(result) is tuple else result
    assert as_list == json.loads(output), "wrong value"


def _run_pytest(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    try:
        import pytest
    except ImportError:
        return "unverifiable", "the tests need pytest: pip install 'megatron-rasft[code]'"
    source = "\n".join([tests.setup, *tests.tests])
    sys.modules["solution"] = _ProgramModule(source, tests.entry_point, side)
    module = types.ModuleType(_MODULE)
    module.__dict__["__file__"] = f"{_MODULE}.py"
    failure = _run(source, "tests", module.__dict__)
    if failure:
        return "wrong", failure

    functions = _plain_functions(source)
    return _call_all(functions, module) if functions else _run_by_pytest(module, pytest)


def _call_all(functions: list[str], module: types.ModuleType) -> tuple[Verdict, str]:
    for name in functions:
        failure = _failure_of(module.__dict__[name])
        if failure:
            return "wrong", f"{name}: {failure}"
    return "correct", f"{len(functions)} tests passed"


def _run_by_pytest(module: types.ModuleType, pytest: Any) -> tuple[Verdict, str]:
    outcomes = _Outcomes(module, pytest)
    # pytest collects only existing files. This file of pytest itself is readable and imports nothing
    anchor = Path(pytest.__file__).with_name("py.typed")
    options = "--capture=sys -p no:cacheprovider -p no:faulthandler -p no:junitxml".split()
    if not _opens_null():
        # disabled because it writes to /dev/null, which the level "limits" does not allow
        options += ["-p", "no:logging"]
    # Without these, pytest would look for configuration files in folders that are not readable
    options += ["-c", os.devnull, "--rootdir", str(anchor.parent), "--confcutdir", str(anchor.parent)]
    try:
        pytest.main([*options, "--import-mode=importlib", str(anchor)], plugins=[outcomes])
    except SystemExit:
        return "wrong", "the tests were ended by SystemExit"
    if outcomes.failure:
        return "wrong", outcomes.failure
    if not outcomes.num_passed:
        return "unverifiable", "the tests do not define a test function"
    return "correct", f"{outcomes.num_passed} tests passed"


def _plain_functions(source: str) -> list[str]:
    """Returns the names of the test functions if calling them equals running pytest, else [].

    Calling is much faster than pytest. It is not enough for fixtures, parameters, marks, skips, classes and set-up.
    """
    tree = ast.parse(source)
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test")]
    names = [n.name for n in tests]
    has_arguments = any(ast.unparse(n.args) or n.decorator_list for n in tests)
    mentions = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    mentions |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    is_more = any(
        isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and n.name.startswith(("Test", "setup", "teardown", "pytest", "async"))
        for n in ast.walk(tree)
    )
    asks_pytest = mentions & {
        "fixture",
        "mark",
        "pytestmark",
        "unittest",
        "skip",
        "xfail",
        "importorskip",
        "fail",
    }
    is_async = any(isinstance(n, ast.AsyncFunctionDef) for n in tree.body)
    is_plain = not (has_arguments or is_more or asks_pytest or is_async) and len(set(names)) == len(names)
    return names if is_plain else []


class _Outcomes:
    """A pytest plugin that collects the tests of a module in memory and keeps the first failure.

    Args:
        module: the module with the tests; it does not exist as a file.
        pytest: the package, which may not be installed.
    """

    def __init__(self, module: types.ModuleType, pytest: Any) -> None:
        self.num_passed = 0
        self.failure = ""

        # The class is defined here because its base exists only if pytest is installed
        class InMemory(pytest.Module):  # type: ignore[misc,name-defined]
            def _getobj(self) -> types.ModuleType:
                return module

        self._collector = InMemory

    # pytest calls the following methods by their names
    def pytest_collect_file(self, file_path: Path, parent: Any) -> Any:
        return self._collector.from_parent(parent, path=file_path)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "passed" and not hasattr(report, "wasxfail"):
            self.num_passed += report.when == "call"
        else:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = f": {crash.message}" if crash is not None else ""
            name = report.nodeid.rpartition("::")[2]
            self.failure = self.failure or re.sub(r"\s+", " ", f"{name} {report.outcome}{why}")[:200]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            last_line = str(report.longrepr).rstrip().rpartition("\n")[2]
            self.failure = self.failure or f"the tests cannot be collected: {last_line}"[:200]


def _opens_null() -> bool:
    try:
        with open(os.devnull, "w"):
            return True
    except OSError:
        return False


class _ProgramModule(types.ModuleType):
    """The module ``solution`` that the tests import: its attributes are looked up in the program."""

    def __init__(self, source: str, entry_point: str, side: TesterSide) -> None:
        super().__init__("solution")
        self._side = side
        # "from solution import *" must not replace names of the tests, such as builtins they use
        self.__all__ = list(_names_of_program([source], entry_point, side))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._side.get(name)


_RUNNERS: dict[str, Callable[[CodeTests, TesterSide], tuple[Verdict, str]]] = {
    "asserts": _run_asserts,
    "check": _run_check,
    "functional": _run_functional,
    "pytest": _run_pytest,
}


def _names_of_program(sources: Iterable[str], entry_point: str, side: TesterSide) -> dict[str, Any]:
    """Returns name -> the program's value, for names that the tests read and that neither they nor the builtins define.

    So a program cannot replace ``sorted`` or ``abs`` for the tests, unless that is its entry point.
    """
    read: set[str] = set()
    bound: set[str] = set()
    for source in sources:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.Import):
                bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module != "solution":
                bound.update(alias.asname or alias.name for alias in node.names)
    found = {}
    for name in sorted(read - bound - set(dir(builtins)) | {entry_point} - {""}):
        try:
            found[name] = side.get(name)
        except AttributeError:
            continue  # the test that uses the name fails with a NameError
    return found


def _closed(prompt: str) -> str:
    """Returns the prompt as valid source: a function without a body at its end gets ``pass``."""
    try:
        ast.parse(prompt)
        return prompt
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"


def _run(source: str, name: str, scope: dict[str, Any]) -> str:
    """Executes a script. Returns a description of the exception it raised, or an empty string."""

    def execute() -> None:
        exec(compile(source, name, "exec", dont_inherit=True), scope)

    return _failure_of(execute)


def _failure_of(action: Callable[[], None]) -> str:
    """Calls ``action``. Returns a description of the exception it raised, or an empty string."""
    try:
        action()
    except (CandidateEndedError, CannotCrossError, MemoryError):
        raise
    except BaseException as error:
        text = re.sub(r"\s+", " ", _text_of(error))
        return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
    return ""


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # an exception of the tests may hold a stand-in, and str() of that may fail
        return ""
