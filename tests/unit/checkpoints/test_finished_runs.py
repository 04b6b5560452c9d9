"""The next start of a run finds out whether anything is left to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.checkpoints.finished_runs import finished_before
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.monitoring.status import RunStatus


def args_of(save: Path | None, export_hf: Path | None = None, **length: int | None) -> Any:
    values: dict[str, Any] = {"train_iters": 9, "train_samples": None, "global_batch_size": 8, **length}
    return SimpleNamespace(
        save=None if save is None else str(save),
        export_hf=None if export_hf is None else str(export_hf),
        **values,
    )


def write_model(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (folder / name).touch()


def own(save: Path, step: int) -> Resume:
    return Resume(folder=save, step=step, is_own=True)


def test_the_first_start_is_written_down_as_running(tmp_path: Path) -> None:
    assert not finished_before(args_of(tmp_path), Resume())
    assert RunStatus.read(tmp_path) == RunStatus(state="running", num_steps=9)
    assert not finished_before(args_of(None), Resume())


@pytest.mark.parametrize(
    ("state", "step", "length", "is_finished"),
    [
        ("finished", 9, {}, True),
        ("finished", 9, {"train_iters": None, "train_samples": 79}, True),
        ("finished", 9, {"train_iters": 10}, False),
        ("finished", 4, {}, False),  # --ckpt-step 4
        ("running", 9, {}, False),  # killed after the last save: held-out problems may not be measured
        ("stopped", 9, {}, False),
    ],
)
def test_a_run_without_an_export_is_finished_if_it_said_so(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: Any,
    step: int,
    length: dict[str, int | None],
    is_finished: bool,
) -> None:
    RunStatus(state=state, step=9, num_steps=9, save_s=2.0).write(tmp_path)
    assert finished_before(args_of(tmp_path, **length), own(tmp_path, step)) == is_finished
    status = RunStatus.read(tmp_path)
    assert status is not None and status.save_s == 2.0
    assert status.state == ("finished" if is_finished else "running")
    assert capsys.readouterr().out.count("\n") == is_finished


@pytest.mark.parametrize("state", ["running", "finished"])
def test_an_export_that_the_run_has_written_is_its_end(tmp_path: Path, state: Any) -> None:
    """Also if the process was killed between the export and its own end."""
    save, export = tmp_path / "save", tmp_path / "hf"
    save.mkdir()
    RunStatus(state=state, step=9, export_folder=str(export)).write(save)
    assert not finished_before(args_of(save, export), own(save, 9)), (
        "the export was removed, or never completed"
    )
    export.mkdir()
    assert not finished_before(args_of(save, export), own(save, 9)), "a folder of something else"
    write_model(export)
    assert finished_before(args_of(save, export), own(save, 9))
    assert not finished_before(args_of(save, tmp_path / "other"), own(save, 9)), "another one is asked for"


@pytest.mark.parametrize(("step", "length"), [(9, {"train_iters": 12}), (4, {}), (0, {})])
def test_an_export_of_other_steps_is_not_overwritten(
    tmp_path: Path, step: int, length: dict[str, int]
) -> None:
    export = tmp_path / "hf"
    write_model(export)
    before = RunStatus(state="finished", step=9, export_folder=str(export))
    before.write(tmp_path)
    with pytest.raises(ValueError, match="--export-hf"):
        finished_before(args_of(tmp_path, export, **length), own(tmp_path, step))
    assert RunStatus.read(tmp_path) == before


def test_a_checkpoint_of_another_run_does_not_finish_this_one(tmp_path: Path) -> None:
    RunStatus(state="finished", step=9).write(tmp_path)
    assert not finished_before(args_of(tmp_path), Resume(folder=tmp_path, step=9))
