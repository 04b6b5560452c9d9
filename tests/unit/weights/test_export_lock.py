"""One run at a time may export to a folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.weights import export_lock
from megatron_rasft.weights.export_lock import ExportLock
from tests.forking import REPOSITORY

HOLDER = """
import sys, time
from pathlib import Path
from megatron_rasft.weights.export_lock import ExportLock
lock = ExportLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_lock, "_PATIENCE_S", 0.0)


def test_second_run_is_refused_with_process_and_host_of_the_first(tmp_path: Path) -> None:
    lock = ExportLock(tmp_path / "hf")
    with pytest.raises(ValueError, match="--export-hf") as refusal:
        ExportLock(tmp_path / "hf")
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refusal.value)
    ExportLock(tmp_path / "other").release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    ExportLock(tmp_path / "hf").release()


def test_lock_of_a_killed_run_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "hf")]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} "):
        ExportLock(tmp_path / "hf")
    holder.kill()
    monkeypatch.setattr(export_lock, "_PATIENCE_S", 60.0)
    ExportLock(tmp_path / "hf").release()


def test_job_that_slurm_requeues_takes_the_lock_of_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a network file system kept the lock of a machine that is gone."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = ExportLock(tmp_path / "hf")
    with pytest.raises(ValueError, match="--export-hf"):
        ExportLock(tmp_path / "hf")  # a second step of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = ExportLock(tmp_path / "hf")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(ValueError, match="--export-hf"):
        ExportLock(tmp_path / "hf")
    first.release()
    second.release()
