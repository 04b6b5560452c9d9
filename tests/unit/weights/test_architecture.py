"""Compares the defaults of each family with transformers' configuration classes."""

from typing import Any

import pytest
import transformers

from megatron_rasft.weights.architecture import (
    ModelDescription,
    _uses_sliding_window,
    megatron_args,
    read_rope,
    read_shape,
)
from megatron_rasft.weights.families import FAMILIES


def transformers_config(architecture: str, **values: Any) -> Any:
    """Builds transformers' configuration for a config.json with only these values."""
    return getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**values)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """Folders may omit keys that equal the defaults of transformers' configuration class.

    num_key_value_heads is not compared: Mistral, Mixtral and Qwen3-MoE have their own default there, but read_shape uses
    as many groups as heads. Published folders of these families have the key.
    """
    family = FAMILIES[architecture]
    # in families with a switch transformers drops the window unless the switch is on; a hidden size other than
    # the default distinguishes a fixed head_dim from a computed one
    has_switch = hasattr(transformers_config(architecture), "use_sliding_window")
    switch = {"use_sliding_window": True} if has_switch else {}
    config = transformers_config(architecture, hidden_size=1024, **switch)
    assert family.default_max_position_embeddings == config.max_position_embeddings
    assert family.default_rope_theta == config.rope_parameters["rope_theta"]
    assert family.default_norm_eps == config.rms_norm_eps
    assert family.default_sliding_window == getattr(config, "sliding_window", None)
    computed = 1024 // config.num_attention_heads
    assert (family.default_head_dim or computed) == (getattr(config, "head_dim", None) or computed)
    assert family.has_window_switch == has_switch
    assert family.has_max_window_layers == hasattr(config, "max_window_layers")
    assert family.has_experts == hasattr(config, "num_experts_per_tok")
    assert family.always_normalizes_experts == (family.has_experts and not hasattr(config, "norm_topk_prob"))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_config_with_sizes_only_means_what_transformers_reads(architecture: str) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 96,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    if FAMILIES[architecture].has_experts:
        sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    switched_off = {"sliding_window": None}  # Mistral's default window is refused
    config = transformers_config(architecture, **sizes)
    family = FAMILIES[architecture]
    stored = {**sizes, **switched_off}
    described = ModelDescription(stored, family, read_shape(stored, family), read_rope(stored, family))
    args = megatron_args(described)
    assert args["init_method_std"] == config.initializer_range
    assert args["untie_embeddings_and_output_weights"] is not config.tie_word_embeddings
    assert args["layernorm_epsilon"] == config.rms_norm_eps
    assert args["max_position_embeddings"] == config.max_position_embeddings
    if family.has_experts:
        assert args["moe_router_pre_softmax"] is not getattr(config, "norm_topk_prob", True)


@pytest.mark.parametrize("architecture", [name for name, f in FAMILIES.items() if f.has_max_window_layers])
@pytest.mark.parametrize("num_layers", [28, 29])
def test_window_starts_at_the_layer_where_transformers_starts_it(architecture: str, num_layers: int) -> None:
    values = {"num_hidden_layers": num_layers, "use_sliding_window": True}
    kinds = transformers_config(architecture, **values).layer_types
    assert _uses_sliding_window(values, FAMILIES[architecture]) is ("sliding_attention" in kinds)
