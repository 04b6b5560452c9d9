"""Attempts to leave the sandbox at every level. All attempts of a level share one process, and none may change the world."""

from megatron_rasft.verify.programs.sandbox import Sandbox
from tests.unit.verify.programs.escape_attempts import ATTEMPTS
from tests.unit.verify.programs.escape_targets import Targets, script_of
from tests.unit.verify.programs.working_programs import ANYWHERE, WITH_FILES

POSSIBLE = {
    "namespaces": {"read lock"},
    "landlock": {"read lock", "outside folder entered", "outside file seen by stat"},
    "limits": {"outside file seen by stat"},
}
"""The attempts that succeed, by level. docs/sandbox.md says so."""


def test_no_attempt_leaves_the_sandbox(patient_sandbox: Sandbox, targets: Targets) -> None:
    before = targets.state()
    outcome, output = patient_sandbox.run_script(script_of(ATTEMPTS, targets), "")
    assert outcome == "ended", output
    succeeded = output.split("\0")
    assert set(succeeded) - {"tried all"} == POSSIBLE[patient_sandbox.level]
    assert targets.state() == before


WORKS = """
import contextlib, io, traceback
for name, program in PROGRAMS.items():
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, {"__name__": "working"})
    except BaseException:
        print(name, traceback.format_exc())
"""


def test_python_and_numpy_work(patient_sandbox: Sandbox) -> None:
    programs = ANYWHERE | ({} if patient_sandbox.level == "limits" else WITH_FILES)
    outcome, output = patient_sandbox.run_script(f"PROGRAMS = {programs!r}\n{WORKS}", "")
    assert (outcome, output) == ("ended", "")
