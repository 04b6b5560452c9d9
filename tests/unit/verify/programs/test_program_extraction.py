"""The program of a response is found, and joined with the prompt that it continues."""

import pytest

from megatron_rasft.verify.programs.program_extraction import extract_program

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
        (f"{fenced('def f(): 1')}Use it:\n{fenced('print(f())')}", "", "print(f())\n"),
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
