"""A run whose rollouts are graded by a function of the user: rewards, resuming, changed code, and faults before the model is built."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.rollout.store import read_rollouts
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.functional.launching import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "own_verifier" / "json_exact.py"
PARTIAL = """
import json_exact

def near(row, response):
    is_exact, reason = json_exact.grade(row, response)
    return (1.0 if is_exact else 0.5 if response.endswith("0") else 0.0), reason
"""


@pytest.fixture(scope="module")
def rows(workshop: Workshop) -> Path:
    """The sums, with their answers as a field that only the function knows."""
    path = workshop.root / "wanted.jsonl"
    sums: list[dict[str, Any]] = [json.loads(line) for line in workshop.sums.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**row, "wanted": int(row.pop("answer"))}) + "\n" for row in sums[:16])
    )
    return path


def test_example_grades_a_run_and_changed_code_is_said_when_it_resumes(
    workshop: Workshop, rows: Path
) -> None:
    folder = workshop.root / "own-function"
    folder.mkdir()
    function = Path(shutil.copy(EXAMPLE, folder))
    partial = folder / "partial.py"
    partial.write_text(PARTIAL)
    save = folder / "save"
    flags = [*workshop.flags(data=rows), "--save", str(save), "--rasft-refresh-interval", "1"]
    flags += ["--verify-function", f"{partial}:near"]

    first = launching.succeed(folder / "first", [*flags, "--exit-interval", "1"])
    assert "partial.py:near, first demonstration: correct" in first.output
    rollouts = list(read_rollouts(save / "rollouts.jsonl"))
    assert len(rollouts) == 8 * 4
    wanted = {row["id"]: row["wanted"] for row in map(json.loads, rows.read_text().splitlines())}
    assert {r.reward for r in rollouts} == {0.0, 0.5, 1.0}
    for rollout in rollouts:
        last = rollout.text.rpartition("=")[2]
        assert (rollout.verdict == "correct") == (rollout.reward == 1.0) or rollout.finish_reason == "length"
        if last.isdigit() and rollout.finish_reason == "stop" and not last.startswith("0"):
            assert (rollout.reward == 1.0) == (int(last) == wanted[rollout.problem_id])
        assert rollout.weight <= 0 or rollout.reward == 1.0, "only a full reward is trained on"
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    (mean,) = {r["verify/reward_mean"] for r in records if "verify/reward_mean" in r}
    graded = [r.reward for r in rollouts if r.reward is not None]
    assert mean == pytest.approx(sum(graded) / len(graded))

    partial.write_text(PARTIAL + "\n# edited")
    second = launching.succeed(folder / "second", flags)
    assert "code of --verify-function has changed" in second.output
    assert len(list(read_rollouts(save / "rollouts.jsonl"))) == 16 * 4
    assert function.is_file()


def test_faulty_function_ends_a_run_before_the_model_is_built(workshop: Workshop, rows: Path) -> None:
    faulty = workshop.root / "faulty.py"
    faulty.write_text("def grade(row, response): return row['absent']")
    save = workshop.root / "faulty-save"
    flags = [*workshop.flags(data=rows), "--save", str(save), "--verify-function", f"{faulty}:grade"]
    outcome = launching.run(workshop.root / "faulty-logs", flags)
    assert outcome.codes != [0]
    assert "--verify-function" in outcome.output and "KeyError: 'absent' (faulty.py:1)" in outcome.output
    assert "Traceback" not in outcome.output
    assert not (save / "metrics.jsonl").exists()
