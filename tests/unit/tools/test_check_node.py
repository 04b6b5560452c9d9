"""tools/check_node.py with a stand-in for nvidia-smi."""

import os
from pathlib import Path

import pytest

from megatron_rasft.tools import cli
from tools import check_node

HEALTHY = "0, 4, 0\n1, 512, [N/A]\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the answer of nvidia-smi, of a node with two GPUs."""
    answer = tmp_path / "answer"
    answer.write_text(HEALTHY)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(check_node, "torch_fault", lambda num_gpus: "")
    monkeypatch.setattr(check_node, "shared_memory_fault", lambda: "")
    return answer


@pytest.mark.parametrize(
    ("answer", "num_gpus", "named"),
    [
        (HEALTHY, 2, ""),
        (HEALTHY, 8, "2 GPUs"),
        ("0, 30000, 0\n1, 4, 0\n", 2, "GPU 0"),
        ("0, 4, 0\n1, 4, 12\n", 2, "GPU 1"),
        ("", 1, "0 GPUs"),
    ],
)
def test_gpus_are_checked(
    smi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str, num_gpus: int, named: str
) -> None:
    smi.write_text(answer)
    code = cli.run(check_node.main, ["--folder", str(tmp_path), "--num-gpus", str(num_gpus)])
    said = capsys.readouterr().out
    assert code == int(bool(named)) and named in said and "node7" in said and said.count("\n") == 1
    assert said.startswith("FAIL" if named else "ok")


def test_node_without_nvidia_smi_is_not_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run(check_node.main, ["--folder", str(tmp_path)]) == 1
    assert "nvidia-smi" in capsys.readouterr().out


def test_folder_that_is_not_shared_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    assert cli.run(check_node.main, ["--folder", str(absent), "--num-gpus", "0"]) == 1
    assert str(absent) in capsys.readouterr().out


def test_small_shared_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_node, "MIN_SHARED_GIB", 1e9)
    assert "/dev/shm" in check_node.shared_memory_fault()
