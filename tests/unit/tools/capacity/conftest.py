"""The model and the run that the tests of this package estimate."""

from pathlib import Path

import pytest

from megatron_rasft.tools.capacity.config import AssumptionConfig
from megatron_rasft.tools.capacity.layouts import Model

LLAMA_70B = Path(__file__).with_name("llama-3.1-70b")
"""A folder with a config.json and without weights."""


@pytest.fixture(scope="session")
def llama_70b() -> Model:
    return Model.read(LLAMA_70B)


@pytest.fixture
def assumed() -> AssumptionConfig:
    return AssumptionConfig()
