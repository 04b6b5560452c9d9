"""One table per model family: Hugging Face tensor names and layouts <-> Megatron's, for both directions.

A file of this package declares a kind of family. FAMILIES has an entry for each family.
"""

from megatron_rasft.weights.families import dense, experts
from megatron_rasft.weights.families.declaration import Family
from megatron_rasft.weights.families.entries import Entry
from megatron_rasft.weights.families.layouts import Piece, ShardLayout
from megatron_rasft.weights.families.name_table import Binding, NameTable, StoredParameter
from megatron_rasft.weights.families.shape import ModelShape

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Binding",
    "Entry",
    "Family",
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
        dense.QWEN2,
        dense.QWEN3,
        dense.PHI3,
        experts.MIXTRAL,
        experts.QWEN3_MOE,
    )
}

REFUSED = {
    "Gemma2ForCausalLM": "its attention and output logits are capped softly, its layers have norms after attention "
    "and MLP, and every other layer has a sliding window; Megatron's GPTModel has no such caps and norms",
    "Gemma3ForCausalLM": "its layers have norms after attention and MLP, and two rotary bases; Megatron's GPTModel "
    "has neither",
    "Qwen2MoeForCausalLM": "its shared expert is gated, and only its successor Qwen3-MoE has a table",
    "DeepseekV3ForCausalLM": "there is no table for its latent attention and grouped routing",
}
"""Well-known families that cannot be converted, each with the reason."""
