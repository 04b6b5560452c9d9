"""Tools read the configuration that a run wrote, and refuse other files of that name."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.config import LossConfig, RasftConfig, RunConfig
from megatron_rasft.config.saved import CONFIG_FILE, SavedConfig
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
    now = of_run(sft, {"lr": "--lr"}, lr=5e-5, bf16=False, rank=0)
    assert before.changes(now) == ["--objective rasft -> sft", "--lr 0.0001 -> 5e-05", "--bf16 True -> False"]
