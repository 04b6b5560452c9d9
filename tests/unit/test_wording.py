"""Numbers in messages agree with their nouns, and no message leaves the choice to the reader."""

import re
from pathlib import Path

import pytest

from megatron_rasft.wording import counted, size_text

ROOT = Path(__file__).resolve().parents[2]
UNDECIDED = re.compile(r"\}[\w /-]* [a-z]+\((s|es)\)|[a-z]\(es\)\"")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "step"), "1 step"),
        ((0, "step"), "0 steps"),
        ((2, "GPU process", "GPU processes"), "2 GPU processes"),
        ((12345, "row", "", ","), "12,345 rows"),
        ((1.0, "epoch", "", ".2f"), "1.00 epoch"),
    ],
)
def test_a_number_has_the_right_form_of_its_noun(arguments: tuple[float, str], text: str) -> None:
    assert counted(*arguments) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0"), (500, "0.5 KiB"), (40 * 2**10, "40.0 KiB"), (2**20 / 10, "0.1 MiB"), (3 * 2**29, "1.5 GiB")],
)
def test_a_size_has_a_unit_that_leaves_a_digit(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


def test_no_message_has_a_plural_in_brackets() -> None:
    files = [
        ROOT / "pretrain_rasft.py",
        *(ROOT / "megatron_rasft").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
    ]
    lines = ((path, line) for path in files for line in path.read_text(encoding="utf-8").splitlines())
    found = [f"{path.name}: {line.strip()}" for path, line in lines if UNDECIDED.search(line)]
    assert not found, "use megatron_rasft.wording.counted"
