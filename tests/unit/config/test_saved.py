"""Tools read the configuration that a run wrote, and refuse other files of that name."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.config import LossConfig, RasftConfig, RunConfig
from megatron_rasft.config.command_line import check_flags
from megatron_rasft.config.saved import CONFIG_FILE, FLAGS_FILE, SavedConfig, write_flags
from megatron_rasft.errors import RasftError
from megatron_rasft.objective.families import OBJECTIVES


def saved() -> SavedConfig:
    args = SimpleNamespace(lr=1e-3, train_iters=8, load=None)
    return SavedConfig.of(args, RasftConfig(run=RunConfig(hf_model="folder")))  # type: ignore[arg-type]


def test_a_configuration_comes_back_as_it_was_written(tmp_path: Path) -> None:
    saved().write(tmp_path)
    read = SavedConfig.read(tmp_path)
    assert read == saved()
    assert read.hf_model == "folder"
    assert read.megatron == {"load": "None", "lr": "0.001", "train_iters": "8"}


def test_parts_that_another_version_wrote_are_left_out_and_missing_ones_are_empty() -> None:
    known = SavedConfig.from_json({"rasft": {"run": {}}, "machine": {"gpus": 8}})
    assert known == SavedConfig(rasft={"run": {}}, megatron={})
    assert saved().unknown_flags() == []
    for objective in OBJECTIVES:
        chosen = RasftConfig(objective=OBJECTIVES[objective](), loss=LossConfig(objective=objective))
        assert of_run(chosen, {}).unknown_flags() == []
    newer = SavedConfig(rasft={"sync": {"sync_colour": ["red"], "sync_bucket_mib": 3}})
    assert newer.unknown_flags() == ['--sync-colour ["red"]']


def test_a_folder_without_a_run_has_no_configuration(tmp_path: Path) -> None:
    assert SavedConfig.read(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rasft": 1, "megatron": {}}'])
def test_another_file_of_that_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=CONFIG_FILE):
        SavedConfig.read(tmp_path)


def test_a_configuration_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RasftError, match=r"config\.json.*--save"):
        saved().write(tmp_path / "missing")


def of_run(config: RasftConfig, given: dict[str, str], **megatron: Any) -> SavedConfig:
    return SavedConfig.of(Namespace(given_flags=given, **megatron), config)


def test_changed_flags_are_named_with_both_values(tmp_path: Path) -> None:
    config, given = RasftConfig(), {"lr": "--lr", "bf16": "--bf16"}
    of_run(config, given, lr=1e-4, bf16=True, rank=0).write(tmp_path)
    before = SavedConfig.read(tmp_path)
    assert before is not None
    assert before.changes(of_run(config, given, lr=1e-4, bf16=True, rank=3)) == [], "no run gave --rank"
    sft = dataclasses.replace(config, objective=OBJECTIVES["sft"](), loss=LossConfig(objective="sft"))
    moved = dataclasses.replace(config, run=RunConfig(config=["another.toml"]))
    assert before.changes(of_run(moved, given, lr=1e-4, bf16=True, rank=0)) == []
    by_file = [
        SavedConfig.of(Namespace(given_flags={"config": "--config"}, config=[name]), config) for name in "ab"
    ]
    assert by_file[0].changes(by_file[1]) == []
    now = of_run(sft, {"lr": "--lr"}, lr=5e-5, bf16=False, rank=0)
    assert before.changes(now) == ["--objective rasft -> sft", "--lr 0.0001 -> 5e-05", "--bf16 True -> False"]


@pytest.mark.parametrize(
    "flags",
    [
        "--objective rasft --no-objective-dft-factor --lr 1e-5 --bf16 --train-data a.jsonl b.jsonl",
        "--rasft-weighting published --rollout-top-p 0.9 --hf-model folder --attention-backend flash --no-rope-fusion",
    ],
)
def test_flags_that_were_written_give_the_same_run(tmp_path: Path, flags: str) -> None:
    before = vars(check_flags([*flags.split(), "--save", str(tmp_path)]))
    config = RasftConfig.from_args(Namespace(**before))
    write_flags(tmp_path, before["given_values"], config)
    now = vars(check_flags(["--config", str(tmp_path / FLAGS_FILE)]))
    own = {"config", "given_flags", "given_values"}
    assert {name for name in before if now[name] != before[name]} <= own
    assert now["given_flags"].keys() >= before["given_flags"].keys()
    write_flags(tmp_path, now["given_values"], RasftConfig.from_args(Namespace(**now)))
    assert [path.name for path in tmp_path.iterdir()] == [FLAGS_FILE], "the flags are the same"


def test_each_start_with_other_flags_keeps_its_file(tmp_path: Path) -> None:
    for seed in (1, 1, 2, 3):
        write_flags(tmp_path, {"seed": seed}, RasftConfig())
    seeds = {path.name: path.read_text().splitlines()[-1] for path in tmp_path.iterdir()}
    assert seeds == {"config.1.toml": "seed = 1", "config.2.toml": "seed = 2", FLAGS_FILE: "seed = 3"}


def test_flags_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(RasftError, match=r"config\.toml.*--save"):
        write_flags(tmp_path / "missing", {}, RasftConfig())
