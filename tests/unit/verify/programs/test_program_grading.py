"""Grading of programs in all styles: comparison of outputs, verdicts and reasons."""

import pytest

from megatron_rasft.types import CodeTests, ProgramCase
from megatron_rasft.verify.programs.program_grading import (
    find_sandbox_level,
    grade_program,
    outputs_equal,
    run_tests,
)
from megatron_rasft.verify.programs.sandbox import Sandbox
from tests.unit.verify.programs.conftest import PATIENT


@pytest.mark.parametrize(
    ("output", "expected", "is_equal"),
    [
        ("4\n", "4", True),
        ("4 \n\n", "4\n", True),
        ("1  2", "1 2", True),
        ("0.50", "0.5", True),
        ("1e2", "100", True),
        ("4\n5", "4", False),
        ("yes", "YES", False),
        ("", "0", False),
        ("0.3333", "0.33333", False),
        ("nan", "nan", True),
    ],
)
def test_outputs_are_compared_by_words(output: str, expected: str, is_equal: bool) -> None:
    assert outputs_equal(output, expected) == is_equal


@pytest.mark.parametrize(
    ("program", "verdict", "reason"),
    [
        ("def g(x): pass", "wrong", "test 1 of 1: NameError: name 'f' is not defined"),
        ("def f(x: return", "wrong", "the program raised SyntaxError"),
        (
            "import no_such_module",
            "wrong",
            "the program raised ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def f(x): return 1 / 0", "wrong", "test 1 of 1: ZeroDivisionError: division by zero"),
        ("async def f(x): return 4", "unverifiable", "coroutines"),
    ],
)
def test_reasons(strongest_sandbox: Sandbox, program: str, verdict: str, reason: str) -> None:
    found = strongest_sandbox.judge(
        program, CodeTests(style="asserts", tests=("assert f(2) == 4",), entry_point="f")
    )
    assert found[0] == verdict
    assert reason in found[1]


def test_tests_that_do_not_use_the_program_are_unverifiable(strongest_sandbox: Sandbox) -> None:
    own = "from solution import *\ndef f(x): return 4\ndef test_f(): assert f(2) == 4"
    found = strongest_sandbox.judge(
        "def f(x): return 0", CodeTests(style="pytest", tests=(own,), entry_point="f")
    )
    assert found == ("unverifiable", "the tests pass without using the program")
    assert (
        strongest_sandbox.judge("f = 4", CodeTests(style="asserts", tests=("assert True",)))[0]
        == "unverifiable"
    )


def test_livecodebench_cases(strongest_sandbox: Sandbox) -> None:
    stdin = CodeTests(
        style="stdin", cases=(ProgramCase(input="1 2\n", output="3"), ProgramCase(input="5 5\n", output="10"))
    )
    assert run_tests(strongest_sandbox, "print(sum(map(int, input().split())))", stdin) == (
        "correct",
        "2 cases passed",
    )
    assert run_tests(strongest_sandbox, "print(3)", stdin) == ("wrong", "case 2 of 2: wrong output")
    assert run_tests(strongest_sandbox, "print(1 / 0)", stdin) == ("wrong", "case 1 of 2: failed")
    main = "import sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\nif __name__ == '__main__':\n    main()"
    assert run_tests(strongest_sandbox, main, stdin)[0] == "correct"
    functional = CodeTests(
        style="functional",
        entry_point="pairs",
        cases=(ProgramCase(input='[1, 2]\n"a"', output='[[1, "a"], [2, "a"]]'),),
    )
    solution = "class Solution:\n    def pairs(self, xs, s):\n        return [[x, s] for x in xs]"
    assert run_tests(strongest_sandbox, solution, functional) == ("correct", "1 cases passed")
    assert run_tests(strongest_sandbox, solution.replace("[x, s]", "[s, x]"), functional)[0] == "wrong"


def test_order_of_sets_is_the_same_in_every_run() -> None:
    tests = CodeTests(style="asserts", tests=("assert f() == 0, f()",), entry_point="f")
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e'})"
    reasons = set()
    for _ in range(2):
        with Sandbox(PATIENT) as fresh:
            reasons.add(fresh.judge(program, tests))
    assert len(reasons) == 1


def test_grading_takes_the_program_from_a_response() -> None:
    tests = CodeTests(style="asserts", tests=("assert f(2) == 4",), entry_point="f")
    assert grade_program("So:\n```python\ndef f(x): return x * x\n```\n", tests, PATIENT)[0] == "correct"
    assert grade_program("I do not know.", tests, PATIENT)[0] == "wrong"
    assert grade_program("", tests, PATIENT) == ("wrong", "no program")
    no_tests = CodeTests(style="asserts")
    assert grade_program("def f(x): return 4", no_tests, PATIENT) == ("unverifiable", "no tests")


def test_level_that_a_run_reports_is_the_one_that_a_sandbox_reaches(strongest_sandbox: Sandbox) -> None:
    assert find_sandbox_level(PATIENT) == strongest_sandbox.level
