"""Folders for temporary files: removed by their process, or after a crash by the next one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft import scratch
from megatron_rasft.verify.programs import confinement
from tests.forking import REPOSITORY


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_removed_when_it_is_closed(parent: Path) -> None:
    made = scratch.ScratchFolder("rasft-test-")
    (made.path / "check" / "deep").mkdir(parents=True)
    (made.path / "check" / "file").touch()
    made.close()
    assert list(parent.iterdir()) == []


HOLDS = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from megatron_rasft.scratch import ScratchFolder
made = ScratchFolder("rasft-test-")
print(made.path, flush=True)
time.sleep(1000)
"""


def test_a_folder_of_a_killed_process_is_removed_by_the_next_and_no_other(parent: Path) -> None:
    (parent / "other").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(parent)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    (left / "check").mkdir()
    scratch.ScratchFolder("rasft-test-").close()
    assert left.is_dir(), "its process is alive"
    holder.kill()
    holder.wait()
    mine = scratch.ScratchFolder("rasft-test-")
    assert sorted(parent.iterdir()) == sorted([parent / "other", mine.path])
    mine.close()


def test_links_and_files_with_the_name_of_a_folder_are_left_alone(parent: Path, tmp_path: Path) -> None:
    (parent / "target").mkdir()
    (parent / "target" / "file").touch()
    own = scratch.ScratchFolder("rasft-test-")
    prefix = own.path.name.rpartition("-")[0]
    (parent / f"{prefix}-link").symlink_to(parent / "target")
    (parent / f"{prefix}-file").touch()
    scratch.ScratchFolder("rasft-test-").close()
    assert (parent / "target" / "file").exists()
    assert (parent / f"{prefix}-file").exists()
    own.close()


def test_folders_of_other_machines_are_left_alone(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file system may show no locks of other machines."""
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    other = scratch.ScratchFolder("rasft-test-")
    os.close(other.lock)
    monkeypatch.setattr("socket.gethostname", lambda: "n2")
    scratch.ScratchFolder("rasft-test-").close()
    assert other.path.is_dir()
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    scratch.ScratchFolder("rasft-test-").close()
    assert not other.path.exists()


# Without capabilities, like an ordinary user, who cannot list a folder without permissions
UNREADABLE = """
import os, sys
from pathlib import Path
from megatron_rasft import scratch
folder = Path(sys.argv[1], "own")
os.makedirs(folder / "a" / "b" / "c")
(folder / "a" / "b" / "file").touch()
(folder / "outside").symlink_to(sys.argv[1])
for name, mode in (("a/b/c", 0), ("a/b", 0o300), ("a", 0o100)):
    (folder / name).chmod(mode)
scratch.remove(folder)
print(folder.exists())
"""


def test_folders_without_permissions_are_removed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, str(tmp_path)],
        cwd=REPOSITORY,
        preexec_fn=confinement.drop_privileges,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr
    assert tmp_path.is_dir()
