"""Runs tests on a program in a plain Python interpreter, without a sandbox: the judgement to compare verdicts with.

Use it for programs that you know. A program can do here what its user can do; only time and memory are limited.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_rasft.types import CodeTests

_ASSERTS = """
import json, sys
program, setup, tests = json.loads(sys.stdin.read())
names = {"__name__": "solution"}
for source in (program, setup, *tests):
    exec(compile(source, "<source>", "exec"), names)
open("passed", "w").close()
"""
_CALL_CHECK = "check({})"


def run_plainly(program: str, tests: CodeTests, timeout_s: float, memory_bytes: int) -> str:
    """Returns ``correct``, ``wrong`` or ``timeout``. The styles are ``asserts``, ``check`` and ``pytest``."""
    with tempfile.TemporaryDirectory() as folder:
        if tests.style == "pytest":
            Path(folder, "solution.py").write_text(program)
            Path(folder, "test_solution.py").write_text("\n".join(tests.tests))
            arguments, given = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_solution.py"], ""
        else:
            calls = [_CALL_CHECK.format(tests.entry_point)] if tests.style == "check" else []
            arguments, given = ["-c", _ASSERTS], json.dumps([program, tests.setup, [*tests.tests, *calls]])
        try:
            done = subprocess.run(
                [sys.executable, "-s", *arguments],
                input=given,
                cwd=folder,
                env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=timeout_s,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes)),
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        # A program may end the interpreter with success before the tests are over
        has_passed = tests.style == "pytest" or Path(folder, "passed").exists()
    return "correct" if has_passed and not done.returncode else "wrong"
