"""The tester: the process that runs the tests and gives the verdict.

It never runs a line of the program. The program's names are bound to stand-ins in the tests.
"""

import ast
import builtins
import io
import json
import os
import re
import socket
import sys
import traceback
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rasft.types import CodeTests, Verdict
from megatron_rasft.verify.programs.empty_arrays import patch_comparisons
from megatron_rasft.verify.programs.input_copies import HOLD, RELEASE, holding_changes
from megatron_rasft.verify.programs.messages import CandidateEndedError, CannotCrossError, shared_name
from megatron_rasft.verify.programs.scripts import (
    aliases_of_program,
    find_fault,
    free_names,
    handles_errors,
    names_called,
    names_of_program,
    parts_of,
)
from megatron_rasft.verify.programs.stand_ins import RemoteObject, TesterSide

_MODULE = "program_tests"
# A name of these modules that the tests use without importing it is missing in the tests, not in the program
_COMMON_MODULES = (
    "math cmath collections itertools functools operator typing string random pytest numpy".split()
)
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
    fault = find_fault(tests)
    if fault:
        return "unverifiable", fault
    side = TesterSide(stream, max_bytes, _MODULE)
    sys.stdout = io.StringIO()
    scripts = (tests.setup, *tests.tests)
    patch_comparisons(
        has_numpy=any("numpy" in script for script in scripts),
        has_numpy_testing=any("testing" in script for script in scripts),
        has_pytest=any("pytest" in script for script in scripts),
    )
    try:
        failure = side.started(has_star_imports=tests.style == "functional")
        if failure:
            return "wrong", failure
        sys.modules["solution"] = _ProgramModule(tests, side)
        verdict, reason = _RUNNERS[tests.style](tests, side)
        if side.fault is not None:
            raise side.fault
        if verdict == "correct" and side.ignored is not None:
            return "wrong", f"the tests ignore an exception of the program: {_describe(side.ignored)}"
        if verdict == "correct" and not side.num_uses:
            return "unverifiable", "the tests pass without using the program"
        return verdict, reason
    except CandidateEndedError as error:
        return "wrong", str(error)
    except CannotCrossError as error:
        return "unverifiable", str(error)
    except MemoryError:
        # A program can make any test run out of memory: list(f(2)) if f returns a long range
        return "wrong" if side.num_uses else "unverifiable", "the tests ran out of memory"


def _run_asserts(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    # All tests share one scope: a statement may use what an earlier one assigned
    scope = dict(_FRESH_GLOBALS)
    scope.update(_bind_names_of_program(tests, side))
    scripts = [tests.setup] if tests.setup else []
    for number, script in enumerate([*scripts, *tests.tests], 1 - len(scripts)):
        _expect_errors(side, script, *(other for other in (tests.setup, *tests.tests) if "def " in other))
        failure = _run(script, f"test {number}" if number else "setup", scope, tests, side)
        if failure is not None:
            where = f"test {number} of {len(tests.tests)}" if number else "setup of the tests"
            return _verdict_of(failure, tests, side), f"{where}: {_describe(failure)}"
    return "correct", f"{len(tests.tests)} tests passed"


def _run_check(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    scope = dict(_FRESH_GLOBALS)
    if tests.prompt:
        # The prompt may define helper functions beside the one to complete (HumanEval/32), and the tests call them
        prompt = _closed(tests.prompt)
        failure = _failure_of(lambda: exec(compile(prompt, "prompt", "exec", dont_inherit=True), scope))
        if failure is not None:
            return "unverifiable", f"prompt of the tests: {_describe(failure)}"
    try:
        program = side.get(tests.entry_point)
    except AttributeError:
        return "wrong", f"the program does not define {tests.entry_point}"
    scope[tests.entry_point] = program
    _expect_errors(side, tests.setup, *tests.tests)
    for script in (tests.setup, *tests.tests):
        failure = _run(script, "tests", scope, tests, side)
        if failure is not None:
            return _verdict_of(failure, tests, side), _describe(failure)
    check = scope.get("check")
    if not isinstance(check, types.FunctionType):
        return "unverifiable", "the tests do not define a function check"
    failure = _failure_of(lambda: check(program))
    if failure is not None:
        return _verdict_of(failure, tests, side), _describe(failure)
    return "correct", "check passed"


def _run_functional(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    try:
        owner: Any = side.get("Solution")
    except AttributeError:
        owner = None
    for number, case in enumerate(tests.cases, 1):
        try:
            arguments = [json.loads(line) for line in case.input.split("\n") if line.strip()]
            expected = json.loads(case.output)
        except ValueError as error:
            return "unverifiable", f"case {number} of {len(tests.cases)} is not valid JSON: {error}"
        failure = _failure_of(partial(_compare, arguments, expected, owner, tests.entry_point, side))
        if failure is not None:
            return "wrong", f"case {number} of {len(tests.cases)}: {_describe(failure)}"
    return "correct", f"{len(tests.cases)} cases passed"


def _compare(arguments: list[Any], expected: Any, owner: Any, entry_point: str, side: TesterSide) -> None:
    function = side.get(entry_point) if owner is None else getattr(owner(), entry_point)
    assert _without_tuples(function(*arguments)) == expected, "wrong value"


def _without_tuples(value: Any) -> Any:
    """Returns a result with lists in place of tuples, also inside. JSON has no tuples, and LiveCodeBench accepts them."""
    if isinstance(value, tuple | list):
        return [_without_tuples(item) for item in value]
    if type(value) is dict:
        return {key: _without_tuples(item) for key, item in value.items()}
    return value


def _run_pytest(tests: CodeTests, side: TesterSide) -> tuple[Verdict, str]:
    try:
        import pytest
    except ImportError:
        return "unverifiable", "the tests need pytest: pip install 'megatron-rasft[code]'"
    source = "\n".join([tests.setup, *tests.tests])
    module = types.ModuleType(_MODULE)
    module.__dict__["__file__"] = f"{_MODULE}.py"
    module.__dict__.update(_bind_names_of_program(tests, side))
    _expect_errors(side, source)
    failure = _run(source, "tests", module.__dict__, tests, side)
    if failure is not None:
        return _verdict_of(failure, tests, side), _describe(failure)

    functions = _plain_functions(source)
    return (
        _call_all(functions, module, tests, side)
        if functions
        else _run_by_pytest(module, pytest, tests, side)
    )


def _call_all(
    functions: list[str], module: types.ModuleType, tests: CodeTests, side: TesterSide
) -> tuple[Verdict, str]:
    parts = parts_of("\n".join([tests.setup, *tests.tests]))
    shared = [source for name, source in parts if name not in functions]
    for name in functions:
        _expect_errors(side, *shared, *(source for part, source in parts if part == name))
        failure = _failure_of(module.__dict__[name])
        if failure is not None:
            return _verdict_of(failure, tests, side), f"{name}: {_describe(failure)}"
    return "correct", f"{len(functions)} tests passed"


def _run_by_pytest(
    module: types.ModuleType, pytest: Any, tests: CodeTests, side: TesterSide
) -> tuple[Verdict, str]:
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
        is_unrelated = outcomes.error is not None and not side.has_raised(outcomes.error)
        is_failed_assert = isinstance(outcomes.error, AssertionError) and side.num_uses > 0
        if outcomes.is_before_test and is_unrelated and not is_failed_assert:
            return "unverifiable", outcomes.failure
        return _verdict_of(outcomes.error, tests, side), outcomes.failure
    if outcomes.num_skipped:
        return "unverifiable", f"{outcomes.num_skipped} tests were skipped or are expected to fail"
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


# unittest and pytest call these before each test or before all
_SET_UP = frozenset("setUp setUpClass setUpModule asyncSetUp setup_method setup_class setup_module".split())


class _Outcomes:
    """A pytest plugin that collects the tests of a module in memory and keeps the first failure.

    Args:
        module: the module with the tests; it does not exist as a file.
        pytest: the package, which may not be installed.
    """

    def __init__(self, module: types.ModuleType, pytest: Any) -> None:
        self.num_passed = 0
        self.num_skipped = 0
        self.failure = ""
        self.error: BaseException | None = None
        """The exception of the first failure."""
        self.is_before_test = False
        """Whether the first failure is one of the collection or of a fixture, and not of a test itself."""

        # The class is defined here because its base exists only if pytest is installed
        class InMemory(pytest.Module):  # type: ignore[misc,name-defined]
            def _getobj(self) -> types.ModuleType:
                return module

        self._collector = InMemory

    # pytest calls the following methods by their names
    def pytest_collect_file(self, file_path: Path, parent: Any) -> Any:
        return self._collector.from_parent(parent, path=file_path)

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        if self.error is None:
            self.error = call.excinfo.value
            frames = {frame.name for frame in traceback.extract_tb(self.error.__traceback__)}
            self.is_before_test = report.when != "call" or bool(frames & _SET_UP)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = f": {crash.message}" if crash is not None else ""
            name = report.nodeid.rpartition("::")[2]
            self.failure = self.failure or re.sub(r"\s+", " ", f"{name} {report.outcome}{why}")[:200]
        elif report.skipped or hasattr(report, "wasxfail"):
            self.num_skipped += 1
        else:
            self.num_passed += report.when == "call"

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

    def __init__(self, tests: CodeTests, side: TesterSide) -> None:
        super().__init__("solution")
        self._tests = tests
        self._side = side

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            # "from solution import *" must not replace names of the tests, such as builtins they use
            return list(_bind_names_of_program(self._tests, self._side))
        if name.startswith("__"):
            raise AttributeError(name)
        # The tests ask for this name of the program, so they use it even if the program lacks it
        self._side.num_uses += 1
        value = self._side.get(name)
        self._side.num_uses -= not _is_used_by_reading(name, value, self._tests)
        return value


_RUNNERS: dict[str, Callable[[CodeTests, TesterSide], tuple[Verdict, str]]] = {
    "asserts": _run_asserts,
    "check": _run_check,
    "functional": _run_functional,
    "pytest": _run_pytest,
}


def _bind_names_of_program(tests: CodeTests, side: TesterSide) -> dict[str, Any]:
    """Returns name -> the program's value, for names that the tests read and that neither they nor the builtins define.

    So a program cannot replace ``sorted`` or ``abs`` for the tests, unless that is its entry point.
    """
    # pytest's file is one script; another style's scripts share one scope
    scripts = (
        ["\n".join([tests.setup, *tests.tests])] if tests.style == "pytest" else [tests.setup, *tests.tests]
    )
    read = free_names(scripts)
    found = {}
    for name in sorted(read - set(dir(builtins)) | {tests.entry_point} - {""}):
        try:
            found[name] = side.get(name)
        except AttributeError:
            continue  # the test that uses the name fails with a NameError
        side.num_uses += name in read and _is_used_by_reading(name, found[name], tests)
    return found


def _is_used_by_reading(name: str, value: Any, tests: CodeTests) -> bool:
    """Returns whether tests that only read this value have used the program.

    Uses of the program's objects are counted by their operations instead. A value of a library, such as ``typing.List``, does not
    count, unless the program gives it as the entry point.
    """
    if isinstance(value, RemoteObject):
        return False
    return name == tests.entry_point or shared_name(value) is None


def _expect_errors(side: TesterSide, *sources: str) -> None:
    """Tells the tester's side whether the scripts that now run may handle exceptions of the program."""
    side.expects_errors = any(map(handles_errors, sources))
    side.expects_stop = any("StopIteration" in source or "StopAsyncIteration" in source for source in sources)


def _verdict_of(error: BaseException | None, tests: CodeTests, side: TesterSide) -> Verdict:
    """Returns ``wrong``, or ``unverifiable`` for an exception that shows that the tests cannot run with any program."""
    if error is None or side.has_raised(error):
        return "wrong"
    if isinstance(error, _InvalidScriptError):
        return "unverifiable"
    if isinstance(error, ImportError):
        return "wrong" if error.name == "solution" else "unverifiable"
    if type(error) is NameError:
        return "wrong" if _is_expected(error.name, tests, side) else "unverifiable"
    return "wrong" if side.num_uses else "unverifiable"


def _is_expected(name: str | None, tests: CodeTests, side: TesterSide) -> bool:
    """Returns whether the program, not the tests, should have defined ``name``, which is unbound."""
    if tests.entry_point:
        return name == tests.entry_point or not side.defines(tests.entry_point)
    is_common = any(hasattr(sys.modules.get(module), str(name)) for module in _COMMON_MODULES)
    return name in names_called([tests.setup, *tests.tests]) and not (is_common and side.found)


def _closed(prompt: str) -> str:
    """Returns the prompt as valid source: a function without a body at its end gets ``pass``."""
    try:
        ast.parse(prompt)
        return prompt
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"


def _run(
    source: str, name: str, scope: dict[str, Any], tests: CodeTests, side: TesterSide
) -> BaseException | None:
    """Executes a script. Returns the exception it raised, or None."""
    names = {*names_of_program(tests), *aliases_of_program(tests), *side.found, tests.entry_point, "solution"}
    scope.update({HOLD: side.hold_changes, RELEASE: side.release_changes})
    try:
        code = compile(holding_changes(source, names), name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return _InvalidScriptError(str(error))
    return _failure_of(lambda: exec(code, scope))


class _InvalidScriptError(Exception):
    """A script of the tests is not valid Python."""


def _failure_of(action: Callable[[], None]) -> BaseException | None:
    """Calls ``action``. Returns the exception it raised, or None."""
    try:
        action()
    except (CandidateEndedError, CannotCrossError, MemoryError):
        raise
    except BaseException as error:
        return error
    return None


def _describe(error: BaseException | None) -> str:
    text = re.sub(r"\s+", " ", _text_of(error))
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _text_of(error: BaseException | None) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # an exception of the tests may hold a stand-in, and str() of that may fail
        return ""
