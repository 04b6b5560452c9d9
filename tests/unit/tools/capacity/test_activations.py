"""Compares the formula of activations with the tensors that autograd keeps for the plain layers, on the CPU in fp32.

tests/emulated_gpu/test_activations.py compares it with those of Transformer Engine's layers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()


from megatron_rasft.tools.capacity.layouts import Model  # noqa: E402
from megatron_rasft.tools.capacity.memory import layer_activations  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from tests.tiny_models import build_chunks  # noqa: E402

TOKENS = 96
TOLERANCE = 0.01
"""The formula for one layer leaves out indices and per-token statistics."""

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
KINDS = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 64},
    "Gemma3ForCausalLM": {"head_dim": 64},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": {
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    },
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
    },
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


pytestmark = pytest.mark.usefixtures("one_process")


def write_config(path: Path, kind: str, num_layers: int) -> Path:
    path.mkdir()
    config = {"architectures": [kind], **SIZES, **KINDS[kind], "num_hidden_layers": num_layers}
    (path / "config.json").write_text(json.dumps(config))
    return path


def kept_bytes(path: Path, recompute: str) -> int:
    """Bytes of the distinct storages that autograd keeps from forward to backward pass, without parameters."""
    (model,), _ = build_chunks(HfFolder.open(path, with_weights=False), 128, **RECOMPUTE[recompute])
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                storage  # a reference keeps the storage alive, so that its address is not used again
            )
        return tensor

    tokens = torch.arange(TOKENS)[None] % 128
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens, torch.arange(TOKENS)[None], None)
    total = sum(storage.nbytes() for storage in kept.values())
    out.sum().backward()
    return total


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("kind", KINDS)
def test_formula_is_what_autograd_keeps_of_a_layer(tmp_path: Path, kind: str, recompute: str) -> None:
    short, long = write_config(tmp_path / "1", kind, 1), write_config(tmp_path / "3", kind, 3)
    measured = (kept_bytes(long, recompute) - kept_bytes(short, recompute)) / 2 / TOKENS / 4
    layer = layer_activations(Model.read(short), has_te=False, element_bytes=4)
    expected = {
        "none": layer.total,
        "selective": layer.norms + layer.attention,
        "full": SIZES["hidden_size"],
    }[recompute]
    assert measured == pytest.approx(expected, rel=TOLERANCE), (measured, layer)
