"""The plugin counts the CPU seconds of processes that outlive their test. It leaves out processes of earlier tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu_seconds import FOLDER

MEASURED = """
import subprocess, sys

BUSY = "import time\\nwhile time.process_time() < {}: pass"

def test_of_a_child():
    subprocess.run([sys.executable, "-c", BUSY.format(0.4)], start_new_session=True)

def test_of_nothing():
    pass
"""


@pytest.mark.skipif(
    not any(os.access(FOLDER / name, os.W_OK) for name in ("cpuacct", "cgroup.procs")),
    reason="needs permission to make a control group",
)
def test_seconds_of_a_child_count_for_its_test(tmp_path: Path) -> None:
    (tmp_path / "test_measured.py").write_text(MEASURED)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.cpu_seconds",
        "-p",
        "no:cacheprovider",
        "test_measured.py",
    ]
    variables = os.environ | {"PYTHONPATH": str(root), "CPU_SECONDS": str(tmp_path / "seconds")}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("\t") for line in (tmp_path / "seconds").read_text().splitlines()]
    seconds = {name.rpartition("::")[2]: float(value) for value, name in rows}
    assert seconds["test_of_a_child"] >= 0.4 > seconds["test_of_nothing"]
    assert {"collection", "test_of_a_child", "test_of_nothing"} == seconds.keys()
    assert "test_measured.py::test_of_a_child" in done.stdout
