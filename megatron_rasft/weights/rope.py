"""Reads the rotary embedding of a config.json."""

from dataclasses import dataclass
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.config_values import positive_number, refusal, short, unsupported
from megatron_rasft.weights.families import Family

_MEGATRON_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Values that are fixed in Megatron's RotaryEmbedding._apply_scaling (core/models/common/embeddings)."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base, and Llama 3's scaling factor (None: no scaling)."""

    theta: float
    llama3_factor: float | None


def read_rope(config: dict[str, Any], family: Family) -> Rope:
    """Reads the rotary embedding, in the form of transformers 5 (rope_parameters) or of earlier releases (rope_theta,
    rope_scaling)."""
    rope = _rope_settings(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    own_theta = positive_number(config, "rope_theta", family.default_rope_theta)
    theta = positive_number(rope, "rope_theta", own_theta)
    own_partial = positive_number(config, "partial_rotary_factor", 1.0)
    partial = positive_number(rope, "partial_rotary_factor", own_partial)
    if partial != 1.0:
        raise unsupported(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    if theta != int(theta):
        raise ModelFolderError(f"rope_theta {theta} is not an integer, as Megatron's --rotary-base must be")
    if kind == "default":
        return Rope(theta, None)
    if kind != "llama3":
        raise unsupported(
            f"rope scaling type {short(kind)} is not supported; supported are 'default' and 'llama3'"
        )
    rope.setdefault("original_max_position_embeddings", family.longest(config))
    for key, value in _MEGATRON_LLAMA3.items():
        if rope.get(key) != value:
            raise unsupported(
                f"llama3 rope scaling with {key} {short(rope.get(key))} is not supported: Megatron fixes it at {value:g}"
            )
    if rope.get("factor") is None:
        raise ModelFolderError("llama3 rope scaling has no factor")
    return Rope(theta, positive_number(rope, "factor", 0.0))


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the settings of the rotary embedding. If both keys exist, transformers uses rope_scaling."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise refusal(key, "an object as", rope)
    if any(isinstance(value, dict) for value in rope.values()):
        raise unsupported(
            f"{key} differs between kinds of layers ({short(list(rope))}), which is not supported"
        )
    return dict(rope)
