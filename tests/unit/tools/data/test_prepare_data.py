"""tools/prepare_data.py, called with the arguments of a command line."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig
from tools import prepare_data

TOOL = Path(__file__).resolve().parents[4] / "tools" / "prepare_data.py"
GOOD = {"problem": "1+1?", "response": "It is \\boxed{2}.", "answer": "2"}


@pytest.fixture
def tokenizer_folder(tokenizer: Any, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_validate_accepts_good_rows(write_rows: Callable, capsys: pytest.CaptureFixture) -> None:
    assert prepare_data.main(["validate", "--train-data", write_rows(GOOD, GOOD)]) == 0
    assert "rows            2" in capsys.readouterr().out


def test_validate_names_faults_and_fails(
    write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, *["{"] * 12, *[{**GOOD, "response": "long " * 500}] * 12)
    assert prepare_data.main(["validate", "--train-data", path]) == 1
    command = ["validate", "--train-data", path, "--tokenizer", tokenizer_folder, "--max-tokens", "200"]
    assert prepare_data.main(command) == 1
    printed = capsys.readouterr().out
    for line in range(2, 14):
        assert printed.count(f"{path}:{line}: not JSON") == 2
        assert f"{path}:{line + 12}: longer than 200 tokens" in printed


def test_overlong_rows_fail_only_where_they_are_refused(write_rows: Callable, tokenizer_folder: str) -> None:
    path = write_rows(GOOD, {**GOOD, "response": "long " * 500})
    command = ["validate", "--train-data", path, "--tokenizer", tokenizer_folder, "--max-tokens", "200"]
    assert prepare_data.main(command) == 0
    assert prepare_data.main([*command, "--data-overlong", "refuse"]) == 1


def test_inspect_prints_one_row_plainly_when_not_on_a_terminal(
    write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, "{", {**GOOD, "problem": "the [bold]second[/bold]", "id": "x"})
    assert (
        prepare_data.main(["inspect", "--train-data", path, "--tokenizer", tokenizer_folder, "--index", "1"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "the [bold]second[/bold]" in printed and "It is \\boxed{2}.<|im_end|>" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("arguments", "cause", "exit_code"),
    [
        (["validate"], "--train-data", 2),
        (["validate", "--train-data", "gone.jsonl"], "gone.jsonl", 1),
        (["validate", "--train-data", "rows.csv"], "--train-data", 2),
        (["validate", "--train-data", "gone.jsonl", "--data-epochs", "0"], "--data-epochs", 2),
        (["validate", "--train-data", "gone.jsonl", "--max-tokens", "5"], "--tokenizer", 2),
        (["inspect", "--train-data", "gone.jsonl"], "--tokenizer", 2),
        (["inspect", "--train-data", "ROWS", "--tokenizer", "MODEL", "--index", "5"], "--index 5", 1),
        (["inspect", "--train-data", "ROWS", "--tokenizer", "MODEL", "--index", "-1"], "--index", 2),
        (["validate", "--train-data", "ROWS", "--tokenizer", "gone"], "--tokenizer", 2),
        (["validate", "--train-data", "ROWS", "--tokenizer", "EMPTY"], "--tokenizer", 2),
    ],
)
def test_error_is_one_line(
    write_rows: Callable,
    tokenizer_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    cause: str,
    exit_code: int,
) -> None:
    (tmp_path / "empty").mkdir()
    stand_ins = {"ROWS": write_rows(GOOD), "MODEL": tokenizer_folder, "EMPTY": str(tmp_path / "empty")}
    assert prepare_data.main([stand_ins.get(argument, argument) for argument in arguments]) == exit_code
    error = capsys.readouterr().err.strip()
    assert cause in error and len(error.splitlines()) == 1


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["inspect", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in fields(DataConfig):
        assert f"--{field.name.replace('_', '-')} " in printed


def test_runs_as_a_script_from_any_folder(write_rows: Callable, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "validate", "--train-data", write_rows(GOOD, "{")]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not JSON" in done.stdout and "Traceback" not in done.stderr
