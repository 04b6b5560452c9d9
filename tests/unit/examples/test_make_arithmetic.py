import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart.make_arithmetic import KINDS, make_task

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "make_arithmetic.py"


def value(written: str) -> int:
    """Returns the value of a sum or a product, calculated without the code under test."""
    numbers = [int(number) for number in re.findall(r"\d+", written)]
    return sum(numbers) if "+" in written else numbers[0] * numbers[1]


def operands(row: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    return row["id"].split("-")[0], tuple(sorted(re.findall(r"\d+", row["problem"])))


@pytest.mark.parametrize("seed", [0, 1, 1234])
@pytest.mark.parametrize(("num_train", "num_heldout"), [(320, 100), (5, 5), (4000, 1200)])
def test_every_row_is_right_and_held_out_problems_are_new(
    seed: int, num_train: int, num_heldout: int
) -> None:
    train, heldout = make_task(KINDS, num_train, num_heldout, seed)
    assert (len(train), len(heldout)) == (num_train, num_heldout)
    for row in train + heldout:
        assert row["answer"] == str(value(row["problem"]))
        steps, boxed = row["response"].split(". \\boxed")
        assert boxed == "{" + row["answer"] + "}"
        equations = steps.split(". ")
        assert all(str(value(left)) == right for left, right in (step.split(" = ") for step in equations))
        assert equations[-1].endswith(f" = {row['answer']}")
    assert len({row["id"] for row in train + heldout}) == num_train + num_heldout
    assert not set(map(operands, train)) & set(map(operands, heldout))


def test_kinds_are_mixed_evenly_while_they_last() -> None:
    train, heldout = make_task(KINDS, 300, 50, 0)
    for rows, count in ((train, 60), (heldout, 10)):
        assert {kind: sum(operands(row)[0] == kind for row in rows) for kind in KINDS} == dict.fromkeys(
            KINDS, count
        )


def test_same_flags_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([sys.executable, SCRIPT, "--output", tmp_path / name, "--num-train", "20"], check=True)
    for file in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert set(json.loads((tmp_path / "one" / "train.jsonl").read_text().splitlines()[0])) == {
        "id", "problem", "response", "answer",
    }  # fmt: skip


@pytest.mark.parametrize("flags", [["--num-train", "0"], ["--num-heldout", "100000"], ["--kinds", "div"]])
def test_wrong_flags_are_refused_by_name(tmp_path: Path, flags: list[str]) -> None:
    command = [sys.executable, SCRIPT, "--output", tmp_path, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert flags[0] in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
