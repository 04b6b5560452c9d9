"""A folder without a table, and a stand-in for Megatron-Bridge that describes and converts it."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

TENSORS = {
    "model.embed_tokens.weight": torch.arange(8.0).reshape(4, 2),
    "model.norm.weight": torch.tensor([1.0, 2.0]),
}


def write_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    config = {"architectures": ["AcmeForCausalLM"], "vocab_size": 4, "max_position_embeddings": 16} | changes
    (path / "config.json").write_text(json.dumps(config))
    save_file(TENSORS, path / "model.safetensors")
    return path


def provider() -> SimpleNamespace:
    return SimpleNamespace(
        num_layers=3,
        hidden_size=2,
        ffn_hidden_size=6,
        num_attention_heads=2,
        num_query_groups=None,
        kv_channels=None,
        seq_length=1024,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=True,
        share_embeddings_and_output_weights=True,
        num_moe_experts=None,
        window_size=512,
        transformer_layer_spec=None,
    )


class StandInBridge:
    """Has the methods of AutoBridge that this project calls. ``streamed`` is what it writes."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.hf_pretrained = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: config))
        self.streamed = dict(TENSORS)
        self.parameter = torch.nn.Parameter(torch.zeros(2))
        self.loaded = [self.parameter]

    @classmethod
    def from_hf_pretrained(cls, path: str) -> "StandInBridge":
        return cls(json.loads((Path(path) / "config.json").read_text()))

    def to_megatron_provider(self, load_weights: bool) -> SimpleNamespace:
        assert not load_weights
        return provider()

    def load_hf_weights(self, chunks: list[Any]) -> None: ...

    def get_conversion_tasks(self, chunks: list[Any]) -> list[Any]:
        return [None, *(SimpleNamespace(param_weight=parameter) for parameter in self.loaded)]

    def export_hf_weights(self, chunks: list[Any], **given: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.streamed.items()

    def chunk(self) -> torch.nn.Module:
        chunk = torch.nn.Module()
        chunk.register_parameter("weight", self.parameter)
        return chunk
