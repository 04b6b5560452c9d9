"""Scripts of tests are read without running them: whether they are valid, can fail, and what they take from the program."""

import pytest

from megatron_rasft.types import CodeTests
from megatron_rasft.verify.programs.scripts import find_fault, handles_errors, names_of_program


def asserts(*scripts: str, setup: str = "") -> CodeTests:
    return CodeTests(style="asserts", tests=scripts, entry_point="f", setup=setup)


CANNOT_FAIL = [
    "f(1) == 2", "print(f(1))", "assert (f(1) == 2, 'one')", "assert True", "assert 'f(1) == 2'", "assert [f(1) == 2]",
    "assert f(1) == 2 or True", "assert (f(x) == x for x in range(3))", "assert lambda: f(1) == 2", "pass",
    "try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('no')", "try:\n    assert f(1) == 2\nexcept:\n    pass",
    "for x in range(3):\n    try:\n        assert f(x) == x\n    except Exception as e:\n        print(e)",
    "from contextlib import suppress\nwith suppress(AssertionError):\n    assert f(1) == 2",
    "def check(candidate):\n    return candidate(1) == 2", "result = f(1)\nif result != 2:\n    print('wrong')",
]  # fmt: skip
CAN_FAIL = [
    "assert f(1) == 2", "assert (f(1) == 2)", "assert f(1) == 2, 'one'", "assert not f(1)", "if f(1) != 2: raise ValueError",
    "import unittest\nclass TestF(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 2)",
    "import pytest\nwith pytest.raises(ValueError): f(1)", "import sys\nif f(1) != 2: sys.exit(1)",
    "import numpy as np\nnp.testing.assert_allclose(f(1), 2)",
    "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
    "try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('no')\n    raise",
    "try:\n    assert f(1) == 2\nfinally:\n    print('done')", "ok = f(1) == 2\nassert ok",
]  # fmt: skip


@pytest.mark.parametrize("script", CANNOT_FAIL)
def test_scripts_that_cannot_fail_are_found(script: str) -> None:
    assert "cannot fail" in find_fault(asserts(script))
    assert find_fault(asserts(script, "assert f(2) == 3")) == ""


@pytest.mark.parametrize("script", CAN_FAIL)
def test_scripts_that_can_fail_are_accepted(script: str) -> None:
    assert find_fault(asserts(script)) == ""


@pytest.mark.parametrize(
    ("tests", "where"),
    [
        (asserts("assert f(1) = 2"), "test 1 of 1"),
        (asserts("assert f(1) == 2", "assert f(1) == = 2"), "test 2 of 2"),
        (asserts("assert f(1) == 2", setup="import ("), "setup"),
        (CodeTests(style="pytest", tests=("def test_f(:\n    assert f(1) == 2",)), "file"),
        (asserts("assert " + "(" * 300 + "f(1)" + ")" * 300), "test 1 of 1"),
    ],
)
def test_scripts_that_are_not_valid_are_named(tests: CodeTests, where: str) -> None:
    fault = find_fault(tests)
    assert where in fault and "not valid Python" in fault


def test_names_that_tests_take_from_the_program() -> None:
    source = "from solution import f as g, Node\nimport math, solution\ny = 1\ndef test_a(tmp): assert g(h(y)) == math.pi + solution.k"
    assert names_of_program(CodeTests(style="pytest", tests=(source,))) == ("Node", "f", "h", "k")
    assert names_of_program(asserts("assert f(1) == sorted([2])[0]")) == ("f",)


def test_handlers_of_exceptions_are_recognised() -> None:
    assert not handles_errors("assert all(map(f, range(3)))")
    for script in (
        "try: f()\nexcept E: pass",
        "with pytest.raises(E): f()",
        "with suppress(E): f()",
        "self.assertRaises(E, f)",
    ):
        assert handles_errors(script)
