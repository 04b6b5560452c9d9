"""What Megatron's own flags mean to a run, and which are refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.training import host
from tests.tiny_policy import write_model

Parse = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def parse(model: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    monkeypatch.setattr(sys, "argv", ["pretrain_rasft.py"])

    def parsed(*flags: object) -> Any:
        given = ["--hf-model", str(model), "--train-data", "rows.jsonl", "--global-batch-size", "8"]
        return host.parse([*given, *map(str, flags)])[0]

    return parsed


def checkpoint(folder: Path, newest: str) -> Path:
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text(newest)
    return folder


def test_save_is_gone_on_from_once_it_holds_a_checkpoint(parse: Parse, tmp_path: Path) -> None:
    start, save = checkpoint(tmp_path / "start", "7"), tmp_path / "save"
    flags = ("--load", start, "--save", save, "--ckpt-step", "4")
    args = parse(*flags)
    assert (args.load, args.ckpt_step) == (str(start), 4)
    checkpoint(save, "9")
    args = parse(*flags)
    assert (args.load, args.ckpt_step) == (str(save), None), "the step is one of --load"
    args = parse("--load", save, "--save", save, "--ckpt-step", "4")
    assert (args.load, args.ckpt_step) == (str(save), 4)
    assert parse("--save", save).load == str(save)
    converted = checkpoint(tmp_path / "converted", "release")
    assert parse("--load", converted, "--save", save).load == str(converted), "it is the reference"


def test_a_folder_to_load_that_holds_no_checkpoint_is_refused(parse: Parse, tmp_path: Path) -> None:
    missing, save = tmp_path / "typo", checkpoint(tmp_path / "save", "9")
    for flags in ((), ("--save", save), ("--save", missing)):
        with pytest.raises(ValueError, match=r"--load .*typo holds no checkpoint.*--ckpt-step"):
            parse("--load", missing, *flags)
    with pytest.raises(ValueError, match="--exit-on-missing-checkpoint"):
        parse("--save", missing, "--exit-on-missing-checkpoint")
    assert parse("--save", missing).load == str(missing)
