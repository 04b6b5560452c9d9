"""tools/report.py on a real run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forking import REPOSITORY
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.functional.test_resume import unbroken_run
from tests.unit.tools.report.reading import Page


def test_page_of_a_run_has_its_curves_settings_and_texts(workshop: Workshop, tmp_path: Path) -> None:
    save, output = unbroken_run(workshop, 1), tmp_path / "report.html"
    command = [sys.executable, "tools/report.py", str(save), "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = Page(output.read_text(encoding="utf-8"))
    assert not shown.texts.get("li"), "no note on a missing input"
    ((_, points),) = shown.lines["Loss of the objective"].items()
    assert [value for _, value in points] == pytest.approx(launching.losses(save), rel=1e-4)
    rollouts = map(json.loads, (save / "rollouts.jsonl").read_text().splitlines())
    num_rollouts = sum(not rollout["num_guide_tokens"] for rollout in rollouts)
    assert any(row.startswith(f"Rollouts{num_rollouts} in ") for row in shown.rows)
    assert f"Model{workshop.policy}" in shown.rows
    problems = {json.loads(line)["problem"] for line in workshop.sums.read_text().splitlines()}
    assert problems & set(shown.texts["pre"])
    assert any(row.startswith("Parameters") for row in shown.rows), "the exported model's card"
    assert "tokens by ratio × weight × p" in shown.texts["summary"], "the run's cache has the reference"
    assert not [text for text in shown.texts["p"] if "--reference-model" in text]
