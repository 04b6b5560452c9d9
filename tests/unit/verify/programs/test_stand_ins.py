"""Tests use a program through stand-ins: values cross unchanged, and no object of the program decides a comparison."""

import pytest

from megatron_rasft.types import CodeTests, ProgramCase
from megatron_rasft.verify.programs.sandbox import Sandbox
from tests.unit.verify.programs.hostile_programs import HOSTILE_OBJECTS

VALUES = [
    "(1, 'a', None, True)", "[[1, 2], [3.5, -0.0]]", "{'a': {1: [2]}, (1, 2): 3}", "{1, 2}", "frozenset({1})", "b'a\\xff'",
    "bytearray(b'a')", "1 + 2j", "range(3)", "10 ** 5000", "float('inf')", "'\\ud800 ü'", "...", "[(1, 2), (3, 4)]",
    "{(1, 2), (3, 4)}", "__import__('decimal').Decimal('1.10')", "__import__('fractions').Fraction(1, 3)",
    "__import__('datetime').datetime(2024, 1, 2, 3)", "__import__('datetime').timedelta(1, 2)",
    "__import__('collections').Counter('aab')", "__import__('collections').OrderedDict(a=1)",
    "__import__('collections').deque([1, 2], 3)", "__import__('collections').defaultdict(list, a=[1])",
    "{'b': 1}.keys()", "int", "len", "ValueError",
]  # fmt: skip


def test_values_cross_unchanged(strongest_sandbox: Sandbox) -> None:
    tests = [
        f"v = {v}; r = f(v); assert type(r) is type(v) and r == v and repr(r) == repr(v)" for v in VALUES
    ]
    tests.append(
        "import numpy as np; a = np.arange(6.).reshape(2, 3); r = f(a); assert r.dtype == a.dtype and (r == a).all()"
    )
    tests.append("r = f(np.float32(1.5)); assert type(r) is np.float32 and r == 1.5")
    tests.append("import math; assert math.isnan(f(float('nan')))")
    found = strongest_sandbox.judge(
        "def f(x): return x", CodeTests(style="asserts", tests=tuple(tests), entry_point="f")
    )
    assert found == ("correct", f"{len(tests)} tests passed")


PROGRAM = """
from collections import namedtuple
from enum import Enum

class TooSmall(ValueError):
    def __init__(self, size):
        super().__init__(f"{size} is too small")
        self.size = size

class Worse(TooSmall): pass

class Color(Enum):
    RED = 1

class Vector:
    count = 0
    def __init__(self, x, y=0):
        self.x, self.y = x, y
        Vector.count += 1
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
    def __mul__(self, n): return Vector(self.x * n, self.y * n)
    def __getitem__(self, i): return (self.x, self.y)[i]
    def __iter__(self): return iter((self.x, self.y))
    def __len__(self): return 2
    def __contains__(self, n): return n in (self.x, self.y)
    def __repr__(self): return f"Vector({self.x}, {self.y})"
    def __enter__(self): return self
    def __exit__(self, *a): self.x = 0
    @property
    def norm(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    @classmethod
    def unit(cls): return cls(1, 0)

Point = namedtuple("Point", "x y")

def sort(items, reverse=False):
    items.sort(reverse=reverse)
def nest(d): d["a"].append(len(d))
def need(n):
    if n < 3: raise Worse(n)
def make(n): return lambda x: x + n
def apply(g, *args, **kw): return g(*args, **kw)
def count(n):
    for i in range(n): yield i
def total(items): return sum(items)
def walk(node): return [] if node is None else [*walk(node.left), node.value, *walk(node.right)]
def ask(): return input("n? ")
def say(x): print("say", x)
def red(): return Color.RED
def point(): return Point(1, 2)
"""

USES = """
from solution import *
import solution
import pytest
class Node:
    def __init__(self, value, left=None, right=None):
        self.value, self.left, self.right = value, left, right
def test_mutation():
    items = [3, 1, 2]
    assert sort(items) is None and items == [1, 2, 3]
    sort(items=items, reverse=True); assert items == [3, 2, 1]
    d = {"a": [1]}; inner = d["a"]; nest(d); assert inner == [1, 1]
def test_errors():
    with pytest.raises(TooSmall, match="2 is too small") as caught: need(2)
    assert caught.value.size == 2
    with pytest.raises(ValueError): need(1)
    with pytest.raises(TypeError): need()
    with pytest.raises(AttributeError): Vector(1).z
    need(3)
def test_objects():
    v = Vector(1, y=2)
    assert (v.x, v.y, v[1], len(v), list(v)) == (1, 2, 2, 2, [1, 2])
    assert v == Vector(1, 2) and v != Vector(2, 1) and 2 in v and 5 not in v
    assert v + v == Vector(2, 4) and repr(v) == "Vector(1, 2)"
    with pytest.raises(TypeError): v * 3
    v.x = 3; v.y = 4
    assert v.norm == 5 and isinstance(v, Vector) and not isinstance(1, Vector) and isinstance(Vector.unit(), Vector)
    with v as w: assert w is v
    assert v.x == 0 and Vector.count >= 4 and solution.Vector is Vector
def test_functions():
    assert make(2)(3) == 5 and apply(max, 1, 4) == 4 and apply(lambda a, k: a * k, 2, k=3) == 6
    assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and total(x * x for x in range(4)) == 14
    assert sorted([3, 1], key=make(1)) == [1, 3] and list(map(make(1), [1])) == [2]
    with pytest.raises(ZeroDivisionError): apply(lambda: 1 / 0)
def test_own_objects():
    assert walk(Node(2, Node(1), Node(3))) == [1, 2, 3]
def test_streams(capsys, monkeypatch):
    say(1); assert capsys.readouterr().out == "say 1\\n"
    monkeypatch.setattr("builtins.input", lambda prompt: prompt + "7"); assert ask() == "n? 7"
def test_others():
    assert red() == Color.RED and red() is Color.RED and red().value == 1
    p = point(); assert p == (1, 2) and p.x == 1 and isinstance(p, tuple)
"""


def test_tests_use_a_program_as_if_they_had_imported_it(strongest_sandbox: Sandbox) -> None:
    found = strongest_sandbox.judge(PROGRAM, CodeTests(style="pytest", tests=(USES,)))
    assert found == ("correct", "7 tests passed")


# Expressions that are true for the correct program. Each shows the expected value to the object that f returns
FORMS = [
    "f(2) == 4", "4 == f(2)", "not f(2) != 4", "f(2) in (4, 5)", "f(2) in {4: 0}", "[4].index(f(2)) == 0",
    "abs(f(2) - 4) < 1e-6", "abs(4 - f(2)) < 1e-6", "-1e-6 < f(2) - 4 < 1e-6", "4 <= f(2) <= 4", "not f(2) - 4",
    "not f(2) ^ 4", "f(2) - 4 == 0", "(f(2) - 4) ** 2 < 1e-6", "round(f(2) - 4, 7) == 0", "int(f(2) - 4) == 0",
    "float(f(2) - 4) == 0", "bool(f(2) - 4) is False", "str(f(2) - 4) == '0'", "f'{f(2) - 4}' == '0'",
    "divmod(f(2), 4) == (1, 0)", "pow(f(2) - 4, 2) == 0", "abs(f(2) / 4 - 1) < 1e-6", "max(f(2), 4) == min(f(2), 4)",
    "sum([f(2), -4]) == 0", "sorted([f(2), 3]) == [3, 4]", "len({f(2), 4}) == 1", "range(5)[f(2)] == 4",
    "math.isclose(f(2), 4)", "math.fabs(f(2) - 4) < 1e-6", "f(2) == pytest.approx(4)", "[f(2)] == pytest.approx([4])",
    "np.allclose(f(2), 4)", "np.allclose(b=4, a=f(2))", "np.allclose(f(2), [4, 4])", "np.isclose(f(2), 4).all()",
    "np.abs(f(2) - np.array([4])).max() < 1e-6", "np.array_equal(f(2), 4)",
    "np.testing.assert_allclose(f(2), 4) is None", "np.testing.assert_array_equal(f(2), 4) is None",
    "np.testing.assert_almost_equal(f(2), 4) is None", "unit.assertEqual(f(2), 4) is None",
    "unit.assertAlmostEqual(f(2), 4) is None", "unit.assertIn(f(2), [4]) is None",
]  # fmt: skip
NEAR = "abs(f(2) - 4) < 1e-6"
HOLDING = f"""
import math, pytest, unittest, numpy as np
unit, held = unittest.TestCase(), []
for form in {[*FORMS, "4 in f(2)", "not 4 not in f(2)"]}:
    try: held += [form] * bool(eval(form))
    except Exception: pass
assert held == EXPECTED, held
"""


def holding(forms: list[str]) -> CodeTests:
    tests = (HOLDING.replace("EXPECTED", repr(forms)),)
    return CodeTests(style="asserts", tests=tests, entry_point="f")


@pytest.mark.parametrize("program", HOSTILE_OBJECTS.values(), ids=HOSTILE_OBJECTS)
def test_no_object_decides_a_comparison(strongest_sandbox: Sandbox, program: str) -> None:
    assert strongest_sandbox.judge(program, holding([])) == ("correct", "1 tests passed")


@pytest.mark.parametrize(
    "tests",
    [
        CodeTests(style="check", tests=(f"def check(f):\n    assert {NEAR}",), entry_point="f"),
        CodeTests(style="pytest", tests=(f"from solution import f\ndef test_f():\n    assert {NEAR}",)),
        CodeTests(style="functional", cases=(ProgramCase(input="2", output="4"),), entry_point="f"),
    ],
    ids=lambda tests: tests.style,
)
def test_no_object_decides_a_comparison_in_any_style(strongest_sandbox: Sandbox, tests: CodeTests) -> None:
    for name in ("the entry point is a class", "the entry point says yes"):
        assert strongest_sandbox.judge(HOSTILE_OBJECTS[name], tests)[0] == "wrong"
    assert strongest_sandbox.judge("def f(x): return x * x", tests)[0] == "correct"


def test_plain_values_are_compared(strongest_sandbox: Sandbox) -> None:
    assert strongest_sandbox.judge("def f(x): return x * x", holding(FORMS)) == ("correct", "1 tests passed")
