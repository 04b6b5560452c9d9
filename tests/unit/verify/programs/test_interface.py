"""Other packages use the sandbox through its interface only."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[4] / "megatron_rasft"
INTERFACE = {"program_grading", "program_extraction"}
IMPORT = re.compile(r"^\s*(?:from|import) megatron_rasft\.verify\.programs(?:\.(\w+))?", re.MULTILINE)


def test_other_packages_import_the_interface_only() -> None:
    imported = {
        (str(path.relative_to(PACKAGE)), module)
        for path in PACKAGE.rglob("*.py")
        if not path.is_relative_to(PACKAGE / "verify" / "programs")
        for module in IMPORT.findall(path.read_text(encoding="utf-8"))
    }
    assert ("verify/pool.py", "program_grading") in imported
    assert {module for _, module in imported} <= INTERFACE, imported
