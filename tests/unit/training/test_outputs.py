"""A run that starts or resumes truncates its files to the lines that belong to it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.config import RunConfig
from megatron_rasft.errors import CheckpointError
from megatron_rasft.training.outputs import AppendedFile, check_outputs, cut_files, kept_nothing
from megatron_rasft.weights import export_lock
from tests.unit.training.stand_ins import config_of


def a_file(path: Path, text: str, *, is_named: bool = False, may_be_shorter: bool = False) -> AppendedFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return AppendedFile(path=path, flag="--rollout-store", is_named=is_named, may_be_shorter=may_be_shorter)


def cut(
    file: AppendedFile,
    mark: dict[str, Any] | None = None,
    load: Path | None = None,
    save: Path | None = None,
) -> list[str]:
    return cut_files({"file": file}, {} if mark is None else {"file": mark}, load, save)


@pytest.mark.parametrize("is_named", [False, True])
def test_lines_behind_the_checkpoint_are_cut_off(tmp_path: Path, is_named: bool) -> None:
    file = a_file(tmp_path / "rollouts.jsonl", "1\n2\n", is_named=is_named)
    mark = file.mark()
    file.path.write_text("1\n2\n3\n4")
    assert cut(file, mark, tmp_path) == []
    assert file.path.read_text() == "1\n2\n"


def test_a_file_in_a_moved_folder_is_recognized(tmp_path: Path) -> None:
    mark = a_file(tmp_path / "old" / "rollouts.jsonl", "1\n").mark()
    (tmp_path / "old").rename(tmp_path / "new")
    file = a_file(tmp_path / "new" / "rollouts.jsonl", "1\n2\n")
    cut(file, mark, tmp_path / "new")
    assert file.path.read_text() == "1\n"


def test_a_file_shorter_than_at_its_checkpoint_is_refused_if_all_lines_count(tmp_path: Path) -> None:
    file = a_file(tmp_path / "rollouts.jsonl", "1\n2\n")
    mark = file.mark()
    file.path.write_text("1\n2")
    with pytest.raises(CheckpointError, match=r"rollouts.jsonl .*3 .*4 .*--rollout-store"):
        cut(file, mark, tmp_path)
    assert file.path.read_text() == "1\n2", "the user can still repair it"
    file.may_be_shorter = True
    cut(file, mark, tmp_path)
    assert file.path.read_text() == "1\n"


@pytest.mark.parametrize("length", [0, 1, 2**16 - 2, 2**16, 3 * 2**16])
def test_a_file_that_the_checkpoint_does_not_know_loses_only_an_unfinished_line(
    tmp_path: Path, length: int
) -> None:
    mark = a_file(tmp_path / "first" / "rollouts.jsonl", "1\n").mark()
    file = a_file(tmp_path / "second.jsonl", "1\n22\n" + "3" * length, is_named=True)
    assert cut(file, mark, tmp_path / "first", tmp_path / "first") == []
    assert file.path.read_text() == "1\n22\n"


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("loads", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_cuts_its_lines(
    tmp_path: Path, is_named: bool, loads: bool
) -> None:
    save = tmp_path / "save"
    own, before = (
        (tmp_path / "named.jsonl", "of another run\n") if is_named else (save / "rollouts.jsonl", "")
    )
    file = a_file(own, before, is_named=is_named)
    save.mkdir(exist_ok=True)
    other = (a_file(tmp_path / "other" / "rollouts.jsonl", "1\n").mark(), tmp_path / "other") if loads else ()
    assert cut(file, *other, save=save) == []
    for _ in range(2):
        own.write_text(before + "1\n2")
        (line,) = cut(file, *other, save=save)
        assert str(own) in line and str(len(before)) in line
        assert own.read_text() == before
    own.unlink()
    assert cut(file, *other, save=save) == [], "the user may have moved it away"
    own.write_text("1\n")
    (save / "latest_checkpointed_iteration.txt").write_text("1")
    assert cut(file, file.mark(), save, save) == []
    assert own.read_text() == "1\n", "with a checkpoint its mark counts"


def test_a_named_file_is_appended_to_without_a_run_folder(tmp_path: Path) -> None:
    file = a_file(tmp_path / "named.jsonl", "1\n2\n3", is_named=True)
    for _ in range(2):
        assert cut(file) == []
        assert file.path.read_text() == "1\n2\n"


def test_second_run_with_the_same_export_folder_leaves_the_first_ones_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_lock, "_PATIENCE_S", 0.0)
    args = SimpleNamespace(save=None, export_hf=str(tmp_path / "hf"))
    config = config_of(run=RunConfig(export_hf=args.export_hf))
    check_outputs(args, config)
    partial = tmp_path / ".hf.partial-1a2b"
    partial.mkdir()
    with pytest.raises(ValueError, match="--export-hf"):
        check_outputs(args, config)
    assert partial.exists()


def test_a_run_that_keeps_nothing_is_warned_about() -> None:
    line = kept_nothing(SimpleNamespace(save=None, export_hf=None))
    assert line.startswith("warning") and "--save" in line and "--export-hf" in line
    assert not kept_nothing(SimpleNamespace(save="runs", export_hf=None))
    assert not kept_nothing(SimpleNamespace(save=None, export_hf="hf"))
