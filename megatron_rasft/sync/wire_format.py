"""The format in which weights are sent to a server: types, quantization, and the names of the layers that the server fuses.

It is derived from the config.json of the served model and the server's --dtype, so that trainer and server cannot disagree.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_rasft.weights.fp8_blocks import BLOCK, SCALE_SUFFIX, is_linear_layer, scale_shape

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}
"""Linear layer -> the layer into which SGLang fuses it, with the rows in the order of this table."""

_EXPERTS = {
    "gate_proj": "w13_weight",
    "up_proj": "w13_weight",
    "down_proj": "w2_weight",
    "w1": "w13_weight",
    "w3": "w13_weight",
    "w2": "w2_weight",
}
"""Linear layer of an expert -> the tensor in which SGLang stacks this layer of all experts, ordered by expert number."""

_KEPT_IN_FP32 = ".e_score_correction_bias"
"""End of the names of routers' biases, which SGLang keeps in fp32 whatever its --dtype: a rounded bias would choose other experts."""

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
}


class WireTensor(NamedTuple):
    """Name, shape and type of a tensor as it is sent."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def fused_name(name: str) -> str:
    """Returns the name of the fused layer that a Hugging Face tensor becomes part of; its own name if the server does not fuse
    it."""
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    return f"{parent}.{_FUSED[last]}.{leaf}" if last in _FUSED else name


def name_on_server(name: str) -> str:
    """Returns the server's name for a Hugging Face tensor. Tensors that it fuses or stacks share one name."""
    module = name.rpartition(".")[0]
    block, _, expert = module.partition(".experts.")
    return f"{block}.experts.{_EXPERTS[expert.partition('.')[2]]}" if expert else fused_name(name)


@dataclass(frozen=True)
class WireFormat:
    """How the trainer's tensors are converted before they are sent."""

    dtype: torch.dtype
    """Data type of the tensors that are not quantized."""
    is_block_fp8: bool = False
    """Whether linear weights are sent as float8_e4m3fn with one fp32 scale per block of 128 x 128."""
    kept_modules: tuple[str, ...] = ()
    """Modules that are not quantized, as dotted paths or parts of such paths."""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if not self.is_block_fp8:
            return name
        kept = f", {len(self.kept_modules)} modules of config.json" if self.kept_modules else ""
        return f"FP8 in blocks ({name} for the rest{kept})"

    @classmethod
    def read(cls, config: dict[str, Any], server_dtype: str = "auto") -> "WireFormat":
        """Returns the format that a server with this config.json and --dtype needs.

        Raises:
            ValueError: this trainer cannot produce the type or the quantization. The message continues a sentence that begins
                with the server's name.
        """
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if server_dtype != "auto":
            name = server_dtype
        elif name == "float32":
            name = "float16"  # SGLang's rule (_get_and_verify_dtype in srt/configs/model_config.py)
        if name not in _DTYPES:
            raise ValueError(
                f"has weights of type {name} (--dtype, or config.json); the types that can be sent are "
                f"{', '.join(_DTYPES)}."
            )
        dtype = _DTYPES[name]
        quantization = config.get("quantization_config")
        if not quantization:
            return cls(dtype)
        wanted = {
            "quant_method": ("fp8",),
            "fmt": ("e4m3", None),
            "weight_block_size": ([BLOCK, BLOCK],),
            "activation_scheme": ("dynamic", None),
            "scale_fmt": (None, "float32"),
        }
        for key, allowed in wanted.items():
            if quantization.get(key) not in allowed:
                raise ValueError(
                    f"serves a model whose quantization_config has {key} {quantization.get(key)!r}; the trainer quantizes "
                    f"only to fp8 (e4m3, blocks of {BLOCK} x {BLOCK}, dynamic activations). Serve such a folder, or one in bfloat16."
                )
        kept = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or ()
        return cls(dtype, True, tuple(str(module).removeprefix("model.") for module in kept))

    def is_quantized(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a Hugging Face tensor is sent as FP8."""
        if not self.is_block_fp8 or not is_linear_layer(name, shape):
            return False
        module = name.rpartition(".")[0]
        # compared in whole parts of dotted names, as SGLang does: mlp.gate does not match mlp.gate_proj
        return not any(f".{kept.rstrip('.')}." in f".{module}." for kept in self.kept_modules)

    def type_of(self, name: str) -> torch.dtype:
        """Data type of a Hugging Face tensor that is not quantized."""
        return torch.float32 if name.endswith(_KEPT_IN_FP32) else self.dtype

    def wire_tensors(self, name: str, shape: tuple[int, ...]) -> tuple[WireTensor, ...]:
        """Returns the tensors that are sent for one Hugging Face tensor."""
        if not self.is_quantized(name, shape):
            return (WireTensor(name, shape, self.type_of(name)),)
        return (
            WireTensor(name, shape, torch.float8_e4m3fn),
            WireTensor(name + SCALE_SUFFIX, scale_shape(shape), torch.float32),
        )
