"""The numbers of README.md are those of their sources, and it stays short."""

import json
import re
from pathlib import Path

import pytest

from megatron_rasft.tools import cli
from tools import plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = json.loads((ROOT / "tests/unit/examples/slurm_models.json").read_text(encoding="utf-8"))
LARGEST = 64


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its two first lines."""
    section = README.partition(f"## {heading}\n")[2]
    lines = re.findall(r"^\| (.*) \|$", section.partition("\n## ")[0], re.MULTILINE)
    return [line.split(" | ") for line in lines[2:]]


def test_readme_is_short_and_in_order() -> None:
    assert len(README.splitlines()) <= 150
    headings = ["Why", "Status", "Two commands", "Your own data", "First run", "Hardware"]
    assert re.findall(r"^## (.*)$", README, re.MULTILINE)[:6] == headings


def test_measured_accuracies_are_those_of_the_results() -> None:
    document = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    results = document.partition("## Proving ground: the kept worlds")[2].partition("\n## ")[0]
    table = rows("Why")
    assert len(table) >= 5
    for method, *accuracies in table:
        (line,) = re.findall(rf"^\| {re.escape(method)} \|(.*)\|$", results, re.MULTILINE)
        _, *of_worlds, mean, _, greedy, kept = [cell.strip() for cell in line.split("|")]
        assert [*of_worlds, mean, greedy, kept] == accuracies


def fits(folder: Path, num_gpus: int, memory_gib: str) -> bool:
    command = re.findall(r"`tools/plan\.py (--rollout-gpus [^`]*)`", README)[0]
    flags = ["--hf-model", str(folder), "--num-gpus", str(num_gpus), "--gpu-memory-gib", memory_gib, "--json"]
    return cli.run(plan.main, [*flags, *command.split()]) == 0


@pytest.mark.parametrize("row", rows("Hardware"), ids=lambda row: row[0])
def test_smallest_machines_are_those_of_capacity_planning(row: list[str], tmp_path: Path) -> None:
    model, *numbers = row
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model.lower()]), encoding="utf-8")
    memories = re.findall(r"of (\d+) GiB", README.partition("## Hardware")[2].partition("---:")[0])
    for memory_gib, number in zip(memories, numbers, strict=True):
        smallest = 2 * LARGEST if number == "-" else int(number)
        assert number == "-" or fits(tmp_path, smallest, memory_gib)
        assert smallest == 1 or not fits(tmp_path, smallest // 2, memory_gib)
