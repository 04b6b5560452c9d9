"""Every statement of docs/sandbox.md about hostile programs is in the document and is tried (see ``document_claims``)."""

import importlib
import re
from pathlib import Path

import pytest

from megatron_rasft.types import CodeTests
from megatron_rasft.verify.programs.sandbox import Sandbox
from tests.unit.verify.programs import hostile_programs
from tests.unit.verify.programs.conftest import REPOSITORY
from tests.unit.verify.programs.document_claims import (
    LEVEL_CLAIMS,
    VERDICT_CLAIMS,
    Judged,
    TestedBy,
    Tried,
)
from tests.unit.verify.programs.escape_attempts import ATTEMPTS
from tests.unit.verify.programs.escape_targets import Targets, script_of

DOCUMENT = (REPOSITORY / "docs" / "sandbox.md").read_text()
SECTIONS = {
    "Why a program cannot report its own success": VERDICT_CLAIMS,
    "What a program cannot reach": LEVEL_CLAIMS,
}
HERE = Path(__file__).parent


def section(title: str) -> str:
    """The text of one section, with its line breaks."""
    return DOCUMENT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def statements(text: str) -> list[str]:
    """The rows of tables, and the sentences of paragraphs and of lists. The line before a list, which ends with a colon, is left out."""
    blocks = re.split(r"\n\n|\n(?=- |\| )", text.strip())
    rows = [
        block for block in blocks if block.startswith("| ") and not re.match(r"\| (\||---|call \|)", block)
    ]
    prose = [
        " ".join(block.removeprefix("- ").split()) for block in blocks if block and not block.startswith("| ")
    ]
    sentences = [part.strip() for block in prose for part in re.split(r"(?<=[.;])\s+(?=[A-Z`])", block)]
    heads = ("Therefore", "So a program cannot")
    return rows + [part for part in sentences if not part.endswith(":") and part not in heads]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_statement_has_a_trial(title: str) -> None:
    fragments = [fragment for fragment, _ in SECTIONS[title]]
    text = " ".join(section(title).split())
    assert [fragment for fragment in fragments if fragment not in text] == []
    found = statements(section(title))
    assert len(found) > 30
    assert [one for one in found if not any(fragment in one for fragment in fragments)] == []
    assert [fragment for fragment, trials in SECTIONS[title] if not trials] == []


def test_trials_elsewhere_exist() -> None:
    names = {
        trial.name
        for claims in SECTIONS.values()
        for _, trials in claims
        for trial in trials
        if isinstance(trial, TestedBy)
    }
    for name in names:
        module, _, function = name.rpartition(".")
        path = module if module.startswith("tests.") else f"tests.unit.verify.programs.{module}"
        assert callable(getattr(importlib.import_module(path), function)), name


def test_verdicts_are_those_of_the_document(strongest_sandbox: Sandbox) -> None:
    wrong = []
    for fragment, trials in VERDICT_CLAIMS:
        for trial in trials:
            if isinstance(trial, Judged):
                verdict, reason = strongest_sandbox.judge(trial.program, trial.tests)
                if verdict != trial.verdict:
                    wrong.append(f"{fragment}: {verdict}, {reason}\n{trial.program}\n{trial.tests.tests}")
    assert not wrong, "\n".join(wrong)


def test_each_level_keeps_out_what_the_document_says(patient_sandbox: Sandbox, targets: Targets) -> None:
    tried = {
        f"{fragment}: {trial.body}": trial
        for fragment, trials in LEVEL_CLAIMS
        for trial in trials
        if isinstance(trial, Tried)
    }
    before = targets.state()
    bodies = {name: trial.body for name, trial in tried.items()}
    outcome, output = patient_sandbox.run_script(
        f"import os\nHERE = os.getcwd()\n{script_of(bodies, targets)}", ""
    )
    assert outcome == "ended", output
    works = {name for name, trial in tried.items() if patient_sandbox.level in trial.works_at}
    found = set(output.split("\0"))
    assert found - works == {"tried all"}, "succeeded"
    assert works - found == set(), "failed"
    assert targets.state() == before


def test_the_tests_can_read_every_file_only_at_the_lowest_level(
    patient_sandbox: Sandbox, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    reads = CodeTests(
        style="asserts",
        tests=(f"assert f(open({str(tmp_path / 'file')!r}).read()) == 'content'",),
        entry_point="f",
    )
    is_read = patient_sandbox.judge("def f(x): return x", reads)[0] == "correct"
    assert is_read == (patient_sandbox.level == "limits")


def test_the_document_counts_programs_and_attempts() -> None:
    tables = ("TRICKS", "ENDLESS", "HOSTILE_TO_PYTEST", "HOSTILE_OBJECTS", "HOSTILE_SCRIPTS")
    num_programs = sum(len(getattr(hostile_programs, table)) for table in tables)
    assert f"| of the {num_programs} hostile programs |" in DOCUMENT
    assert f"`hostile_programs.py` {num_programs} programs" in " ".join(DOCUMENT.split())
    assert f"| of the {len(ATTEMPTS)} attempts |" in DOCUMENT
    assert f"`escape_attempts.py` {len(ATTEMPTS)} attempts" in " ".join(DOCUMENT.split())
