"""Runs the program of a response against its tests. Called in the pool's workers only."""

import dataclasses
import json
from decimal import Decimal, InvalidOperation

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import CodeTests, Verdict
from megatron_rasft.verify.programs.code_extraction import extract_program
from megatron_rasft.verify.programs.sandbox import Sandbox

_sandboxes: dict[str, Sandbox] = {}


def grade_code(response_text: str, tests: CodeTests, config: VerifyConfig) -> tuple[Verdict, str]:
    """Whether the program in a response passes its tests, and why.

    The sandbox is started on the first call in a process and kept for the next. A program past its deadline is wrong.

    Raises:
        SandboxError: the machine does not allow ``verify_sandbox_level``.
    """
    program = extract_program(response_text, tests.entry_point, tests.prompt)
    if program is None:
        return "wrong", "no program"
    if not tests.tests and not tests.cases:
        return "unverifiable", "no tests"
    key = json.dumps(dataclasses.asdict(config))
    if key not in _sandboxes:
        _sandboxes[key] = Sandbox(config)
    verdict, reason = run_tests(_sandboxes[key], program, tests)
    # A program that does not end fails its tests; a grader that does not end says nothing about the response.
    return ("wrong", reason) if verdict == "timeout" else (verdict, reason)


def run_tests(sandbox: Sandbox, program: str, tests: CodeTests) -> tuple[Verdict, str]:
    """The verdict on a program."""
    if tests.style != "stdin":
        return sandbox.judge(program, tests)
    for number, case in enumerate(tests.cases, 1):
        outcome, output = sandbox.output_of(program, case.input)
        where = f"case {number} of {len(tests.cases)}"
        if outcome == "timeout":
            return "timeout", f"{where}: deadline of {sandbox.allowance.timeout_s:g} s"
        if outcome != "ended":
            return "wrong", f"{where}: {outcome}"
        if not outputs_equal(output, case.output):
            return "wrong", f"{where}: another output"
    return "correct", f"{len(tests.cases)} cases passed"


def outputs_equal(output: str, expected: str) -> bool:
    """Equal line by line and word by word; numbers may be written differently (1.0 and 1, 0.50 and 0.5)."""
    lines, wanted = (text.rstrip().split("\n") for text in (output, expected))
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
