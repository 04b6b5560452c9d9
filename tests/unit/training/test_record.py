"""The files and lines of a run: where they are written, and where a resumed run truncates them."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.config import RasftConfig, RolloutConfig, RunConfig
from megatron_rasft.errors import CheckpointError, RasftError
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.training.record import RunRecord
from tests.unit.training.stand_ins import config_of


def record_of(save: Path | None, config: RasftConfig | None = None, **changes: Any) -> RunRecord:
    args = SimpleNamespace(save=None if save is None else str(save), train_iters=8, given_values={})
    return RunRecord(args, config or RasftConfig(), **{"is_rank_zero": True} | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_without_a_folder_writes_no_file() -> None:
    record = record_of(None)
    record.open_files({}, None)
    record.add_step(1, {"x": 1.0})
    assert record.rollouts_path is None and record.file_marks == {}


def test_steps_and_refreshes_are_appended_and_the_flags_are_written(tmp_path: Path) -> None:
    record = record_of(tmp_path / "save")
    record.open_files({}, None)
    record.add_refresh(0, {"y": 2.0}, "a refresh")
    record.add_step(1, {"x": 1.0})
    assert [(line["event"], line["step"]) for line in lines(tmp_path / "save/metrics.jsonl")] == [
        ("refresh", 0),
        ("step", 1),
    ]
    config = json.loads((tmp_path / "save/config.json").read_text())
    assert config["megatron"]["train_iters"] == "8"
    assert config["rasft"]["run"] == vars(RunConfig())


def test_marks_are_those_of_the_last_step(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    record.open_files({}, None)
    record.add_step(1, {"x": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    record.add_refresh(1, {"y": 2.0}, "a refresh")
    assert record.file_marks["metrics"] == {"path": "metrics.jsonl", "size": size}
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    resumed = record_of(tmp_path)
    resumed.open_files(record.file_marks, tmp_path)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1], "the refresh is made again"
    assert resumed.file_marks["metrics"]["size"] == size


def test_rollouts_that_are_missing_since_the_checkpoint_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text('{"a": 1}\n')
    record = record_of(tmp_path)
    assert record.rollouts_path == tmp_path / "rollouts.jsonl"
    record.open_files({}, None)
    RolloutStore(tmp_path / "rollouts.jsonl").truncate(0)
    with pytest.raises(CheckpointError, match=r"rollouts\.jsonl.*--rollout-store"):
        record_of(tmp_path).open_files(record.file_marks, tmp_path)


def test_a_run_that_replays_stores_no_rollouts(tmp_path: Path) -> None:
    rollout = RolloutConfig(rollout_engine="replay", rollout_replay=["old.jsonl"])
    assert record_of(tmp_path, config_of(rollout=rollout)).rollouts_path is None


def test_other_ranks_write_to_their_trackers_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[int] = []
    wandb = SimpleNamespace(log=lambda values, step: logged.append(step), finish=lambda code: None)
    record = record_of(tmp_path / "save", is_rank_zero=False, wandb=wandb)
    record.say("hello")
    record.add_step(3, {"x": 1.0})
    assert logged[0] == 3
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "save").exists() and record.file_marks == {}


def test_a_full_disk_is_an_error_that_names_the_flag() -> None:
    record = record_of(None, config_of(run=RunConfig(rasft_metrics="/dev/full")))
    with pytest.raises(RasftError, match="--rasft-metrics"):
        record.add_step(1, {"x": 1.0})


@pytest.mark.parametrize(("is_clean", "code"), [(True, 0), (False, 1)])
def test_weights_and_biases_gets_the_runs_exit_code(is_clean: bool, code: int) -> None:
    codes: list[int] = []
    wandb = SimpleNamespace(finish=codes.append)
    record_of(None, wandb=wandb).close(is_clean=is_clean)
    assert codes == [code]


def test_a_resumed_run_says_which_flags_have_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, resume = record_of(tmp_path), Resume(folder=tmp_path, step=3, is_own=True)
    first.open_files({}, None)
    in_checkpoint = asdict(first.configuration)
    config = RasftConfig(rollout=RolloutConfig(rollout_num_samples=9))
    for before in (None, in_checkpoint):
        record_of(tmp_path).say_changes(resume, before)
        assert capsys.readouterr().out == ""
        record_of(tmp_path, config).say_changes(resume, before)
        assert capsys.readouterr().out == "changed since step 3: --rollout-num-samples 4 -> 9\n"
    # A start that ended before its first checkpoint has replaced config.json.
    record_of(tmp_path, config).open_files({}, tmp_path)
    record_of(tmp_path, config).say_changes(resume, in_checkpoint)
    assert "--rollout-num-samples 4 -> 9" in capsys.readouterr().out
    newer = {**in_checkpoint, "machine": {"gpus": 8}}
    newer["rasft"] = {**newer["rasft"], "sync": {**newer["rasft"]["sync"], "sync_colour": "red"}}
    record_of(tmp_path).say_changes(resume, newer)
    printed = capsys.readouterr().out
    assert printed.startswith("warning: ") and "--sync-colour red" in printed and printed.count("\n") == 1
    older = {**in_checkpoint, "rasft": {**in_checkpoint["rasft"], "rollout": {}}}
    record_of(tmp_path).say_changes(resume, older)
    assert capsys.readouterr().out == "", "a flag that was not saved had its default"
    record_of(tmp_path, config).say_changes(resume, older)
    assert capsys.readouterr().out == "changed since step 3: --rollout-num-samples 4 -> 9\n"
    record_of(tmp_path).say_changes(resume, {"rasft": in_checkpoint["rasft"]})
    assert capsys.readouterr().out == "", "nothing is known of Megatron's flags"
    (tmp_path / "config.json").write_text("{")
    record_of(tmp_path).say_changes(resume, None)
    assert "config.json" in capsys.readouterr().out
