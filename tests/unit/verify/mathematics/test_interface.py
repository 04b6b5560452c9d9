"""Other packages use the grader of answers through its interface only."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[4] / "megatron_rasft"
INTERFACE = {
    ("answer_grading", "grade_answer"),
    ("answer_extraction", "extract_answer"),
    ("answer_extraction", "closed_boxes"),
}
IMPORT = re.compile(
    r"^\s*(?:from|import) megatron_rasft\.verify(?:\.mathematics| import .*\bmathematics\b).*$", re.MULTILINE
)
NAMES = re.compile(r"^\s*from megatron_rasft\.verify\.mathematics\.(\w+) import ([\w, ]+)$")


def test_other_packages_import_the_interface_only() -> None:
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "verify" / "mathematics"):
            continue
        for line in IMPORT.findall(path.read_text(encoding="utf-8")):
            names = NAMES.match(line)
            assert names, f"{path}: {line}"
            imported |= {(names[1], name.strip()) for name in names[2].split(",")}
    assert imported == INTERFACE
