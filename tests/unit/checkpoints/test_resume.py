"""The checkpoint that a run resumes from, decided from tracker files alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.checkpoints.resume import Resume, find_resume
from megatron_rasft.errors import CheckpointError
from megatron_rasft.weights.tracker import TRACKER_FILE


def folder(path: Path, newest: str) -> Path:
    path.mkdir()
    (path / TRACKER_FILE).write_text(newest)
    return path


def found(load: Path | None, save: Path | None, step: int | None = None, *, must: bool = False) -> Resume:
    args: Any = SimpleNamespace(
        load=load and str(load),
        save=save and str(save),
        ckpt_step=step,
        exit_on_missing_checkpoint=must,
    )
    return find_resume(args)


def test_a_run_begins_with_the_models_weights(tmp_path: Path) -> None:
    assert found(None, tmp_path / "save") == Resume()
    assert found(None, None) == Resume()
    assert found(None, tmp_path / "save", 4) == Resume(), "a step of nothing"
    assert Resume().checkpoint is None


def test_another_runs_checkpoint_starts_a_run_that_has_none(tmp_path: Path) -> None:
    load, save = folder(tmp_path / "load", "7"), tmp_path / "save"
    assert found(load, save) == Resume(folder=load, step=7)
    assert found(load, save, 4) == Resume(folder=load, step=4, is_chosen=True)
    assert found(load, save).checkpoint == load / "iter_0000007"


def test_a_run_resumes_from_save_once_it_holds_a_checkpoint(tmp_path: Path) -> None:
    load, save = folder(tmp_path / "load", "7"), folder(tmp_path / "save", "9")
    assert found(None, save) == Resume(folder=save, step=9, is_own=True)
    assert found(load, save, 4) == Resume(folder=save, step=9, is_own=True), "the step is one of --load"
    for own in (save, save / ".." / "save"):
        assert found(own, save, 4) == Resume(folder=save, step=4, is_own=True, is_chosen=True)


def test_converted_weights_stay_the_reference_of_a_resumed_run(tmp_path: Path) -> None:
    load, save = folder(tmp_path / "load", "release"), tmp_path / "save"
    assert found(load, save) == Resume(converted=load / "release")
    folder(save, "9")
    assert found(load, save) == Resume(folder=save, step=9, is_own=True, converted=load / "release")


def test_a_folder_to_load_that_holds_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for save in (None, folder(tmp_path / "save", "9"), tmp_path / "other"):
        with pytest.raises(ValueError, match=r"--load .*typo"):
            found(tmp_path / "typo", save)


def test_exit_on_missing_checkpoint_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--exit-on-missing-checkpoint"):
        found(None, tmp_path / "save", must=True)
    found(folder(tmp_path / "converted", "release"), tmp_path / "save", must=True)
    found(None, folder(tmp_path / "save", "9"), must=True)


@pytest.mark.parametrize("text", ["soon", "", "-3", "release"])
def test_a_save_folder_without_a_step_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "save")):
        found(None, folder(tmp_path / "save", text))


def test_a_damaged_load_folder_is_refused_although_the_run_has_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "load" / TRACKER_FILE)):
        found(folder(tmp_path / "load", "soon"), folder(tmp_path / "save", "9"))
