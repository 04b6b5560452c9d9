"""Verdicts of tests that cannot run, cannot fail, or swallow exceptions; and of tests that look similar and are sound."""

from typing import Any

import pytest

from megatron_rasft.types import CodeTests, ProgramCase, Verdict
from megatron_rasft.verify.programs.sandbox import Sandbox

ADDS = "def f(x): return x + 1"


def asserts(*scripts: str, entry_point: str = "f", setup: str = "") -> CodeTests:
    return CodeTests(style="asserts", tests=scripts, entry_point=entry_point, setup=setup)


def in_pytest(script: str, entry_point: str = "f") -> CodeTests:
    return CodeTests(style="pytest", tests=(script,), entry_point=entry_point)


def in_check(script: str) -> CodeTests:
    return CodeTests(style="check", tests=(script,), entry_point="f")


def functional(given: str, output: str) -> CodeTests:
    return CodeTests(style="functional", entry_point="f", cases=(ProgramCase(input=given, output=output),))


RUNNABLE: dict[str, tuple[str, CodeTests, Verdict]] = {
    "ok": (ADDS, asserts("assert f(1) == 2"), "correct"),
    "name unbound": (ADDS, asserts("assert math.floor(f(1)) == 2"), "unverifiable"),
    "name unbound noentry": (ADDS, asserts("assert math.floor(f(1)) == 2", entry_point=""), "unverifiable"),
    "name unbound fn noentry": (ADDS, asserts("assert sqrt(f(3)) == 2", entry_point=""), "unverifiable"),
    "missing f noentry": ("def g(x): return 2", asserts("assert f(1) == 2", entry_point=""), "wrong"),
    "missing f": ("def g(x): return 2", asserts("assert f(1) == 2"), "wrong"),
    "other name": (ADDS, asserts("assert g(1) == 2"), "unverifiable"),
    "raises nameerror": ("def f(x): return y", asserts("assert f(1) == 2"), "wrong"),
    "raises importerror": ("def f(x):\n import nopackage\n return x+1", asserts("assert f(1) == 2"), "wrong"),
    "import missing": (ADDS, asserts("import nopackage\nassert f(1) == 2"), "unverifiable"),
    "import missing in function": (
        ADDS,
        in_pytest("def test_f():\n    import nopackage\n    assert f(1) == 2"),
        "unverifiable",
    ),
    "from math missing": (ADDS, asserts("from math import nothing\nassert f(1) == 2"), "unverifiable"),
    "pytest no import": (ADDS, in_pytest("def test_f():\n    assert f(1) == 2"), "correct"),
    "pytest no import wrong": (
        "def f(x): return 5",
        in_pytest("def test_f():\n    assert f(1) == 2"),
        "wrong",
    ),
    "pytest no import missing": (
        "def g(x): return 5",
        in_pytest("def test_f():\n    assert f(1) == 2"),
        "wrong",
    ),
    "pytest import missing name": (
        "def g(x): return 5",
        in_pytest("from solution import f\ndef test_f():\n    assert f(1) == 2", ""),
        "wrong",
    ),
    "pytest import module": (
        "def g(x): return 5",
        in_pytest("import solution\ndef test_f():\n    assert solution.f(1) == 2", ""),
        "wrong",
    ),
    "pytest import module ok": (
        ADDS,
        in_pytest("import solution\ndef test_f():\n    assert solution.f(1) == 2", ""),
        "correct",
    ),
    "pytest fixture missing": (
        ADDS,
        in_pytest("from solution import f\ndef test_f(nofixture):\n    assert f(1) == 2"),
        "unverifiable",
    ),
    "pytest collection error": (
        ADDS,
        in_pytest(
            "from solution import f\nimport pytest\n@pytest.mark.parametrize('x', 5)\ndef test_f(x):\n    assert f(1) == 2"
        ),
        "unverifiable",
    ),
    "pytest fixture raises": (
        ADDS,
        in_pytest(
            "from solution import f\nimport pytest\n@pytest.fixture\ndef z(): return open('/nonexistent/file')\ndef test_f(z):\n    assert f(1) == 2"
        ),
        "unverifiable",
    ),
    "pytest skip": (
        ADDS,
        in_pytest(
            "from solution import f\nimport pytest\n@pytest.mark.skip\ndef test_f():\n    assert f(1) == 2"
        ),
        "unverifiable",
    ),
    "pytest main import": (
        ADDS,
        in_pytest("from main import f\ndef test_f():\n    assert f(1) == 2", ""),
        "unverifiable",
    ),
    "syntax": (ADDS, asserts("assert f(1) = 2"), "unverifiable"),
    "syntax second": (ADDS, asserts("assert f(1) == 2", "assert f(2) == = 3"), "unverifiable"),
    "syntax pytest": (ADDS, in_pytest("def test_f(:\n  assert f(1) == 2"), "unverifiable"),
    "indent": (ADDS, asserts("  assert f(1) == 2"), "unverifiable"),
    "setup raises": (ADDS, asserts("assert f(1) == 2", setup="1/0"), "unverifiable"),
    "setup uses class": (
        "class P: pass\ndef f(x): return x + 1",
        asserts("assert f(1) == 2", setup="p = P()"),
        "correct",
    ),
    "setup import": (ADDS, asserts("assert f(1) == 2", setup="import nopackage"), "unverifiable"),
    "setup file": (
        ADDS,
        asserts("assert f(1) == 2", setup="data = open('input.txt').read()"),
        "unverifiable",
    ),
    "no assert": (ADDS, asserts("f(1) == 2"), "unverifiable"),
    "tuple": (ADDS, asserts("assert (f(1) == 2, 'one')"), "unverifiable"),
    "print": (ADDS, asserts("print(f(1))"), "unverifiable"),
    "caught": (
        ADDS,
        asserts("try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('no')"),
        "unverifiable",
    ),
    "check no assert": (
        ADDS,
        in_check("def check(candidate):\n    return candidate(1) == 2"),
        "unverifiable",
    ),
    "check unbound": (
        ADDS,
        in_check("def check(candidate):\n    assert candidate(1) == expected"),
        "unverifiable",
    ),
    "check ok": (ADDS, in_check("def check(candidate):\n    assert candidate(1) == 2"), "correct"),
    "check missing": (
        ADDS,
        in_check("def checker(candidate):\n    assert candidate(1) == 2"),
        "unverifiable",
    ),
    "check entry name": (ADDS, in_check("def check(candidate):\n    assert f(1) == 2"), "correct"),
    "test wrong": (ADDS, asserts("assert f(1) == 3"), "wrong"),
    "test before": (ADDS, asserts("assert 1 == 2\nassert f(1) == 2"), "unverifiable"),
    "const": ("ANSWER = 42", asserts("assert ANSWER == 42", entry_point=""), "correct"),
    "return outside a function": (ADDS, asserts("assert f(1) == 2\nreturn"), "unverifiable"),
    "library name of the program": (
        "from typing import List\ndef f(x): return x + 1",
        in_pytest("from solution import *\ndef f(x) -> List: return 2\ndef test_f():\n    assert f(1) == 2"),
        "unverifiable",
    ),
    "const wrong": ("ANSWER = 41", asserts("assert ANSWER == 42", entry_point=""), "wrong"),
    "shared": ("from math import gcd as f", asserts("assert f(4, 6) == 2"), "correct"),
    "async tests": (
        ADDS,
        in_pytest(
            "from solution import f\nimport asyncio\ndef test_f():\n    async def g(): return f(1)\n    assert asyncio.run(g()) == 2"
        ),
        "correct",
    ),
    "unittest": (
        ADDS,
        in_pytest(
            "import unittest\nfrom solution import f\nclass TestF(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)"
        ),
        "correct",
    ),
    "unittest setUp fails": (
        ADDS,
        in_pytest(
            "import unittest\nfrom solution import f\nclass TestF(unittest.TestCase):\n    def setUp(self): self.d = open('/nope/x')\n    def test_a(self): self.assertEqual(f(1), 2)"
        ),
        "unverifiable",
    ),
    "unittest setUp prog raises": (
        "def f(x): raise ValueError",
        in_pytest(
            "import unittest\nfrom solution import f\nclass TestF(unittest.TestCase):\n    def setUp(self): self.d = f(1)\n    def test_a(self): self.assertEqual(f(1), 2)"
        ),
        "wrong",
    ),
    "unittest no import": (
        ADDS,
        in_pytest(
            "import unittest\nclass TestF(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)"
        ),
        "correct",
    ),
    "unittest assertRaises": (
        "def f(x): raise ValueError",
        in_pytest(
            "import unittest\nfrom solution import f\nclass TestF(unittest.TestCase):\n    def test_a(self):\n        with self.assertRaises(ValueError): f(1)"
        ),
        "correct",
    ),
    "class Solution pytest": (
        "class Solution:\n    def f(self, x): return x+1",
        in_pytest("from solution import Solution\ndef test_f():\n    assert Solution().f(1) == 2", ""),
        "correct",
    ),
    "relative import": (
        ADDS,
        in_pytest("from .solution import f\ndef test_f():\n    assert f(1) == 2", ""),
        "unverifiable",
    ),
    "hypothesis missing": (
        ADDS,
        in_pytest(
            "from hypothesis_nope import given\nfrom solution import f\ndef test_f():\n    assert f(1) == 2",
            "",
        ),
        "unverifiable",
    ),
    "from main import *": (ADDS, asserts("from your_module import *\nassert f(1) == 2"), "unverifiable"),
    "undefined fixture data": (ADDS, asserts("assert f(data) == 2"), "unverifiable"),
    "undefined data noentry": (ADDS, asserts("assert f(data) == 2", entry_point=""), "unverifiable"),
    "np noentry": (ADDS, asserts("assert np.isclose(f(1), 2)", entry_point=""), "unverifiable"),
    "TreeNode noentry": (
        "def f(x): return 1",
        asserts("assert f(TreeNode(1)) == 1", entry_point=""),
        "wrong",
    ),
    "TreeNode entry": ("def f(x): return 1", asserts("assert f(TreeNode(1)) == 1"), "unverifiable"),
    "setup nameerror": (ADDS, asserts("assert f(1) == 2", setup="x = undefined_thing"), "unverifiable"),
    "setup exit": (ADDS, asserts("assert f(1) == 2", setup="import sys; sys.exit(0)"), "unverifiable"),
    "test attribute error on module": (
        ADDS,
        asserts("import math\nassert math.nope(f(1)) == 2"),
        "unverifiable",
    ),
    "importlib import": (
        ADDS,
        asserts("import importlib\nm = importlib.import_module('nope_pkg')\nassert m.x(f(1))"),
        "unverifiable",
    ),
    "candidate name": (ADDS, asserts("assert candidate(1) == 2"), "unverifiable"),
    "main guard": (ADDS, asserts("if __name__ == '__main__':\n    assert f(1) == 2"), "unverifiable"),
    "fn never called": (ADDS, asserts("def t():\n    assert f(1) == 2"), "unverifiable"),
    "assert print": (ADDS, asserts("assert print(f(1)) is None"), "correct"),
    "empty test": (ADDS, asserts("# nothing"), "unverifiable"),
    "py2 tests": (ADDS, asserts("print f(1)\nassert f(1) == 2"), "unverifiable"),
    "pytest class": (
        ADDS,
        in_pytest(
            "from solution import f\nclass TestF:\n    def test_a(self): assert f(1) == 2\n    def test_b(self): assert f(2) == 3"
        ),
        "correct",
    ),
    "pytest async fn": (
        ADDS,
        in_pytest("from solution import f\nasync def test_a(): assert f(1) == 2"),
        "unverifiable",
    ),
    "pytest bad mark arg": (
        ADDS,
        in_pytest(
            "from solution import f\nimport pytest\n@pytest.mark.parametrize('x,y', [(1,)])\ndef test_f(x, y):\n    assert f(x) == y"
        ),
        "unverifiable",
    ),
    "pytest raises wrong type": (
        "def f(x): raise KeyError",
        in_pytest(
            "from solution import f\nimport pytest\ndef test_f():\n    with pytest.raises(ValueError): f(1)"
        ),
        "wrong",
    ),
    "pytest plugin fixture": (
        ADDS,
        in_pytest("from solution import f\ndef test_f(mocker):\n    assert f(1) == 2"),
        "unverifiable",
    ),
    "program infinite recursion": ("def f(x): return f(x)", asserts("assert f(1) == 2"), "wrong"),
    "in-place mutate nested": (
        "def f(m):\n    for r in m: r.reverse()\n    return m",
        asserts("m = [[1, 2], [3, 4]]\nassert f(m) == [r[::-1] for r in [[1, 2], [3, 4]]]"),
        "correct",
    ),
    "returns same mutated": (
        "def f(a):\n    a.append(1)\n    return a",
        asserts("a = []\nr = f(a)\nassert r == [1]\nassert a == [1]"),
        "correct",
    ),
    "identity": (
        "def f(a):\n    a.append(1)\n    return a",
        asserts("a = [0]\nr = f(a)\nassert len(r) == 2 and len(a) == 2"),
        "correct",
    ),
    "stack class": (
        "class Stack:\n    def __init__(s): s.d = []\n    def push(s, x): s.d.append(x); return s\n    def pop(s): return s.d.pop()",
        asserts("s = Stack()\ns.push(3)\nassert s.pop() == 3", entry_point="Stack"),
        "correct",
    ),
    "loop ref": (
        "def f(a):\n    a.clear(); return []",
        in_pytest(
            "from solution import f\nimport random\ndef test_f():\n    for _ in range(5):\n        a = [random.random() for _ in range(5)]\n        result = f(a)\n        assert result == sorted(a)"
        ),
        "wrong",
    ),
    "loop ref expected": (
        "def f(a):\n    a.clear(); return []",
        in_pytest(
            "from solution import f\nimport random\ndef test_f():\n    for _ in range(5):\n        a = [random.random() for _ in range(5)]\n        actual = f(a)\n        expected = sorted(a)\n        assert actual == expected, (a, actual)"
        ),
        "wrong",
    ),
    "ref self.assertEqual": (
        "def f(a):\n    a.clear(); return []",
        in_pytest(
            "import unittest\nfrom solution import f\nclass T(unittest.TestCase):\n    def test_a(self):\n        a = [3, 1]\n        self.assertEqual(f(a), sorted(a))"
        ),
        "wrong",
    ),
    "ref kw": (
        "def f(a):\n    a.clear(); return []",
        asserts("a = [3, 1]\nassert f(a=a) == sorted(a)"),
        "wrong",
    ),
    "ref method": (
        "class Solution:\n    def f(self, a):\n        a.clear(); return []",
        asserts("a = [3, 1]\nassert Solution().f(a) == sorted(a)", entry_point="Solution"),
        "wrong",
    ),
    "ref dict": (
        "def f(d):\n    d.clear(); return {}",
        asserts("d = {'a': 1}\nassert f(d) == {v: k for k, v in d.items()}"),
        "wrong",
    ),
    "ref sum 0": (
        "def f(a):\n    a.clear(); return 0",
        asserts("a = [3, 1]\nassert f(a) == sum(a)"),
        "wrong",
    ),
    "ref numpy": (
        "def f(a):\n    a[:] = 0; return a",
        asserts("import numpy as np\na = np.array([3., 1.])\nassert np.allclose(f(a), a * 2)"),
        "wrong",
    ),
    "ref lambda list": (
        "def f(a):\n    a.clear(); return []",
        asserts(
            "cases = [[3, 1], [2, 1]]\nresults = [f(c) == sorted(c) for c in cases]\nassert all(results)"
        ),
        "wrong",
    ),
    "while": (
        "def f(a): return a[1:]",
        asserts("a = [1, 2]\nwhile a:\n    a = f(a)\nassert a == []"),
        "correct",
    ),
    "tests with global kw": (
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        asserts("assert f() == 1", "assert f() == 2"),
        "correct",
    ),
    "try import": (
        ADDS,
        asserts("try:\n    import nopackage\nexcept ImportError:\n    nopackage = None\nassert f(1) == 2"),
        "correct",
    ),
    "importorskip": (
        ADDS,
        in_pytest(
            "import pytest\npytest.importorskip('nopackage')\nfrom solution import f\ndef test_f(): assert f(1) == 2"
        ),
        "unverifiable",
    ),
    "skipif": (
        ADDS,
        in_pytest(
            "import pytest, sys\nfrom solution import f\n@pytest.mark.skipif(sys.version_info < (3, 8), reason='x')\ndef test_f(): assert f(1) == 2"
        ),
        "correct",
    ),
    "prints with capsys": (
        "def f(): print('hi')",
        in_pytest(
            "from solution import f\ndef test_f(capsys):\n    f()\n    assert capsys.readouterr().out == 'hi\\n'"
        ),
        "correct",
    ),
    "io redirect": (
        "def f(): print('hi')",
        asserts(
            "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b): f()\nassert b.getvalue() == 'hi\\n'"
        ),
        "correct",
    ),
    "tmp_path": (
        "def f(p): return open(p).read()",
        in_pytest(
            "from solution import f\ndef test_f(tmp_path):\n    p = tmp_path / 'a'\n    p.write_text('x')\n    assert f(str(p)) == 'x'"
        ),
        "correct",
    ),
    "raises with handler swallow": (
        "def f(x): raise TypeError",
        asserts(
            "ok = []\nfor x in (1, 2):\n    try:\n        ok.append(f(x) == x + 1)\n    except ValueError:\n        ok.append(False)\nassert all(ok)"
        ),
        "wrong",
    ),
}
"""Whether tests can run at all, and whose fault it is. Test -> program, tests, verdict."""

SWALLOWING: dict[str, tuple[str, CodeTests, Verdict]] = {
    "stop all map": (
        "def f(x): raise StopIteration",
        asserts("assert all(map(lambda x: f(x) == x + 1, range(5)))"),
        "wrong",
    ),
    "stop for map": (
        "def f(x): raise StopIteration",
        asserts("for y, x in zip(map(f, range(5)), range(5)): assert y == x + 1"),
        "wrong",
    ),
    "stop pytest": (
        "def f(x): raise StopIteration",
        in_pytest(
            "from solution import f\ndef test_f():\n    assert all(map(lambda x: f(x) == x + 1, range(5)))"
        ),
        "wrong",
    ),
    "stop pytest raises": (
        "def f(x): raise StopIteration",
        in_pytest(
            "from solution import f\nimport pytest\ndef test_f():\n    assert all(map(lambda x: f(x) == x + 1, range(5)))\n    with pytest.raises(ZeroDivisionError): 1/0"
        ),
        "wrong",
    ),
    "stop subclass": (
        "class E(StopIteration): pass\ndef f(x): raise E",
        asserts("assert all(map(lambda x: f(x) == x + 1, range(5)))"),
        "wrong",
    ),
    "index legacy": (
        "def f(x): raise IndexError",
        asserts("class S:\n    def __getitem__(self, i): return f(i) == i + 1\nassert all(S())"),
        "wrong",
    ),
    "attr": (
        "def f(x): raise AttributeError",
        asserts("class S:\n    @property\n    def y(self): return f(1)\nassert getattr(S(), 'y', 2) == 2"),
        "wrong",
    ),
    "thread": (
        "def f(x): raise SystemExit",
        asserts(
            "import threading\nr = []\nt = threading.Thread(target=lambda: r.append(f(1)))\nt.start(); t.join()\nassert all(v == 2 for v in r)"
        ),
        "wrong",
    ),
    "suppress legit": (
        "def f(x): raise ValueError",
        asserts(
            "from contextlib import suppress\nok = False\nwith suppress(ValueError):\n    f(1)\n    ok = True\nassert not ok"
        ),
        "correct",
    ),
    "stop legit": (
        "def f(it): return next(it)",
        asserts("import pytest\nwith pytest.raises(StopIteration): f(iter([]))"),
        "correct",
    ),
    "iter legit": (
        "class f:\n    def __init__(s, n): s.n = n\n    def __iter__(s): return s\n    def __next__(s):\n        s.n -= 1\n        if s.n < 0: raise StopIteration\n        return s.n",
        asserts("assert list(f(3)) == [2, 1, 0]", "assert next(f(1)) == 0"),
        "correct",
    ),
    "cm swallows": (
        "class f:\n    def __enter__(s): return s\n    def __exit__(s, *a): return True",
        asserts("with f() as x:\n    assert x == 5"),
        "wrong",
    ),
    "empty approx": (
        "import sys\nn = __import__('num'+'py')\ndef f(x): return n.array([])",
        asserts("import pytest\nassert f(1) == pytest.approx(2)"),
        "wrong",
    ),
    "empty norm": (
        "import numpy as np\ndef f(x): return np.array([])",
        asserts("import numpy as np\nassert np.linalg.norm(f(1) - 2) < 1e-6"),
        "wrong",
    ),
    "empty all": (
        "import numpy as np\ndef f(x): return np.array([])",
        asserts("import numpy as np\nassert (f(1) == np.array([2])).all()"),
        "wrong",
    ),
    "empty legit": (
        "import numpy as np\ndef f(x): return np.array([])",
        asserts(
            "import numpy as np\nassert f(1).size == 0 and np.array_equal(f(1), np.array([])) and (f(1) == np.array([])).all() and np.allclose(f(1), [])"
        ),
        "correct",
    ),
    "gen stop": (
        "def f(xs):\n    for x in xs: yield x",
        asserts("assert [x for x in f([1,2])] == [1,2]", "assert list(f([])) == []"),
        "correct",
    ),
    "gen raise stop": (
        "class f:\n    def __init__(s, *a): pass\n    def __iter__(s): return s\n    def __next__(s): raise StopIteration",
        asserts("assert all(a == b for a, b in zip(f([1]), [1])) and list(f([1])) == [1]"),
        "wrong",
    ),
    "sum map stop": ("def f(x): raise StopIteration", asserts("assert sum(map(f, [1])) == 0"), "wrong"),
    "filter stop": (
        "def f(x): raise StopIteration",
        asserts("assert list(filter(f, [1, 2])) == []"),
        "wrong",
    ),
    "takewhile": (
        "def f(x): raise StopIteration",
        asserts("import itertools\nassert not list(itertools.filterfalse(f, [1,2]))"),
        "wrong",
    ),
    "dict comp": (
        "def f(x): raise StopIteration",
        asserts("assert dict(map(lambda x: (x, f(x)), [1])) == {}"),
        "wrong",
    ),
    "any not": (
        "def f(x): raise StopIteration",
        asserts("assert not any(map(lambda x: f(x) != x + 1, range(4)))"),
        "wrong",
    ),
    "stopasync": (
        "def f(x): raise StopAsyncIteration",
        asserts(
            "import asyncio\nclass G:\n    def __aiter__(self): return self\n    async def __anext__(self): return f(1)\nasync def m():\n    return [x async for x in G()]\nassert asyncio.run(m()) == []"
        ),
        "wrong",
    ),
    "keyerror missing": (
        "def f(x): raise KeyError",
        asserts(
            "class D(dict):\n    def __missing__(self, k): return f(k)\nassert D().get(1, 2) == 2 and f(1) == 2"
        ),
        "wrong",
    ),
    "future ignored": (
        "def f(x): raise ValueError",
        asserts(
            "from concurrent.futures import ThreadPoolExecutor\nr = []\nwith ThreadPoolExecutor(1) as e:\n    e.submit(lambda: r.append(f(1)))\nassert all(v == 2 for v in r)"
        ),
        "wrong",
    ),
    "generatorexit": (
        "def f(x): raise GeneratorExit",
        asserts(
            "def g():\n    yield 1\n    assert f(1) == 2\nx = g(); next(x)\nassert True if list(x) == [] else False"
        ),
        "wrong",
    ),
    "exit suppress": (
        "class f:\n    def __init__(s, *a): pass\n    def __enter__(s): return lambda x: 0\n    def __exit__(s, *a): return True",
        asserts("with f() as g:\n    assert g(1) == 2"),
        "wrong",
    ),
    "cm suppress value error legit": (
        "from contextlib import contextmanager\n@contextmanager\ndef f(*errors):\n    try: yield\n    except errors: pass",
        asserts("with f(ValueError):\n    int('x')\nassert True, f"),
        "unverifiable",
    ),
}
"""Exceptions and empty arrays that Python code between program and assert takes for success."""

FUNCTIONAL: dict[str, tuple[str, CodeTests, Verdict]] = {
    "star fn": (
        "class Solution:\n    def f(self, x: List[int]) -> Optional[int]:\n        return sum(Counter(x).values()) + gcd(2, 4) + (inf > 3)",
        functional("[1,2]", "5"),
        "correct",
    ),
    "nested tuples": (
        "def f(x): return [(1, (2, 3)), {'a': (1,)}]",
        functional("1", '[[1,[2,3]],{"a":[1]}]'),
        "correct",
    ),
    "set no": ("def f(x): return {1}", functional("1", "[1]"), "wrong"),
    "deep": (
        "class Solution:\n    def f(self, n):\n        return 0 if n == 0 else 1 + self.f(n - 1)",
        functional("20000", "20000"),
        "correct",
    ),
    "bad json": (ADDS, functional("x", "[1]"), "unverifiable"),
    "func tuple key": ("def f(x): return {1: (2,)}", functional("1", '{"1": [2]}'), "wrong"),
    "func none": ("def f(x): return None", functional("1", "null"), "correct"),
    "func float": ("def f(x): return 0.1+0.2", functional("1", "0.3"), "wrong"),
    "func bool": ("def f(x): return 1", functional("1", "true"), "correct"),
    "func in place": (
        "class Solution:\n    def f(self, x: List[int]):\n        x.sort(); return x[::-1]",
        functional("[1,2]", "[2, 1]"),
        "correct",
    ),
    "func namedtuple": (
        "from collections import namedtuple\nPt = namedtuple('Pt', 'a b')\ndef f(x): return [Pt(1, (2,))]",
        functional("1", "[[1,[2]]]"),
        "correct",
    ),
    "func cache": (
        "class Solution:\n    def f(self, n: int) -> int:\n        @cache\n        def g(i): return i if i < 2 else g(i-1) + g(i-2)\n        return g(n)",
        functional("10", "55"),
        "correct",
    ),
    "func ListNode missing": (
        "class Solution:\n    def f(self, n: Optional[ListNode]) -> int:\n        return 1",
        functional("10", "1"),
        "wrong",
    ),
    "func main print": (
        "class Solution:\n    def f(self, n): return n\nprint(Solution().f(3))",
        functional("10", "10"),
        "correct",
    ),
}
"""LiveCodeBench's functional tests: its imports, and lists for tuples."""


@pytest.mark.parametrize(
    "table", [RUNNABLE, SWALLOWING, FUNCTIONAL], ids=["runnable", "swallowing", "functional"]
)
def test_verdicts(strongest_sandbox: Sandbox, table: dict[str, tuple[str, CodeTests, Verdict]]) -> None:
    found: dict[str, Any] = {}
    for name, (program, tests, verdict) in table.items():
        given = strongest_sandbox.judge(program, tests)
        if given[0] != verdict:
            found[name] = given
    assert found == {}


CLEARS = "def f(a):\n    a.clear()\n    return []"
SORTS_A_COPY = "def f(a): return sorted(a)"
SORTS_IN_PLACE = "def f(a): a.sort()"
SORTS_IN_PLACE_AND_RETURNS = "def f(a):\n    a.sort()\n    return list(a)"
# Each compares the result for an input with something calculated from the input
WITH_REFERENCE = {
    "expression": asserts("a = [3, 1, 2]\nassert f(a) == sorted(a)"),
    "other statement": asserts("a = [3, 1, 2]", "assert f(a) == sorted(a)"),
    "variable": asserts("a = [3, 1, 2]\nr = f(a)\nassert r == sorted(a)"),
    "reference in a variable": in_pytest(
        "from solution import f\ndef ref(a): return sorted(a)\n"
        "def test_f():\n    a = [3, 1, 2]\n    r = f(a)\n    e = ref(a)\n    assert r == e"
    ),
    "check": in_check(
        "def check(candidate):\n    for inp in [[[3, 1, 2]], [[2, 1]]]:\n        assert candidate(*inp) == sorted(*inp)"
    ),
    "generator": asserts("assert all(f(x) == sorted(x) for x in [[3, 1], [2, 1]])"),
    "checker": asserts("def ok(r, a): return sorted(a) == r\na = [3, 1, 2]\nassert ok(f(a), a)"),
    "permutation": asserts("a = [3, 1, 2]\nr = f(a)\nassert len(r) == len(a)\nassert all(x in r for x in a)"),
    "item": asserts("cases = [{'i': [2, 1]}]\nfor c in cases:\n    assert f(c['i']) == sorted(c['i'])"),
    "parameter": in_pytest(
        "from solution import f\nimport pytest\n@pytest.mark.parametrize('a', [[3, 1], [2, 1, 5]])\n"
        "def test_f(a):\n    assert f(a) == sorted(a)"
    ),
}
IN_PLACE = {
    "expression": asserts("a = [3, 1, 2]\nassert f(a) is None and a == [1, 2, 3]"),
    "variable": asserts("a = [3, 1, 2]\nr = f(a)\nassert r is None\nassert a == sorted(a)"),
    "statement": asserts("a = [3, 1, 2]\nf(a)\nassert a == sorted([3, 1, 2]) and len(a) == 3"),
}
UNCHANGED = asserts("a = [3, 1, 2]\nassert f(a) == sorted(a)\nassert a == [3, 1, 2]")


@pytest.mark.parametrize("tests", WITH_REFERENCE.values(), ids=WITH_REFERENCE)
def test_reference_sees_the_inputs_before_the_program_changes_them(
    strongest_sandbox: Sandbox, tests: CodeTests
) -> None:
    assert strongest_sandbox.judge(CLEARS, tests)[0] == "wrong"
    assert strongest_sandbox.judge(SORTS_A_COPY, tests)[0] == "correct"
    assert strongest_sandbox.judge(SORTS_IN_PLACE_AND_RETURNS, tests)[0] == "correct"


def test_changes_of_inputs_are_seen_where_tests_look_at_them(strongest_sandbox: Sandbox) -> None:
    for name, tests in IN_PLACE.items():
        assert strongest_sandbox.judge(SORTS_IN_PLACE, tests)[0] == "correct", name
        assert strongest_sandbox.judge(SORTS_A_COPY, tests)[0] == "wrong", name
    assert strongest_sandbox.judge(SORTS_A_COPY, UNCHANGED)[0] == "correct"
    assert strongest_sandbox.judge(SORTS_IN_PLACE_AND_RETURNS, UNCHANGED)[0] == "wrong"
