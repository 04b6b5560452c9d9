"""A run leaves no temporary files: its end removes them, or the start of the next run if it is killed."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import process, util
from pathlib import Path

import pytest

from megatron_rasft import scratch


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files: a short path, because those of sockets are limited."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def forked(work: Callable[[], None]) -> None:
    """Calls ``work`` in a forked process and waits for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def begin() -> None:
    """The start of a run, some of its temporary files, and a check of where they are."""
    # What earlier tests have left in this process.
    util._finalizer_registry.clear()
    process.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    before = Path(tempfile.gettempdir())
    scratch.use_own_folder()
    own = Path(os.environ["TMPDIR"])
    for folder in (util.get_temp_dir(), tempfile.mkdtemp(suffix="wandb-media")):
        assert Path(folder).parent == own
    kernels = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert own.parent == kernels.parent == before
    (before / "began").touch()


def begin_and_end() -> None:
    begin()
    util._run_finalizers()  # as at the end of the interpreter


def begin_and_be_killed() -> None:
    begin()
    os.kill(os.getpid(), signal.SIGKILL)


def test_files_of_a_killed_run_are_removed_by_the_next(place: Path) -> None:
    forked(begin_and_be_killed)
    (left,) = place.glob("rasft-run-*")
    assert len(list(left.iterdir())) == 2
    (place / "rasft-rows-of-another").mkdir()
    (place / "began").unlink()
    forked(begin_and_end)
    assert {path.name for path in place.iterdir()} == {"began", "rasft-rows-of-another"}


def test_no_folder_is_made_where_sockets_in_it_would_have_too_long_paths(place: Path) -> None:
    long = place / ("long" * 12)
    long.mkdir()
    tempfile.tempdir = str(long)
    scratch.use_own_folder()
    assert os.environ["TMPDIR"] == str(place) and not list(long.iterdir())
