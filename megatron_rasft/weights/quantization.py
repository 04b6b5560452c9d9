"""Reads quantization_config: the quantized weights that a folder may have. They are dequantized to bfloat16 when they are read."""

from dataclasses import dataclass
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.config_values import list_of, short

CONFIG_KEY = "quantization_config"

_SUPPORTED = (
    "supported are fp8 and compressed-tensors with FP8 weights (e4m3), and mxfp4; use a folder with such weights, or with plain "
    "bf16, fp16 or fp32 weights"
)


@dataclass(frozen=True)
class Quantization:
    """How the weights of a folder are quantized."""

    is_mxfp4: bool = False
    """True: 4-bit values in blocks of 32 (``_blocks`` and ``_scales``). False: FP8 values with scales."""
    block: tuple[int, int] | None = None
    """Rows and columns of a weight that share a scale; None: scales belong to rows, or to the whole weight."""


def read_quantization(config: dict[str, Any]) -> Quantization | None:
    """Returns how the weights are quantized, None if they are not; raises ModelFolderError for a kind that cannot be read."""
    found = config.get(CONFIG_KEY)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(method, str) or method not in _READERS:
        raise _refusal(f"quant_method {short(method)}")
    return _READERS[method](found)


def _refusal(found: str) -> ModelFolderError:
    return ModelFolderError(
        f"the model is quantized with a {CONFIG_KEY} that is not supported: {found}; {_SUPPORTED}"
    )


def _read_fp8(found: dict[str, Any]) -> Quantization:
    if found.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise _refusal(f"fmt {short(found['fmt'])}")
    return Quantization(block=_block(found, "weight_block_size"))


def _block(found: dict[str, Any], key: str) -> tuple[int, int] | None:
    sizes = list_of(found, key, int)
    if not sizes:
        return None
    if len(sizes) != 2 or min(sizes) < 1:
        raise _refusal(f"{key} {short(sizes)}")
    return sizes[0], sizes[1]


def _read_compressed(found: dict[str, Any]) -> Quantization:
    """Reads the configuration of the library compressed-tensors. Its groups are lists of layers with the same scheme."""
    if found.get("format") not in ("float-quantized", "naive-quantized"):
        raise _refusal(f"format {short(found.get('format'))}")
    if found.get("transform_config"):
        raise _refusal("transform_config, which rotates the weights")
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refusal(f"config_groups {short(groups)}")
    blocks = {_read_group(name, group) for name, group in groups.items()} - {None}
    if len(blocks) > 1:
        raise _refusal(f"block_structure {short(sorted(map(str, blocks)))}, which differs between groups")
    return Quantization(block=blocks.pop() if blocks else None)


def _read_group(name: str, group: Any) -> tuple[int, int] | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise _refusal(f"config_groups.{name} without weights")
    scheme = [weights.get(key) for key in ("type", "num_bits", "symmetric")]
    if scheme != ["float", 8, True]:
        raise _refusal(f"config_groups.{name} has type, num_bits and symmetric {short(scheme)}")
    if weights.get("strategy") not in ("tensor", "channel", "block"):
        raise _refusal(f"config_groups.{name} has strategy {short(weights.get('strategy'))}")
    return _block(weights, "block_structure")


_READERS = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed,
    "mxfp4": lambda found: Quantization(is_mxfp4=True),
}
