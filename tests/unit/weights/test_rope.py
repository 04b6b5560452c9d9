"""Megatron's YaRN computes transformers' frequencies and attention factor."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (  # noqa: E402
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from megatron.training.argument_utils import _apply_yarn_config_from_args  # noqa: E402

from megatron_rasft.generation.kv_cache import rotary_frequencies  # noqa: E402
from megatron_rasft.tools.conversion.layerwise import rotary_angles  # noqa: E402
from megatron_rasft.weights.families import FAMILIES  # noqa: E402
from megatron_rasft.weights.rope import read_rope  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "Qwen2.5 with the model card's recipe": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "DeepSeek-R1-0528-Qwen3-8B": {
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    },
    "Olmo 3": {
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "gpt-oss": {
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "DeepSeek-V3": {
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "the ratio of positions as factor": {"factor": None, "original_max_position_embeddings": 16384},
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_and_attention_factor_are_those_of_transformers(name: str) -> None:
    scaling = {"rope_type": "yarn", **SETTINGS[name]}
    values = {"head_dim": 128, "max_position_embeddings": 131072}
    reference = transformers.Qwen3Config(**values, rope_parameters={**scaling, "rope_theta": 1e6})
    inv_freq, factor = ROPE_INIT_FUNCTIONS["yarn"](reference, "cpu")

    rope = read_rope({**values, "rope_scaling": scaling, "rope_theta": 1e6}, FAMILIES["Qwen3ForCausalLM"])
    config: Any = SimpleNamespace()
    _apply_yarn_config_from_args(config, SimpleNamespace(**rope.megatron_args()))
    module = YarnRotaryEmbedding(
        128,
        rotary_base=rope.megatron_args()["rotary_base"],
        scaling_factor=config.yarn_rotary_scaling_factor,
        original_max_position_embeddings=config.yarn_original_max_position_embeddings,
        beta_fast=config.yarn_beta_fast,
        beta_slow=config.yarn_beta_slow,
        mscale=config.yarn_mscale,
        mscale_all_dim=config.yarn_mscale_all_dim,
        correction_range_round_to_int=config.yarn_correction_range_round_to_int,
        use_cpu_initialization=True,
    )
    angles = rotary_frequencies(module, 131072)
    assert torch.equal(angles[1, 0, 0, :64], inv_freq)
    assert torch.equal(angles[-1, 0, 0, :64], 131071 * inv_freq)
    assert _yarn_get_concentration_factor_from_config(config) == pytest.approx(factor, rel=1e-12)
    assert rope.yarn is not None and rope.yarn.attention_factor == pytest.approx(factor, rel=1e-12)
    assert torch.allclose(rotary_angles(2, 128, rope)[1], inv_freq, rtol=1e-5, atol=0)
