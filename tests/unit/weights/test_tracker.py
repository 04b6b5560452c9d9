"""The tracker file names a step or converted weights."""

from pathlib import Path

import pytest

from megatron_rasft.errors import CheckpointError
from megatron_rasft.weights.tracker import (
    TRACKER_FILE,
    has_checkpoint,
    is_converted,
    newest_step,
    step_folder,
)


def test_a_folder_without_a_tracker_file_has_no_checkpoint(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path) and not is_converted(tmp_path)
    assert not has_checkpoint(None) and not has_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "step", "folder"), [("120\n", 120, "iter_0000120"), (" release", None, "release")]
)
def test_the_newest_checkpoint_is_found(tmp_path: Path, text: str, step: int | None, folder: str) -> None:
    (tmp_path / TRACKER_FILE).write_text(text)
    assert has_checkpoint(tmp_path)
    assert newest_step(tmp_path) == step
    assert is_converted(tmp_path) == (step is None)
    assert step_folder(tmp_path, step) == tmp_path / folder


@pytest.mark.parametrize("content", [b"soon", b"", b"-1", b"\xff"])
def test_a_damaged_tracker_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TRACKER_FILE).write_bytes(content)
    for read in (newest_step, is_converted):
        with pytest.raises(CheckpointError, match=TRACKER_FILE):
            read(tmp_path)
