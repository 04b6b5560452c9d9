"""A tiny model's folder, and the parsers of a run's command line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_rasft.config.parser import FlagParser
from megatron_rasft.training import startup
from megatron_rasft.training.arguments import add_arguments
from tests.tiny_policy import write_model

Parse = Callable[..., Any]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def parse(model: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Megatron's arguments of a run with these flags, after all checks."""
    monkeypatch.setattr(sys, "argv", ["pretrain_rasft.py"])

    def parsed(*flags: object) -> Any:
        given = ["--hf-model", str(model), "--train-data", "rows.jsonl", "--global-batch-size", "8"]
        return startup.parse([*given, *map(str, flags)])[0]

    return parsed


@pytest.fixture(scope="session")
def parser() -> FlagParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
