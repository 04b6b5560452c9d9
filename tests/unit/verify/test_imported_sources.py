"""Which source files belong to a --verify-function: those that its file imports from its own folder or package."""

import sys
from pathlib import Path

import pytest

from megatron_rasft.verify.imported_sources import imported_sources

FILES = {
    "grade.py": "import json\nimport rules.lengths as l\nfrom cases import CASES\ndef f():\n    import late",
    "cases.py": "from grade import f\nCASES = 1",
    "late.py": "import absent, numpy",
    "json.py": "raise ValueError('the standard library hides this file')",
    "unused.py": "",
    "rules/__init__.py": "",
    "rules/lengths.py": "from . import words\nfrom .words import WORDS\nfrom .deep.most import m",
    "rules/words.py": "WORDS =",  # the worker reports the error of syntax
    "rules/unused.py": "",
    "rules/deep/most.py": "from ..more import x",
    "rules/more/__init__.py": "x = 1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_neighbours_are_found_also_through_each_other_and_inside_functions(folder: Path) -> None:
    found = imported_sources(folder / "grade.py")
    assert set(found) == set(FILES) - {"grade.py", "json.py", "unused.py", "rules/unused.py"}
    assert list(found) == sorted(found) and found["cases.py"] == FILES["cases.py"].encode()
    assert "cases" not in sys.modules, "nothing is run"


def test_a_module_of_a_package_has_the_sources_of_this_package_only(folder: Path) -> None:
    (folder / "rules" / "lengths.py").write_text("from .words import WORDS\nimport cases\nimport rules.more")
    found = imported_sources(folder / "rules" / "lengths.py", "rules.lengths")
    assert set(found) == {"rules/__init__.py", "rules/words.py", "rules/more/__init__.py"}
    (folder / "rules" / "__init__.py").write_text("from rules import more\nfrom .deep import most")
    found = imported_sources(folder / "rules" / "__init__.py", "rules")
    assert set(found) == {"rules/more/__init__.py", "rules/deep/most.py"}
