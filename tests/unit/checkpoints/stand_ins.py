"""Stand-ins for the arguments that a checkpoint is compared with."""

from types import SimpleNamespace
from typing import Any


def args_with_architecture(**changes: Any) -> SimpleNamespace:
    """Some of Megatron's arguments, including those that identify an architecture."""
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 100,
        "untie_embeddings_and_output_weights": True,
    }
    return SimpleNamespace(**shape | changes)
