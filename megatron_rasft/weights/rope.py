"""Reads the rotary embedding of a config.json."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.config_values import (
    flag,
    positive_int,
    positive_number,
    refusal,
    short,
    unsupported,
)
from megatron_rasft.weights.families import Family

_MEGATRON_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Values that are fixed in Megatron's RotaryEmbedding._apply_scaling (core/models/common/embeddings)."""


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071): long wavelengths are stretched, and cosine and sine are multiplied by a factor."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncates: bool
    """Whether the range of channels between both betas is rounded to whole channels."""
    attention_factor: float
    mscale_all_dim: float
    """Multi-latent attention multiplies its scores by (0.1 mscale_all_dim ln(factor) + 1)^2."""
    served_factor: float
    """The attention factor that SGLang computes from the same config.json (layers/rotary_embedding/yarn.py)."""

    @property
    def mscale(self) -> float:
        """Megatron's mscale. With mscale_all_dim 0 its attention factor is 0.1 mscale ln(factor) + 1."""
        return (self.attention_factor - 1) / (0.1 * math.log(self.factor)) if self.factor > 1 else 1.0

    @property
    def latent_mscale(self) -> float:
        """Megatron's mscale of multi-latent attention, whose attention factor is
        (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
        if self.factor <= 1:
            return 1.0
        step = 0.1 * math.log(self.factor)
        return (self.attention_factor * (step * self.mscale_all_dim + 1) - 1) / step


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753) for sequences within the original positions. Longer ones would need other divisors.

    transformers and SGLang choose the divisors of a sequence by its length, so its length would change its first tokens.
    """

    divisors: tuple[float, ...]
    """Number by which the frequency of each pair of channels is divided."""
    attention_factor: float
    """Factor of cosine and sine."""
    original_positions: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base, and Llama 3's scaling factor or YaRN (None: no scaling)."""

    theta: float
    llama3_factor: float | None
    yarn: Yarn | None = None
    partial: float = 1.0
    """Share of each head's dimensions that are rotated: the first ones."""
    last_plain: int | None = None
    """Number of first positions that Megatron computes as transformers does; None: all. LongRoPE has other frequencies for longer
    sequences, and Ministral 3 multiplies later queries by a factor."""
    linear_factor: float | None = None
    """Number by which positions are divided, in layers without an own base; None: not divided."""
    local_theta: float | None = None
    """Base in layers with a sliding window, if they have their own."""
    long: LongRope | None = None
    is_interleaved: bool = False
    """Whether neighbouring dimensions form a rotated pair."""

    @property
    def attention_factor(self) -> float:
        """Factor of cosine and sine."""
        scaling = self.yarn or self.long
        return 1.0 if scaling is None else scaling.attention_factor

    def megatron_args(self) -> dict[str, Any]:
        """Returns the values of Megatron's arguments."""
        args: dict[str, Any] = {
            "position_embedding_type": "rope" if self.yarn is None else "yarn",
            "rotary_base": int(self.theta),
            "rotary_percent": self.partial,
            "rotary_interleaved": self.is_interleaved,
            "use_rope_scaling": self.llama3_factor is not None,
            "rope_scaling_factor": self.llama3_factor or 8.0,
            "rotary_seq_len_interpolation_factor": self.linear_factor,
        }
        if self.local_theta is not None:
            args["local_rotary_base"] = int(self.local_theta)
        if self.long is not None:
            args["rotary_divisors"] = self.long.divisors
            args["rotary_factor"] = self.long.attention_factor
            # Transformer Engine's kernel for packed sequences ignores the attention factor (rope_utils.py).
            args["apply_rope_fusion"] = False
        if self.is_interleaved:
            args["apply_rope_fusion"] = False  # the fused kernel for packed sequences was not tried
        if self.yarn is None:
            return args
        return args | {
            "rotary_scaling_factor": self.yarn.factor,
            "yarn_original_max_position_embeddings": self.yarn.original_positions,
            "yarn_beta_fast": self.yarn.beta_fast,
            "yarn_beta_slow": self.yarn.beta_slow,
            "yarn_correction_range_round_to_int": self.yarn.truncates,
            "mscale": self.yarn.mscale,
            "mscale_all_dim": 0.0,
            # Transformer Engine's kernel for packed sequences ignores the attention factor (rope_utils.py).
            "apply_rope_fusion": False,
        }

    def latent_args(self) -> dict[str, Any]:
        """Returns the values of Megatron's arguments for a model with multi-latent attention, whose layers rotate themselves."""
        is_scaled = self.llama3_factor is not None or self.linear_factor is not None
        if is_scaled or (self.yarn is not None and not self.yarn.truncates):
            raise unsupported(
                "multi-latent attention with llama3 or linear rope scaling, or with yarn's truncate false, is not supported"
            )
        args = Rope(self.theta, None).megatron_args()
        args |= {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
        args["apply_rope_fusion"] = False
        if self.yarn is None:
            return args
        return args | {
            "rope_type": "yarn",
            "rotary_scaling_factor": self.yarn.factor,
            "original_max_position_embeddings": self.yarn.original_positions,
            "beta_fast": self.yarn.beta_fast,
            "beta_slow": self.yarn.beta_slow,
            "mscale": self.yarn.latent_mscale,
            "mscale_all_dim": self.yarn.mscale_all_dim,
        }


def read_rope(config: dict[str, Any], family: Family) -> Rope:
    """Reads the rotary embedding, in the form of transformers 5 (rope_parameters) or of earlier releases (rope_theta,
    rope_scaling)."""
    rope, local_theta = _rope_settings(config, family)
    kind = rope.get("rope_type", rope.get("type", "default"))
    own_theta = positive_number(config, "rope_theta", family.default_rope_theta)
    theta = positive_number(rope, "rope_theta", own_theta)
    own_partial = positive_number(config, "partial_rotary_factor", family.default_partial_rotary)
    partial = positive_number(rope, "partial_rotary_factor", own_partial)
    if partial != 1.0 and not family.has_partial_rotary:
        raise unsupported(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    if partial > 1.0:
        raise refusal("partial_rotary_factor", "a number of at most 1 as", partial)
    for base in (theta, local_theta or theta):
        if base != int(base):
            raise ModelFolderError(
                f"rope_theta {base} is not an integer, as Megatron's --rotary-base must be"
            )
    if kind == "default":
        pairs = family.rotates_neighbours
        return Rope(theta, None, partial=partial, local_theta=local_theta, is_interleaved=pairs)
    if family.rotates_neighbours:
        raise unsupported(f"rope scaling type {short(kind)} is not supported for {family.architecture}")
    if kind in family.long_rope_types:
        long = _read_long_rope(config, rope, family, partial)
        return Rope(theta, None, partial=partial, long=long, last_plain=long.original_positions)
    if kind == "linear":
        factor = positive_number(rope, "factor", 0.0)
        return Rope(theta, None, partial=partial, linear_factor=factor, local_theta=local_theta)
    if kind not in ("llama3", "yarn") or local_theta is not None:
        raise unsupported(
            f"rope scaling type {short(kind)} is not supported for {family.architecture}; other types are 'default', 'linear', and "
            "mostly 'llama3' and 'yarn'"
        )
    rope.setdefault("original_max_position_embeddings", family.longest(config))
    if kind == "yarn" and partial != 1.0:
        raise unsupported(
            f"yarn rope scaling with partial_rotary_factor {partial}: Megatron would rotate whole heads"
        )
    if kind == "yarn":
        yarn = _read_yarn(rope, family.longest(config))
        has_scale = family.scales_late_queries and rope.get("llama_4_scaling_beta")
        return Rope(theta, None, yarn, last_plain=yarn.original_positions if has_scale else None)
    for key, value in _MEGATRON_LLAMA3.items():
        if rope.get(key) != value:
            raise unsupported(
                f"llama3 rope scaling with {key} {short(rope.get(key))} is not supported: Megatron fixes it at {value:g}"
            )
    if rope.get("factor") is None:
        raise ModelFolderError("llama3 rope scaling has no factor")
    return Rope(theta, positive_number(rope, "factor", 0.0), partial=partial)


def _read_long_rope(config: dict[str, Any], rope: dict[str, Any], family: Family, partial: float) -> LongRope:
    """Reads LongRoPE's settings as transformers does (_compute_longrope_parameters in modeling_rope_utils.py)."""
    longest = family.longest(config)
    default = positive_int(config, "original_max_position_embeddings", default=longest)
    original = positive_int(rope, "original_max_position_embeddings", default=default)
    if original == 1:
        raise refusal("original_max_position_embeddings", "an integer above 1 as", original)
    factor = positive_number(rope, "factor", longest / original)
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = rope.get("short_factor")
    heads = positive_int(config, "num_attention_heads")
    num_pairs = int(positive_int(config, "hidden_size") // heads * partial) // 2
    if not isinstance(divisors, list) or len(divisors) != num_pairs:
        raise refusal("short_factor", f"a list of {num_pairs} numbers as", divisors)
    return LongRope(
        divisors=tuple(positive_number({"short_factor": d}, "short_factor", 0.0) for d in divisors),
        attention_factor=positive_number(rope, "attention_factor", computed),
        original_positions=original,
    )


def _read_yarn(rope: dict[str, Any], longest: int) -> Yarn:
    """Reads YaRN's settings as transformers does (_compute_yarn_parameters in modeling_rope_utils.py)."""
    original = positive_int(rope, "original_max_position_embeddings")
    if "factor" not in rope:
        raise ModelFolderError("yarn rope scaling has no factor")
    factor = positive_number(rope, "factor", longest / original)
    computed = _yarn_factor(rope, factor)
    attention_factor = positive_number(rope, "attention_factor", computed)
    if factor <= 1 and attention_factor != 1:
        raise unsupported(f"yarn rope scaling with factor {factor} and attention_factor {attention_factor}")
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=positive_number(rope, "beta_fast", 32.0),
        beta_slow=positive_number(rope, "beta_slow", 1.0),
        truncates=flag(rope, "truncate", default=True),
        attention_factor=attention_factor,
        mscale_all_dim=positive_number(rope, "mscale_all_dim", 0.0) if rope.get("mscale_all_dim") else 0.0,
        served_factor=computed * positive_number(rope, "attn_factor", 1.0),
    )


def _yarn_factor(rope: dict[str, Any], factor: float) -> float:
    """The attention factor that follows from the other settings."""

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if not rope.get("mscale") or not rope.get("mscale_all_dim"):
        return scaled(1.0)
    return scaled(positive_number(rope, "mscale", 1.0)) / scaled(positive_number(rope, "mscale_all_dim", 1.0))


def _rope_settings(config: dict[str, Any], family: Family) -> tuple[dict[str, Any], float | None]:
    """Returns a copy of the settings of the rotary embedding, and the base in layers with a window, if they have their own.

    If both keys exist, transformers uses rope_scaling.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or family.default_rope or {}
    if not isinstance(rope, dict):
        raise refusal(key, "an object as", rope)
    if family.default_local_rope_theta is not None:
        return _two_settings(config, rope, family.default_local_rope_theta)
    if any(isinstance(value, dict) for value in rope.values()):
        raise unsupported(
            f"{key} differs between kinds of layers ({short(list(rope))}), which is not supported"
        )
    return dict(rope), None


def _two_settings(
    config: dict[str, Any], rope: dict[str, Any], default: float
) -> tuple[dict[str, Any], float]:
    """Reads the settings of models whose layers with a window have their own base, which is rope_local_base_freq in earlier releases."""
    kinds = ("full_attention", "sliding_attention")
    theta = positive_number(config, "rope_local_base_freq", default)
    if not any(isinstance(value, dict) for value in rope.values()):
        return dict(rope), theta
    distant, local = (rope.get(kind) or {} for kind in kinds)
    if not isinstance(distant, dict) or not isinstance(local, dict):
        raise refusal("rope_parameters", "an object for each kind of layers in", rope)
    if local.get("rope_type", "default") != "default":
        raise unsupported(
            f"rope scaling type {short(local['rope_type'])} in layers with a window is not supported"
        )
    return dict(distant), positive_number(local, "rope_theta", theta)
