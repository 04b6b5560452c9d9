"""Grades a response that holds a program, by running it. This is the interface of ``verify.programs``.

``grade_program`` is called in the pool's workers, ``find_sandbox_level`` before the first of them starts.
"""

import dataclasses
import json
from decimal import Decimal, InvalidOperation

from megatron_rasft.config.verify import SandboxLevel, VerifyConfig
from megatron_rasft.types import CodeTests, Verdict
from megatron_rasft.verify.programs.program_extraction import extract_program
from megatron_rasft.verify.programs.sandbox import Sandbox
from megatron_rasft.verify.programs.scripts import names_of_program

# A worker keeps its sandbox for all its checks, because starting a launcher takes about a second. There is a sandbox for each
# configuration: a worker has one configuration, a test process several
_sandboxes: dict[str, Sandbox] = {}


def find_sandbox_level(config: VerifyConfig) -> SandboxLevel:
    """Returns the strongest sandbox level that this machine allows, by starting a sandbox.

    Raises:
        SandboxError: that level is weaker than ``verify_sandbox_level``.
    """
    with Sandbox(config) as sandbox:
        return sandbox.level


def grade_program(response_text: str, tests: CodeTests, config: VerifyConfig) -> tuple[Verdict, str]:
    """Runs the program in a response against its tests. Returns ``correct``, ``wrong`` or ``unverifiable``, and a reason.

    The first call in a process starts a sandbox, which later calls use again. A program that exceeds its deadline is
    ``wrong``.

    Raises:
        SandboxError: the machine does not allow ``verify_sandbox_level``.
    """
    program = program_of(response_text, tests)
    if program is None:
        return "wrong", "no program"
    if not tests.tests and not tests.cases:
        return "unverifiable", "no tests"
    key = json.dumps(dataclasses.asdict(config))
    if key not in _sandboxes:
        _sandboxes[key] = Sandbox(config)
    verdict, reason = run_tests(_sandboxes[key], program, tests)
    # The verdict "timeout" is for graders that do not end. A program that does not end has failed its tests
    return ("wrong", reason) if verdict == "timeout" else (verdict, reason)


def program_of(response_text: str, tests: CodeTests) -> str | None:
    """Returns the program in a response that these tests can check, or None if there is none."""
    names = () if tests.entry_point or tests.style == "stdin" else names_of_program(tests)
    return extract_program(
        response_text, tests.entry_point, tests.prompt, names, reads_input=tests.style == "stdin"
    )


def run_tests(sandbox: Sandbox, program: str, tests: CodeTests) -> tuple[Verdict, str]:
    """Runs a program against its tests, of any style. Returns the verdict and a short reason."""
    if tests.style != "stdin":
        return sandbox.judge(program, tests)
    for number, case in enumerate(tests.cases, 1):
        outcome, output = sandbox.run_script(program, case.input)
        where = f"case {number} of {len(tests.cases)}"
        if outcome == "timeout":
            return "timeout", f"{where}: deadline of {sandbox.allowance.timeout_s:g} s"
        if outcome != "ended":
            return "wrong", f"{where}: {outcome}"
        if not outputs_equal(output, case.output):
            return "wrong", f"{where}: wrong output"
    return "correct", f"{len(tests.cases)} cases passed"


def outputs_equal(output: str, expected: str) -> bool:
    """Compares outputs line by line and word by word, as LiveCodeBench does. Words that are equal as numbers match (1.0, 1)."""
    lines, wanted = (text.strip().split("\n") for text in (output, expected))
    if len(lines) != len(wanted):
        return False
    return all(_lines_equal(line.split(), want.split()) for line, want in zip(lines, wanted, strict=True))


def _lines_equal(words: list[str], wanted: list[str]) -> bool:
    if words == wanted:
        return True
    if len(words) != len(wanted):
        return False
    try:
        return all(a == b or Decimal(a) == Decimal(b) for a, b in zip(words, wanted, strict=True))
    except InvalidOperation:
        return False
