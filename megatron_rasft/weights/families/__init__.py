"""One table per model family: Hugging Face tensor names and layouts <-> Megatron's, for both directions.

A file of this package declares a kind of family. FAMILIES has an entry for each family.
"""

from megatron_rasft.weights.families import (
    delta_net,
    dense,
    experts,
    gemma3,
    glm4,
    glm4_moe,
    gpt_oss,
    latent,
    qwen2_moe,
)
from megatron_rasft.weights.families.declaration import Family
from megatron_rasft.weights.families.entries import Entry
from megatron_rasft.weights.families.layouts import Piece, ShardLayout
from megatron_rasft.weights.families.name_table import Binding, JoinedTensor, NameTable, StoredParameter
from megatron_rasft.weights.families.refused import REFUSED
from megatron_rasft.weights.families.shape import ModelShape

__all__ = [
    "FAMILIES",
    "OTHER_NAMES",
    "REFUSED",
    "Binding",
    "Entry",
    "Family",
    "JoinedTensor",
    "ModelShape",
    "NameTable",
    "Piece",
    "ShardLayout",
    "StoredParameter",
]

FAMILIES = {
    family.architecture: family
    for family in (
        dense.LLAMA,
        dense.MISTRAL,
        dense.MISTRAL3,
        dense.MINISTRAL3,
        dense.MIMO,
        dense.QWEN2,
        dense.QWEN3,
        dense.PHI3,
        dense.ERNIE4_5,
        glm4.GLM,
        glm4.GLM4,
        dense.SEED_OSS,
        dense.SMOLLM3,
        gemma3.GEMMA3,
        gemma3.GEMMA3_VISION,
        experts.MIXTRAL,
        experts.QWEN3_MOE,
        qwen2_moe.QWEN2_MOE,
        glm4_moe.GLM4_MOE,
        gpt_oss.GPT_OSS,
        latent.DEEPSEEK_V3,
        latent.GLM4_MOE_LITE,
        delta_net.QWEN3_5,
        delta_net.QWEN3_5_VISION,
        delta_net.QWEN3_5_MOE,
        delta_net.QWEN3_5_MOE_VISION,
        delta_net.QWEN3_NEXT,
    )
}

OTHER_NAMES = {"Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM"}
"""Architectures in published folders -> the same architectures in transformers."""
