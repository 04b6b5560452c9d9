"""The comparison in its smallest real form: SmolLM2, arithmetic, two objectives, two steps, one command."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.launching import ENVIRONMENT, REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "benchmark_reproduction"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_command_trains_evaluates_and_compares(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLE / "reproduce.py"),
        "--setting",
        str(EXAMPLE / "settings" / "ci.toml"),
    ]
    command += ["--output", str(tmp_path), "--methods", "sft", "rasft"]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=1400, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "comparison.csv").open())}
    assert list(rows) == ["sft", "rasft"]
    assert all(row["steps"] == "2" and row["problems"] == "4" for row in rows.values())
    assert float(rows["sft"]["generated_tokens"]) == 0 < float(rows["rasft"]["generated_tokens"])
    assert float(rows["sft"]["trained_tokens"]) <= float(rows["rasft"]["trained_tokens"])
    assert (tmp_path / "accuracy.png").exists()
    assert not (tmp_path / "sft-seed1" / "model").exists(), "weights are dropped once they are evaluated"

    resumed = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert "training" not in resumed.stdout.partition("#")[0], "what is done is not done again"
    assert "| rasft | arithmetic | 1 |" in resumed.stdout
