"""The comparison: one command on SmolLM2 with the smallest setting, and every method on a tiny model."""

import csv
import dataclasses
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmark_reproduction import comparison, preloading, reproduce
from tests import forking
from tests.functional.launching import ENVIRONMENT, REPOSITORY
from tests.tiny_policy import write_model, write_sums

EXAMPLE = REPOSITORY / "examples" / "benchmark_reproduction"


def shallow_setting(root: Path, model: Path) -> Path:
    """Writes the smallest setting with another model."""
    setting = (EXAMPLE / "settings" / "ci.toml").read_text(encoding="utf-8")
    whole = 'model = ".cache/smollm2-135m-instruct"\n'
    assert whole in setting
    path = root / "shallow.toml"
    path.write_text(setting.replace(whole, f'model = "{model}"\n'), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_command_trains_evaluates_and_compares(tmp_path: Path, tiny_smollm2: Path) -> None:
    setting = shallow_setting(tmp_path, tiny_smollm2)
    command = [sys.executable, str(EXAMPLE / "reproduce.py"), "--setting", str(setting)]
    command += ["--output", str(tmp_path), "--methods", "sft", "rasft"]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=1400, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "comparison.csv").open())}
    assert list(rows) == ["sft", "rasft"]
    assert all(row["steps"] == "1" and row["problems"] == "4" for row in rows.values())
    assert float(rows["sft"]["generated_tokens"]) == 0 < float(rows["rasft"]["generated_tokens"])
    assert float(rows["sft"]["trained_tokens"]) <= float(rows["rasft"]["trained_tokens"])
    assert (tmp_path / "accuracy.png").exists()
    assert not (tmp_path / "sft-seed1" / "model").exists(), "weights are deleted after their evaluation"

    resumed = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert "training" not in resumed.stdout.partition("#")[0], "finished trainings do not run again"
    assert "| rasft | arithmetic | 1 |" in resumed.stdout


def test_every_method_trains_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preloading, "run_program", forking.run_program)
    setting = reproduce.read_setting(EXAMPLE / "settings" / "ci.toml")
    train, heldout = (str(write_sums(tmp_path / f"{n}.jsonl", n, seed=n)) for n in (4, 3))
    setting = dataclasses.replace(
        setting,
        model=str(write_model(tmp_path / "model", string.printable[:97])),
        train={**setting.train, "--train-data": train, "--heldout-data": heldout, "--verify-num-workers": 1},
        evaluate={**setting.evaluate, "--benchmarks": [f"sums={heldout}"], "--verify-num-workers": 1},
    )
    del setting.train["--data-system-prompt"], setting.evaluate["--system-prompt"]  # no chat template
    tasks, output = reproduce.tasks_of(setting), tmp_path / "out"
    reproduce.run_tasks(setting, tasks, output, keeps_models=False)
    runs = {(task.method, task.seed): output / task.name for task in tasks}
    text = comparison.write_comparison(setting.title, runs, output)
    rows = {row["method"]: row for row in csv.DictReader((output / "comparison.csv").open())}
    assert list(rows) == list(reproduce.METHODS) and "Not finished" not in text
    assert {row["steps"] for row in rows.values()} == {"0", "1"}
    assert {method for method, row in rows.items() if float(row["generated_tokens"])} == {
        "raft", "grpo", "sdft", "rasft", "rasft_published",
    }  # fmt: skip
