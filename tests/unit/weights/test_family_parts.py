"""Parts that several families share: layers behind the last one, layers without positions, sizes of the cache, whole parameters."""

from typing import Any

import pytest

from megatron_rasft.weights.families import FAMILIES, NameTable
from megatron_rasft.weights.families.shape import LatentShape
from tests.unit.weights.test_families import LATENT, LAYER, bind, shape


@pytest.mark.parametrize(
    "architecture", ["Glm4MoeForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"]
)
def test_layers_behind_the_last_one_are_carried(architecture: str) -> None:
    is_carried = FAMILIES[architecture].is_carried
    sizes = shape()
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(5)]
    assert [is_carried(name, sizes) for name in names] == [False, False, False, True, True]
    assert not is_carried("model.norm.weight", sizes)


@pytest.mark.parametrize(
    ("config", "is_without"),
    [
        ({}, [0, 0, 0, 1, 0, 0, 0, 1]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 3}, [0, 0, 1, 0, 0, 1, 0, 0]),
        ({"no_rope_layers": [0, 1, 1, 0, 1, 1, 1, 1]}, [1, 0, 0, 1, 0, 0, 0, 0]),
        # A folder may list more layers than it has, as after layers were cut off.
        ({"no_rope_layers": [0, 1, 1, 0, 1, 1, 1, 1, 0]}, [1, 0, 0, 1, 0, 0, 0, 0]),
    ],
)
def test_layers_without_positions(config: dict[str, Any], is_without: list[int]) -> None:
    own = FAMILIES["SmolLM3ForCausalLM"].own_args
    assert own({"num_hidden_layers": 8, **config}, shape(num_layers=8)) == {"no_rope_freq": is_without}


def test_elements_of_the_cache_follow_from_heads_and_ranks() -> None:
    grouped = shape(8, 4)
    assert [grouped.cached_elements(tp) for tp in (1, 2, 4, 8)] == [32, 16, 8, 8], "a group is not divided"
    latent = LatentShape(query_rank=6, key_value_rank=4, plain_dim=3, rotary_dim=4, value_dim=5)
    assert [shape(8, 8, latent=latent).cached_elements(tp) for tp in (1, 2)] == [96, 48]


def test_parameters_that_every_rank_holds_are_not_split() -> None:
    table = NameTable(FAMILIES["LlamaForCausalLM"], shape())
    norm = bind(table, LAYER + "mlp.linear_fc1.layer_norm_weight")
    assert not norm.is_split((8,)) and not norm.is_split((4,))
    assert bind(table, LAYER + "mlp.linear_fc2.weight").is_split((8, 6))
    latent = NameTable(FAMILIES["DeepseekV3ForCausalLM"], shape(latent=LATENT))
    down = bind(latent, LAYER + "self_attention.linear_q_down_proj.weight")
    assert not down.is_split((6, 8)) and down.is_split((3, 8))
