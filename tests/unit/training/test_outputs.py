"""A run that starts or goes on leaves in its files what belongs to it, and nothing twice."""

from pathlib import Path

import pytest

from megatron_rasft.errors import CheckpointError
from megatron_rasft.training.outputs import AppendedFile


def a_file(path: Path, text: str, *, is_named: bool = False, may_be_shorter: bool = False) -> AppendedFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return AppendedFile(path=path, flag="--rollout-store", is_named=is_named, may_be_shorter=may_be_shorter)


@pytest.mark.parametrize("is_named", [False, True])
def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path, is_named: bool) -> None:
    file = a_file(tmp_path / "rollouts.jsonl", "1\n2\n", is_named=is_named)
    mark = file.mark()
    file.path.write_text("1\n2\n3\n4")
    assert file.take_up(mark, tmp_path, is_first=False) == ""
    assert file.path.read_text() == "1\n2\n"


def test_a_file_in_a_folder_that_was_moved_is_still_the_checkpoints(tmp_path: Path) -> None:
    mark = a_file(tmp_path / "old" / "rollouts.jsonl", "1\n").mark()
    (tmp_path / "old").rename(tmp_path / "new")
    file = a_file(tmp_path / "new" / "rollouts.jsonl", "1\n2\n")
    file.take_up(mark, tmp_path / "new", is_first=False)
    assert file.path.read_text() == "1\n"


def test_a_file_shorter_than_at_its_checkpoint_is_refused_where_all_lines_count(tmp_path: Path) -> None:
    file = a_file(tmp_path / "rollouts.jsonl", "1\n2\n")
    mark = file.mark()
    file.path.write_text("1\n2")
    with pytest.raises(CheckpointError, match=r"has 3 bytes.* had 4: .*--rollout-store"):
        file.take_up(mark, tmp_path, is_first=False)
    assert file.path.read_text() == "1\n2", "the user may still mend it"
    file.may_be_shorter = True
    file.take_up(mark, tmp_path, is_first=False)
    assert file.path.read_text() == "1\n"


@pytest.mark.parametrize("length", [0, 1, 2**16 - 2, 2**16, 3 * 2**16])
def test_another_file_than_the_checkpoints_loses_only_an_unfinished_line(tmp_path: Path, length: int) -> None:
    mark = a_file(tmp_path / "first" / "rollouts.jsonl", "1\n").mark()
    file = a_file(tmp_path / "second.jsonl", "1\n22\n" + "3" * length, is_named=True)
    assert file.take_up(mark, tmp_path / "first", is_first=True) == ""
    assert file.path.read_text() == "1\n22\n"


def test_only_the_runs_own_file_is_started_anew_and_only_before_the_first_checkpoint(tmp_path: Path) -> None:
    own = a_file(tmp_path / "save" / "rollouts.jsonl", "1\n2")
    assert own.take_up(None, tmp_path / "save", is_first=False) == ""
    assert own.path.read_text() == "1\n"
    assert f"{own.path} is started anew" in own.take_up(None, tmp_path / "save", is_first=True)
    assert own.path.read_text() == ""
    assert own.take_up(None, tmp_path / "save", is_first=True) == ""
    own.path.unlink()
    assert own.take_up(None, None, is_first=True) == ""
    named = a_file(tmp_path / "named.jsonl", "1\n2\n", is_named=True)
    assert named.take_up(None, None, is_first=True) == ""
    assert named.path.read_text() == "1\n2\n"
