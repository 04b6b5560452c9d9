"""Makes quantized Hugging Face folders from plain ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rasft.tools.conversion.fp8_folders import quantized
from megatron_rasft.weights.fp8_blocks import is_linear_layer

WEIGHTS = "model.safetensors"
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}  # fmt: skip
LARGEST = 448.0


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """The configuration of the library compressed-tensors for FP8 weights."""
    group = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": None}},
        "ignore": ["lm_head"],
    }


COMPRESSED_ROWS = compressed("channel")

Quantize = Callable[[str, Tensor], dict[str, Tensor]]
"""Returns the stored tensors of a weight: a function of its name and value."""


def in_blocks(scale_type: torch.dtype, suffix: str = "_scale_inv") -> Quantize:
    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        values, scales = quantized(weight)
        return {name: values, name + suffix: scales.to(scale_type)}

    return quantize


def with_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    """One scale for each row, as compressed-tensors stores them."""
    scales = (weight.float().abs().amax(1, keepdim=True) / LARGEST).bfloat16()
    return {name: (weight.float() / scales).to(torch.float8_e4m3fn), name + "_scale": scales}


def with_one_scale(suffix: str, activation: str, shape: tuple[int, ...]) -> Quantize:
    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = (weight.float().abs().amax() / LARGEST).bfloat16()
        values = (weight.float() / scale).to(torch.float8_e4m3fn)
        module = name.removesuffix("weight")
        return {
            name: values,
            name + suffix: scale.reshape(shape),
            module + activation: torch.ones(shape, dtype=torch.bfloat16),
        }

    return quantize


def make_mxfp4_folder(path: Path) -> Path:
    """Replaces the experts of a gpt-oss folder by random MXFP4 blocks."""
    generator = torch.Generator().manual_seed(5)
    state = load_file(path / WEIGHTS)
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = state.pop(name).shape
        shape = (experts, columns, rows // 32)
        state[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        state[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(state, path / WEIGHTS, {"format": "pt"})
    _enter(path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return path


def quantize_folder(path: Path, config: dict[str, Any], quantize: Quantize) -> Path:
    """Replaces the matrices of the layers by quantized ones, and enters ``config`` as quantization_config."""
    state: dict[str, Tensor] = {}
    for name, weight in load_file(path / WEIGHTS).items():
        state |= quantize(name, weight) if is_linear_layer(name, tuple(weight.shape)) else {name: weight}
    save_file(state, path / WEIGHTS, {"format": "pt"})
    _enter(path, config)
    return path


def _enter(path: Path, config: dict[str, Any]) -> None:
    content = json.loads((path / "config.json").read_text()) | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(content))
