"""What a running check is seen to use."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rasft.verify.programs.usage import Watcher
from tests.unit.verify.programs.hostile_programs import MOVES_FOLDERS


def test_moving_folders_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rasft.verify.programs.usage._STOPS_EVERY_S", -1.0)
    monkeypatch.setattr("megatron_rasft.verify.programs.usage._MAX_WAIT_FOR_STOP_S", 600.0)
    program = MOVES_FOLDERS.replace("while True:", "print('moves', flush=True)\nwhile True:")
    mover = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert mover.stdout is not None
        mover.stdout.readline()
        # 20 MiB in 40 files and 12 folders
        assert Watcher([mover.pid, 0], tmp_path, 2**24).find_excess()
        assert Watcher([mover.pid, 0], tmp_path, 2**25).find_excess() == ""
        deadline = time.monotonic() + 600
        while psutil.Process(mover.pid).status() == psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, "it was not continued"
    finally:
        mover.kill()
        mover.wait()
