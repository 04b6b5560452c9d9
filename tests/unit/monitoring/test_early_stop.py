"""SIGTERM before the run handles it."""

import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import os, signal
from megatron_rasft.monitoring import early_stop
signal.signal(signal.SIGTERM, signal.{before})
early_stop.remember()
os.kill(os.getpid(), signal.SIGTERM)
raise SystemExit(int(early_stop.has_come()))
"""


@pytest.mark.parametrize(("before", "code"), [("SIG_IGN", 1), ("SIG_DFL", -signal.SIGTERM)])
def test_sigterm_is_remembered_where_it_was_ignored(before: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM.format(before=before)], check=False)
    assert done.returncode == code
