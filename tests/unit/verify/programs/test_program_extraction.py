"""The program of a response is found, and joined with the prompt that it continues."""

import contextlib
import io
import sys
import time

import pytest

from megatron_rasft.verify.programs.program_extraction import extract_program, holds_program

TICKS = "`" * 3


def fenced(code: str, language: str = "python") -> str:
    """A fenced block of Markdown."""
    return f"{TICKS}{language}\n{code}\n{TICKS}\n"


@pytest.mark.parametrize(
    ("text", "entry_point", "program"),
    [
        ("def f(): pass", "f", "def f(): pass"),
        (f"Here:\n{fenced('def f(): pass')}Done.", "f", "def f(): pass\n"),
        (f"{fenced('def f(): 1')}Better:\n{fenced('def f(): 2')}", "f", "def f(): 2\n"),
        (f"{fenced('def f(): 1')}Use it:\n{fenced('print(f())')}", "f", "def f(): 1\n"),
        (f"{fenced('def f(): 1')}Use it:\n{fenced('print(f())')}", "", "def f(): 1\n"),
        (
            f"{fenced('x = 1', 'text')}{fenced('def f(): 1', 'py')}{fenced('pip install', 'bash')}",
            "f",
            "def f(): 1\n",
        ),
        (f"Cut off:\n{TICKS}python\ndef f():\n    return", "f", "def f():\n    return"),
        (f"<think>{fenced('def f(): 1')}</think>{fenced('def f(): 2')}", "f", "def f(): 2\n"),
        (f"{TICKS}`python\n{TICKS}\nx\n{TICKS}\n{TICKS}`", "", f"{TICKS}\nx\n{TICKS}\n"),
        ("", "f", None),
        (f"{TICKS}python\n{TICKS}", "f", f"{TICKS}python\n{TICKS}"),
    ],
)
def test_program_is_found(text: str, entry_point: str, program: str | None) -> None:
    assert extract_program(text, entry_point) == program


def test_prompt_is_put_before_a_completion_and_before_a_whole_program() -> None:
    prompt = 'import math\n\ndef f(x):\n    """Square."""\n'
    assert extract_program("    return x * x\n", "f", prompt) == prompt + "    return x * x\n"
    whole = extract_program(fenced("def f(x):\n    return math.floor(x)"), "f", prompt)
    assert whole is not None
    scope: dict[str, object] = {}
    exec(whole, scope)
    assert scope["f"](2.5) == 2  # type: ignore[operator]


# In each response, the program that the response commits to returns 2 for f(1); other code in it does not
RIGHT = "def f(x):\n    return x + 1"
WRONG = "def f(x):\n    return 0"
FORMS = {
    "bold glued": f"**Solution:**{TICKS}python\n{RIGHT}\n{TICKS}",
    "close glued with text": f"{TICKS}python\n{RIGHT}\n{TICKS} This works",
    "close glued code+text": f"{TICKS}python\n{RIGHT}{TICKS} This works",
    "fence not separated": f"{TICKS}python\n{RIGHT}\n{TICKS}{TICKS}python\nprint(f(1))\n{TICKS}",
    "two fences one line": f"{TICKS}python\n{RIGHT}\n{TICKS} and {TICKS}python\nprint(f(2))\n{TICKS}",
    "nested list": f"1. Step\n\n    {TICKS}python\n    {RIGHT.replace(chr(10), chr(10) + '    ')}\n    {TICKS}\n2. Done",
    "indented closing only": f"{TICKS}python\n{RIGHT}\n    {TICKS}",
    "indented open only": f"   {TICKS}python\n{RIGHT}\n{TICKS}",
    "tabs list": f"-\t{TICKS}python\n\t{RIGHT.replace(chr(10), chr(10) + chr(9))}\n\t{TICKS}",
    "no newline end": f"{TICKS}python\n{RIGHT}\n{TICKS}",
    "py label caps": f"{TICKS}PYTHON\n{RIGHT}\n{TICKS}",
    "py label attrs": f'{TICKS}python title="a.py" linenums=1\n{RIGHT}\n{TICKS}',
    "py3.11": f"{TICKS}python3.11\n{RIGHT}\n{TICKS}",
    "ipython": f"{TICKS}ipython\n{RIGHT}\n{TICKS}",
    "code label": f"{TICKS}code\n{RIGHT}\n{TICKS}",
    "plaintext fence around program only": f"{TICKS}\n{RIGHT}\n{TICKS}",
    "docstring with python fence": f'{TICKS}python\ndef f(x):\n    """Adds.\n\n    Example:\n    {TICKS}python\n    f(1)\n    {TICKS}\n    """\n    return x + 1\n{TICKS}\n\nIt adds.',
    "docstring fence at margin": f'{TICKS}python\ndef f(x):\n    """Adds.\n{TICKS}\nf(1)\n{TICKS}\n"""\n    return x + 1\n{TICKS}',
    "comment fence": f"{TICKS}python\n# {TICKS}\ndef f(x):\n    return x + 1\n# {TICKS}\n{TICKS}",
    "string fence": f"{TICKS}python\nMD = '''\n{TICKS}python\nx\n{TICKS}\n'''\n{RIGHT}\n{TICKS}",
    "think unclosed start": f"<think>hmm {TICKS}python\n{WRONG}\n{TICKS}\n</think>\n\n{TICKS}python\n{RIGHT}\n{TICKS}",
    "think draft no close fence": f"<think>\n{TICKS}python\n{WRONG}\n</think>\n{TICKS}python\n{RIGHT}\n{TICKS}",
    "think two": f"<think>\n{TICKS}python\n{WRONG}\n{TICKS}</think>\n<think>more {TICKS}python\n{WRONG}\n{TICKS}</think>\n{TICKS}python\n{RIGHT}\n{TICKS}",
    "think answer unfenced": f"<think>\n{TICKS}python\n{WRONG}\n{TICKS}\n</think>\n{RIGHT}",
    "thought tag": f"<thought>\n{TICKS}python\n{WRONG}\n{TICKS}\n</thought>\n{TICKS}python\n{RIGHT}\n{TICKS}",
    "draft then final": f"First:\n{TICKS}python\n{WRONG}\n{TICKS}\nBetter:\n{TICKS}python\n{RIGHT}\n{TICKS}",
    "final then tests block": f"{TICKS}python\n{RIGHT}\n{TICKS}\nTests:\n{TICKS}python\nassert f(1) == 2\nimport unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n{TICKS}",
    "usage redefining name": f"{TICKS}python\n{RIGHT}\n{TICKS}\nUsage:\n{TICKS}python\nfrom solution import f\nprint(f(1))\n{TICKS}",
    "usage importing from module": f"{TICKS}python\n{RIGHT}\n{TICKS}\nUsage:\n{TICKS}python\nfrom my_module import f\nresult = f(1)\nprint(result)\n{TICKS}",
    "alternatives after": f"{TICKS}python\n{RIGHT}\n{TICKS}\nComplexity O(1).\n{TICKS}text\nf(1) -> 2\n{TICKS}",
    "diff": f"{TICKS}python\n{RIGHT}\n{TICKS}\n{TICKS}diff\n- a\n+ b\n{TICKS}",
    "helper class after": f"{TICKS}python\n{RIGHT.replace('x + 1', 'H().g(x)')}\n{TICKS}\n{TICKS}python\nclass H:\n    def g(self, x): return x + 1\n{TICKS}",
    "helper chain": f"{TICKS}python\ndef a(x): return x\n{TICKS}\n{TICKS}python\ndef b(x): return a(x) + 1\n{TICKS}\n{TICKS}python\ndef f(x): return b(x)\n{TICKS}",
    "constant": f"{TICKS}python\nONE = 1\n{TICKS}\nand\n{TICKS}python\ndef f(x): return x + ONE\n{TICKS}",
    "decorator": f"{TICKS}python\nfrom functools import lru_cache\n\n@lru_cache(None)\ndef h(x):\n    return x + 1\n{TICKS}\n{TICKS}python\ndef f(x):\n    return h(x)\n{TICKS}",
    "html": f"<details>\n\n{TICKS}python\n{RIGHT}\n{TICKS}\n</details>",
    "answer tags inline": f"<answer>{TICKS}python\n{RIGHT}\n{TICKS}</answer>",
    "boxed": f"\\boxed{{{TICKS}python\n{RIGHT}\n{TICKS}}}",
    "unlabelled then output": f"{TICKS}\n{RIGHT}\n{TICKS}\nprints\n{TICKS}\n2\n{TICKS}",
    "unclosed with eos text": f"Here:\n{TICKS}python\n{RIGHT}\n",
    "unclosed tilde": f"~~~python\n{RIGHT}",
    "unclosed after closed": f"{TICKS}python\n{WRONG}\n{TICKS}\nFix:\n{TICKS}python\n{RIGHT}",
    "prose with code no fence multi": f"We do this.\n\nimport math\n\n{RIGHT}\n\nprint(f(1))\n\nDone.",
    "bom": f"\ufeff{RIGHT}",
    "smart code in p": f"Use `{TICKS}` blocks. {TICKS}python\n{RIGHT}\n{TICKS}",
    "longer close": f"{TICKS}python\n{RIGHT}\n{TICKS}`",
    "four ticks": f"{TICKS}`python\n{RIGHT}\n{TICKS}`",
    "mixed fence": f"~~~python\ndef f(x):\n    '''{TICKS}\n    '''\n    return x + 1\n~~~",
    "blank lines in quote": f"> {TICKS}python\n> def f(x):\n>\n>     return x + 1\n> {TICKS}",
    "async entry later": f"{TICKS}python\nclass K:\n    def f(self): pass\n{RIGHT}\n{TICKS}",
    "entry as lambda": f"{TICKS}python\nf = lambda x: x + 1\n{TICKS}\n{TICKS}python\nprint(f(1))\n{TICKS}",
    "entry imported": f"{TICKS}python\ndef _f(x): return x + 1\nf = _f\n{TICKS}\n{TICKS}python\n_f(2)\n{TICKS}",
    "answer in final tag": f"Reasoning {TICKS}python\n{WRONG}\n{TICKS}\n## Final\n{TICKS}python\n{RIGHT}\n{TICKS}\nExample run:\n{TICKS}console\n>>> f(1)\n2\n{TICKS}",
}
RESPONSES = {
    "docstring": (
        f"{TICKS}python\ndef f(x):\n    '''\n    {TICKS}\n    f(1)\n    {TICKS}\n    '''\n    return x + 1\n{TICKS}",
        "f",
    ),
    "docstring mid": (
        f'{TICKS}python\ndef f(x):\n    """Use {TICKS}f(1){TICKS} or\n{TICKS}\nf(1)\n{TICKS}\n    """\n    return x + 1\n{TICKS}\nDone',
        "f",
    ),
    "list": (f"1. Like this:\n   {TICKS}python\n   def f(x):\n       return x + 1\n   {TICKS}\n", "f"),
    "list marker": (f"- {TICKS}python\n  def f(x):\n      return x + 1\n  {TICKS}\n- then", "f"),
    "quote": (f"> {TICKS}python\n> def f(x):\n>     return x + 1\n> {TICKS}\n", "f"),
    "glued close": (f"{TICKS}python\ndef f(x):\n    return x + 1{TICKS}\n", "f"),
    "glued close text": (f"{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}That works.\n", "f"),
    "glued open": (f"Here it is:{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}\n", "f"),
    "one line": (f"{TICKS}python def f(x): return x + 1{TICKS}\n", "f"),
    "one line2": (f"It is {TICKS}def f(x): return x + 1{TICKS}\n", "f"),
    "helper": (
        f"{TICKS}python\ndef h(x):\n    return x + 1\n{TICKS}\n{TICKS}python\ndef f(x):\n    return h(x)\n{TICKS}",
        "f",
    ),
    "imports": (
        f"{TICKS}python\nimport math\nfrom typing import List\n{TICKS}\n{TICKS}python\ndef f(x: List[int]):\n    return math.floor(x)+1\n{TICKS}",
        "f",
    ),
    "helper after": (
        f"{TICKS}python\ndef f(x):\n    return h(x)\n{TICKS}\nwith\n{TICKS}python\ndef h(x):\n    return x + 1\n{TICKS}",
        "f",
    ),
    "usage": (
        f"{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}\nUsage:\n{TICKS}python\nprint(f(1))\n{TICKS}",
        "",
    ),
    "tilde": ("~~~python\ndef f(x):\n    return x + 1\n~~~\n", "f"),
    "unclosed": (f"{TICKS}python\ndef f(x):\n    return x + 1\n", "f"),
    "unclosed prose": (
        f"{TICKS}python\ndef f(x):\n    return x + 1\n\nThis adds one to it.\nIt's simple.",
        "f",
    ),
    "think": (
        f"<think>{TICKS}python\ndef f(x):\n  return 0\n{TICKS}</think>{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}",
        "f",
    ),
    "think open": (
        f"draft {TICKS}python\ndef f(x):\n  return 0\n{TICKS} so</think>\n{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}",
        "f",
    ),
    "think tag in code": (
        f"{TICKS}python\nimport re\ndef f(x):\n    y = re.sub(r'<think>.*?</think>', '', '')\n    return x + 1\n{TICKS}",
        "f",
    ),
    "missing close": (
        f"{TICKS}python\ndef f(x):\n    return x + 1\n\n{TICKS}python\nprint(f(1))\n{TICKS}",
        "f",
    ),
    "prose": ("Sure, here it is:\n\ndef f(x):\n    return x + 1\n\nIt adds one.", "f"),
    "stub": (
        f"{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}\nSignature:\n{TICKS}python\ndef f(x: int) -> int: ...\n{TICKS}",
        "f",
    ),
    "repl": (
        f"{TICKS}python\ndef f(x):\n    return x + 1\n{TICKS}\nUsage:\n{TICKS}python\n>>> f(1)\n2\n{TICKS}",
        "",
    ),
    "crlf": (f"{TICKS}python\r\ndef f(x):\r\n    return x + 1\r\n{TICKS}\r\n", "f"),
    "future": (
        f"{TICKS}python\ndef h(x): return x + 1\n{TICKS}\n{TICKS}python\nfrom __future__ import annotations\ndef f(x: A):\n    return h(x)\n{TICKS}",
        "f",
    ),
    "nested ticks": (
        f"{TICKS}`markdown\n{TICKS}python\ndef f(x): return 0\n{TICKS}\n{TICKS}`\n{TICKS}python\ndef f(x): return x + 1\n{TICKS}",
        "f",
    ),
    "lang Python 3": (f"{TICKS}Python 3\ndef f(x): return x + 1\n{TICKS}", "f"),
    "lang braces": (f"{TICKS}{{python}}\ndef f(x): return x + 1\n{TICKS}", "f"),
    "answer tag": ("<answer>\ndef f(x): return x + 1\n</answer>", "f"),
    "answer tag fence": (f"<answer>{TICKS}python\ndef f(x): return x + 1\n{TICKS}</answer>", "f"),
    "output": (f"{TICKS}python\ndef f(x): return x + 1\n{TICKS}\nOutput:\n{TICKS}\n2\n{TICKS}", ""),
    "json": (
        f"{TICKS}json\n{{}}\n{TICKS}\n{TICKS}python\ndef f(x): return x + 1\n{TICKS}\n{TICKS}bash\npython f.py\n{TICKS}",
        "f",
    ),
    "tabs": (f"\t{TICKS}python\n\tdef f(x):\n\t\treturn x + 1\n\t{TICKS}", "f"),
    "mixed": (f"{TICKS}python\ndef f(x):\n    s = '{TICKS}'\n    return x + 1\n{TICKS}", "f"),
}


@pytest.mark.parametrize(("text", "entry_point"), RESPONSES.values(), ids=RESPONSES)
def test_program_that_a_response_commits_to_is_found(text: str, entry_point: str) -> None:
    program = extract_program(text, entry_point, names=["f"])
    assert program is not None
    scope: dict[str, object] = {}
    exec(program, scope)
    assert scope["f"](1) == 2  # type: ignore[operator]


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_program_is_found_in_every_form(text: str) -> None:
    for program in (extract_program(text, "f"), extract_program(text, names=["f"])):
        assert program is not None
        scope: dict[str, object] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, scope)
        assert scope["f"](1) == 2  # type: ignore[operator]


# Each program prints 2 for the input 1
SCRIPTS = {
    "samples": f"{TICKS}python\nprint(int(input()) + 1)\n{TICKS}\nInput:\n{TICKS}\n1\n{TICKS}\nOutput:\n{TICKS}\n2\n{TICKS}",
    "unlabelled": f"{TICKS}\nprint(int(input()) + 1)\n{TICKS}\nInput:\n{TICKS}\n1\n{TICKS}\nOutput:\n{TICKS}\n2\n{TICKS}",
    "usage": f"{TICKS}python\nimport sys\ndef solve(s):\n    return int(s) + 1\nprint(solve(sys.stdin.read()))\n{TICKS}\nUsage:\n{TICKS}python\nprint(solve('1'))\n{TICKS}",
    "split": f"{TICKS}python\ndef solve():\n    return int(input()) + 1\n{TICKS}\nMain:\n{TICKS}python\nif __name__ == '__main__':\n    print(solve())\n{TICKS}",
    "split2": f"{TICKS}python\nn = int(input())\n{TICKS}\nthen:\n{TICKS}python\nprint(n + 1)\n{TICKS}",
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_script_that_a_response_commits_to_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = extract_program(text, reads_input=True)
    assert program is not None
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {"__name__": "__main__"})
    assert printed.getvalue() == "2\n"


def test_thought_that_does_not_end_holds_no_program() -> None:
    text = f"<think>\n{fenced('def f(x): return x + 1')}so far"
    assert extract_program(text, "f") is None
    assert not holds_program(text)
    assert holds_program(f"<think>a</think>{fenced('def f(x): return x + 1')}")


@pytest.mark.parametrize(
    "text",
    [
        f"{TICKS}\n" * 20_000,
        f"{TICKS}python\nx = (\n" * 10_000,
        f"a{TICKS}\n" * 20_000,
        f"{TICKS}python\n" + "x = 1\n\n" * 10_000 + "(",
        "<think>\n</think>\n" * 5_000,
        f"{TICKS}python\n" + "(" * 50_000,
        f"{TICKS}python\ndef g(): return h()\n{TICKS}\n" * 3_000,
        "def f(x):\n" * 10_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_time_of_extraction_is_bounded(text: str) -> None:
    began = time.process_time()
    extract_program(text, "f")
    extract_program(text, names=["f"], reads_input=True)
    assert time.process_time() - began < 20
