"""Runs tools/gpu_checking/colocated.py with small programs as server and trainer."""

import sys
from pathlib import Path

import pytest

from tools.gpu_checking import colocated

SERVER = """
import signal, sys, time
from pathlib import Path
def end(*_):
    Path(sys.argv[1]).with_name("ended").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
Path(sys.argv[1]).write_text("http://127.0.0.1:1\\n")
while True:
    time.sleep(0.05)
"""


def python(code: str, file: Path) -> list[str]:
    return [sys.executable, "-c", code, str(file)]


@pytest.mark.parametrize("code", [0, 3])
def test_trainer_runs_beside_the_server_which_is_then_ended(tmp_path: Path, code: int) -> None:
    file = tmp_path / "servers.txt"
    trainer = f"import sys\nassert open(sys.argv[1]).read().startswith('http')\nsys.exit({code})"
    assert colocated.run(python(SERVER, file), python(trainer, file), file) == code
    assert (tmp_path / "ended").exists()


def test_server_that_does_not_start_ends_the_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "servers.txt"
    assert colocated.run(python("raise SystemExit(7)", file), python("", file), file) == 7
    assert "the server ended with 7 before it was ready" in capfd.readouterr().err
