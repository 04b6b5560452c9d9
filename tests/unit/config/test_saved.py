"""Tools read the configuration that a run wrote, and refuse other files of that name."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rasft.config import RasftConfig, RunConfig
from megatron_rasft.config.saved import CONFIG_FILE, SavedConfig
from megatron_rasft.errors import RasftError


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
