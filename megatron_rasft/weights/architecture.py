"""Reads a config.json: the model's sizes, and Megatron's arguments for the same model.

This module refuses every setting with which Megatron would compute another result than transformers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.files import read_json_object
from megatron_rasft.weights.config_values import (
    flag,
    list_of,
    positive_int,
    positive_number,
    short,
    unsupported,
)
from megatron_rasft.weights.families import FAMILIES, OTHER_NAMES, REFUSED, Family, ModelShape
from megatron_rasft.weights.quantization import read_quantization
from megatron_rasft.weights.rope import Rope, read_rope
from megatron_rasft.weights.windows import window_args

_MOST_LAYERS = 1_000_000
"""Largest number of layers times experts. The table of their names is built in memory before anything else is checked."""


class Described(Protocol):
    """A model as its config.json describes it: an HfFolder or a ModelDescription."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def family(self) -> Family: ...
    @property
    def shape(self) -> ModelShape: ...
    @property
    def rope(self) -> Rope: ...


@dataclass(frozen=True)
class ModelDescription:
    """The contents of a folder's config.json. The folder needs no weights."""

    config: dict[str, Any]
    family: Family
    shape: ModelShape
    rope: Rope

    def is_carried(self, name: str) -> bool:
        """Returns whether a stored tensor is not part of the trained model."""
        return self.family.is_carried(name, self.shape)

    @classmethod
    def read(cls, path: Path) -> "ModelDescription":
        """Reads config.json; raises ModelFolderError with one line that names the folder and the mistake."""
        try:
            config = read_config(path)
            family = read_family(config)
            text = family.text_config(config)
            known = cls(config, family, read_shape(text, family), read_rope(text, family))
            megatron_args(known)  # checks the other keys
            return known
        except ModelFolderError as error:
            raise ModelFolderError(f"model folder {path}: {error}") from error.__cause__


def splits_attention(num_heads: int, num_groups: int, tp: int) -> bool:
    """Returns whether Megatron can split ``num_heads`` heads in ``num_groups`` query groups over ``tp`` ranks."""
    return num_heads % tp == 0 and (num_groups % tp == 0 or tp % num_groups == 0)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a folder's config.json."""
    return read_json_object(path / "config.json", missing=_describe_missing_config(path))


def _describe_missing_config(path: Path) -> str:
    if not path.exists():
        return "the folder does not exist; give a local folder in Hugging Face format (nothing is downloaded)"
    if not path.is_dir():
        return "is a file; give the folder that holds config.json"
    return "has no config.json, so it is not a Hugging Face model folder"


def read_family(config: dict[str, Any]) -> Family:
    """Returns the family of a config.json; raises ModelFolderError with the supported families if it has no table."""
    named = [OTHER_NAMES.get(name, name) for name in list_of(config, "architectures", str)]
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture].variant(config)
    for architecture in named:
        if architecture in REFUSED:
            raise unsupported(f"architecture {architecture} is not supported: {REFUSED[architecture]}")
    found = ", ".join(named) or f"none (model_type {short(config.get('model_type'))})"
    raise unsupported(f"architecture {found} is not supported; supported are {', '.join(FAMILIES)}")


def read_shape(config: dict[str, Any], family: Family) -> ModelShape:
    """Reads the model's sizes; raises ModelFolderError for features that Megatron's GPTModel lacks."""
    _refuse_unsupported(config, family)
    hidden_size = positive_int(config, "hidden_size")
    attention = {} if family.has_latent_attention else _grouped_attention(config, family, hidden_size)
    num_layers = positive_int(config, "num_hidden_layers")
    own = family.own_sizes(config)
    num_experts = own.get("num_experts", 0)
    if num_layers * max(1, num_experts) > _MOST_LAYERS:
        raise ModelFolderError(
            f"config.json has {num_layers} layers of {num_experts} experts, which is a mistake"
        )
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": positive_int(config, "num_attention_heads"),
        **attention,
        "vocab_size": positive_int(config, "vocab_size"),
        "is_tied": flag(config, "tie_word_embeddings", family.default_is_tied),
        "has_qkv_bias": family.has_qkv_bias,
        "has_qk_norm": family.has_qk_norm,
    }
    if "ffn_hidden_size" not in own:
        sizes["ffn_hidden_size"] = positive_int(config, "intermediate_size")
    return ModelShape(**{**sizes, **own})


def _grouped_attention(config: dict[str, Any], family: Family, hidden_size: int) -> dict[str, int]:
    heads = positive_int(config, "num_attention_heads")
    absent = "num_key_value_heads" not in config  # null means as many as heads, in every family
    groups = positive_int(config, "num_key_value_heads", (absent and family.default_query_groups) or heads)
    if heads % groups:
        raise ModelFolderError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    has_head_dim = config.get("head_dim") is not None or family.default_head_dim is not None
    if not has_head_dim and hidden_size % heads:
        raise ModelFolderError(
            f"config.json has no head_dim, and num_attention_heads {heads} does not divide "
            f"hidden_size {hidden_size}"
        )
    head_dim = positive_int(config, "head_dim", default=family.default_head_dim or hidden_size // heads)
    return {"num_query_groups": groups, "head_dim": head_dim}


def _refuse_unsupported(config: dict[str, Any], family: Family) -> None:
    read_quantization(config)
    for key, default, supported in family.fixed_flags:
        if (found := flag(config, key, default)) != supported:
            raise unsupported(
                f"{key} is {str(found).lower()}, which is not supported for {family.architecture}"
            )
    key, activation = family.activation
    if (found := config.get(key, activation)) != activation:
        raise unsupported(f"{key} {short(found)} is not supported; supported is '{activation}'")


def megatron_args(folder: Described, query_groups: int | None = None) -> dict[str, Any]:
    """Returns the values of Megatron's arguments (attributes of its args) for the folder's model.

    ``query_groups`` adds query groups whose weights are zero. Such a group contributes nothing to the output and gets no
    gradient, so the model stays the same in training.

    ``use_rope_scaling`` and ``rope_scaling_factor`` are arguments of GPTModel too. megatron.training 0.19 passes on the
    first but not the second, so the code that builds the model must pass both.
    """
    shape, family = folder.shape, folder.family
    config = family.text_config(folder.config)
    groups = query_groups or shape.num_query_groups
    if shape.latent is not None and groups != shape.num_query_groups:
        raise ValueError(
            f"--rasft-query-groups {groups} does not fit {family.architecture}, whose heads share one latent. Leave it out."
        )
    if groups < shape.num_query_groups:
        raise ValueError(
            f"--rasft-query-groups {groups} is less than the model's {shape.num_query_groups}. "
            "Leave it out, or give a larger number."
        )
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads // shape.num_query_groups * groups,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": shape.head_dim,
        "max_position_embeddings": min(family.longest(config), folder.rope.last_plain or sys.maxsize),
        **(folder.rope.megatron_args() if shape.latent is None else folder.rope.latent_args()),
        "normalization": "RMSNorm",
        "layernorm_epsilon": positive_number(config, "rms_norm_eps", family.default_norm_eps),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": shape.has_qkv_bias,
        "qk_layernorm": shape.has_qk_norm,
        "untie_embeddings_and_output_weights": not shape.is_tied,
        "vocab_size": shape.vocab_size,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": positive_number(config, "initializer_range", 0.02),
        "num_experts": None,
        **window_args(config, family),
        **family.own_args(config, shape),
    }
