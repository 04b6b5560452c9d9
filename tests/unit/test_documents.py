"""What the documents quote from the program is what it writes: messages, and lines of its files."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft import __version__
from megatron_rasft.monitoring.status import RunStatus
from megatron_rasft.types import Rollout

ROOT = Path(__file__).resolve().parents[2]


def table_rows(document: str) -> list[str]:
    return re.findall(r"^\| (.*?) \|", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)


def sources() -> str:
    """The text of all modules, with the parts of a string that is written on several lines joined."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_rasft").rglob("*.py"))
    return re.sub(r"\"\n\s*f?\"", "", text)


def test_quoted_messages_are_those_of_the_program() -> None:
    quoted = [
        part for row in table_rows("docs/troubleshooting.md") for part in re.findall(r"^`([^`/]+)`", row)
    ]
    assert len(quoted) > 8
    text = sources()
    for message in quoted:
        for part in message.split(" ... "):
            assert part in text, message


@pytest.mark.parametrize(("heading", "kind"), [("rollouts.jsonl", Rollout), ("status.json", RunStatus)])
def test_example_lines_of_files_have_the_fields_of_their_classes(heading: str, kind: Any) -> None:
    section = (ROOT / "docs/formats.md").read_text(encoding="utf-8").partition(f"\n### {heading}\n")[2]
    line = json.loads(re.findall(r"^```json\n(.*?)\n```", section, re.MULTILINE | re.DOTALL)[0])
    optional = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    known = {f.name for f in dataclasses.fields(kind)}
    assert known - optional <= line.keys() <= known


def test_every_formula_of_the_method_names_its_code() -> None:
    """A formula is an indented block with an equals sign."""
    sections = re.split(r"^##+ ", (ROOT / "docs/method.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[
        1:
    ]
    with_formula = [section for section in sections if re.search(r"^    \S.* = ", section, re.MULTILINE)]
    assert len(with_formula) >= 4
    for section in with_formula:
        assert re.search(r"\]\(\.\./megatron_rasft/\S+\.py#\w+\)", section), section.splitlines()[0]


def test_architecture_shows_the_loop_of_the_program() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    program = (ROOT / "pretrain_rasft.py").read_text(encoding="utf-8")
    lines = [line.partition("  #")[0].strip() for line in program.splitlines()]
    start = lines.index(shown.splitlines()[0])
    assert [line.strip() for line in shown.splitlines()] == lines[start : start + len(shown.splitlines())]


def test_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
