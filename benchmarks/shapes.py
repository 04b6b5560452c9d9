"""Shapes of the random models that benchmarks build."""

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}
"""Name -> arguments of transformers' Qwen2Config."""


def write_model(shape: str, path: Path, **config: Any) -> None:
    """Writes a Qwen2 folder of that shape with random BF16 weights, which are the same on every call.

    Args:
        shape: a key of ``SHAPES``.
        path: the folder; made if missing.
        config: more arguments of Qwen2Config.
    """
    # imported here, so that a program that only lists the shapes starts quickly
    import torch
    import transformers

    # 1.5 billion random numbers take a second on a GPU, and half a minute on a CPU
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPES[shape], **config))
    model.to(torch.bfloat16).cpu().save_pretrained(path)
