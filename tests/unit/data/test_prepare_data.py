"""tools/prepare_data.py with the arguments of a user, called in the process of the tests."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"
GOOD = {"problem": "1+1?", "response": "It is \\boxed{2}.", "answer": "2"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer_folder(tokenizer: Any, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_validate_accepts_good_rows(
    tool: ModuleType, write_rows: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main(["validate", "--train-data", write_rows(GOOD, GOOD)]) == 0
    assert "rows            2" in capsys.readouterr().out


def test_validate_names_faults_and_fails(
    tool: ModuleType, write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, *["{"] * 12, *[{**GOOD, "response": "long " * 500}] * 12)
    assert tool.main(["validate", "--train-data", path]) == 1
    command = ["validate", "--train-data", path, "--tokenizer", tokenizer_folder, "--max-tokens", "200"]
    assert tool.main(command) == 1
    printed = capsys.readouterr().out
    for line in range(2, 14):
        assert printed.count(f"{path}:{line}: not JSON") == 2
        assert f"{path}:{line + 12}: longer than 200 tokens" in printed


def test_overlong_rows_fail_only_where_they_are_refused(
    tool: ModuleType, write_rows: Callable, tokenizer_folder: str
) -> None:
    path = write_rows(GOOD, {**GOOD, "response": "long " * 500})
    command = ["validate", "--train-data", path, "--tokenizer", tokenizer_folder, "--max-tokens", "200"]
    assert tool.main(command) == 0
    assert tool.main([*command, "--data-overlong", "refuse"]) == 1


def test_inspect_prints_one_row_plainly_when_not_on_a_terminal(
    tool: ModuleType, write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, "{", {**GOOD, "problem": "the [bold]second[/bold]", "id": "x"})
    assert tool.main(["inspect", "--train-data", path, "--tokenizer", tokenizer_folder, "--index", "1"]) == 0
    printed = capsys.readouterr().out
    assert "the [bold]second[/bold]" in printed and "It is \\boxed{2}.<|im_end|>" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "--train-data"),
        (["validate", "--train-data", "gone.jsonl"], "does not exist"),
        (["validate", "--train-data", "rows.csv"], "--train-data must be"),
        (["validate", "--train-data", "gone.jsonl", "--data-epochs", "0"], "--data-epochs must be >= 1"),
        (["validate", "--train-data", "gone.jsonl", "--max-tokens", "5"], "--tokenizer"),
        (["inspect", "--train-data", "gone.jsonl"], "--tokenizer"),
        (["inspect", "--train-data", "ROWS", "--tokenizer", "MODEL", "--index", "5"], "no usable row 5"),
        (
            ["inspect", "--train-data", "ROWS", "--tokenizer", "MODEL", "--index", "-1"],
            "--index must be >= 0",
        ),
        (["validate", "--train-data", "ROWS", "--tokenizer", "gone"], "--tokenizer must be a folder"),
        (["validate", "--train-data", "ROWS", "--tokenizer", "EMPTY"], "holds no tokenizer"),
    ],
)
def test_mistake_is_one_line(
    tool: ModuleType,
    write_rows: Callable,
    tokenizer_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    stand_ins = {"ROWS": write_rows(GOOD), "MODEL": tokenizer_folder, "EMPTY": str(tmp_path / "empty")}
    assert tool.main([stand_ins.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_every_field_is_a_flag_with_help(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["inspect", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in fields(DataConfig):
        assert f"--{field.name.replace('_', '-')} " in printed


def test_runs_as_a_script_from_any_folder(write_rows: Callable, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "validate", "--train-data", write_rows(GOOD, "{")]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not JSON" in done.stdout and "Traceback" not in done.stderr
