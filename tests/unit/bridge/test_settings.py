"""Models that Megatron-Bridge would build differently from transformers are refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.bridge.settings import refuse_other_model
from megatron_rasft.errors import ModelFolderError

WINDOWED = {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]}


def provider(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"transformer_layer_spec": None, "window_size": None} | fields)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (WINDOWED, "sliding_window"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, "linear"),
    ],
)
def test_a_setting_that_the_provider_lacks_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFolderError, match=f"Megatron-Bridge.*{named}|{named}.*Megatron-Bridge"):
        refuse_other_model(config, provider())


def test_the_formula_of_llama3_is_not_taken_for_another() -> None:
    with pytest.raises(ModelFolderError, match="linear"):
        refuse_other_model(
            {"rope_scaling": {"type": "linear"}}, provider(rope_scaling=True, rope_scaling_factor=8.0)
        )


def test_a_model_that_differs_in_all_sizes_is_refused() -> None:
    with pytest.raises(ModelFolderError, match=r"Ernie4_5_MoeForCausalLM.*softmax"):
        refuse_other_model({"architectures": ["Ernie4_5_MoeForCausalLM"]}, provider())


def test_capped_logits_and_other_classes_are_refused() -> None:
    with pytest.raises(ModelFolderError, match="final_logit_softcapping"):
        refuse_other_model({"final_logit_softcapping": 30.0}, provider())
    with pytest.raises(ModelFolderError, match="GPTModel"):
        refuse_other_model({}, SimpleNamespace())


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
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, {"seq_len_interpolation_factor": 8.0}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, {"position_embedding_type": "yarn"}),
    ],
)
def test_settings_that_are_off_or_taken_over_are_accepted(
    config: dict[str, Any], fields: dict[str, Any]
) -> None:
    refuse_other_model(config, provider(**fields))
