"""The test cluster ends with the tests, also if they are killed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forking import REPOSITORY
from tests.slurm import cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "no Slurm"),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_daemon_and_no_folder_outlives_the_tests(number: int) -> None:
    command = [sys.executable, "-m", "tests.slurm.cluster"]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip().partition("=")[2]).parent
    daemons = [process for process, _ in cluster.members(folder)]
    assert len(daemons) >= 6
    holder.send_signal(number)
    holder.wait()
    cluster.wait_for("the end of the daemons", lambda: not [*cluster.members(folder)], 600)
    cluster.wait_for("the end of the folder", lambda: not folder.exists(), 600)
