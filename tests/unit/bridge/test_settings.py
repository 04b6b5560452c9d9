"""Settings of config.json that Megatron-Bridge would ignore are refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.bridge.settings import refuse_lost_settings
from megatron_rasft.errors import ModelFolderError

WINDOWED = {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]}


def provider(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"window_size": None, "rope_scaling": False, "rope_scaling_factor": 1.0} | fields
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (WINDOWED, "sliding_window"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)
def test_a_setting_that_the_provider_lacks_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFolderError, match=f"Megatron-Bridge.*{named}|{named}.*Megatron-Bridge"):
        refuse_lost_settings(config, provider())


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {}),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, {}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {}),
        (WINDOWED, {"window_size": 4096}),
        ({"rope_parameters": {"rope_type": "default"}}, {}),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"rope_scaling": True}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {"rope_scaling_factor": 8.0}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, {"position_embedding_type": "yarn"}),
    ],
)
def test_settings_that_are_off_or_taken_over_are_accepted(
    config: dict[str, Any], fields: dict[str, Any]
) -> None:
    refuse_lost_settings(config, provider(**fields))
