"""Reads a config.json: the model's sizes, and Megatron's arguments for the same model.

This module refuses every setting with which Megatron would compute another result than transformers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.files import read_json_object
from megatron_rasft.weights.families import FAMILIES, REFUSED, Family, ModelShape

_MEGATRON_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Values that are fixed in Megatron's RotaryEmbedding._apply_scaling (core/models/common/embeddings)."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base, and Llama 3's scaling factor (None: no scaling)."""

    theta: float
    llama3_factor: float | None


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

    @classmethod
    def read(cls, path: Path) -> "ModelDescription":
        """Reads config.json; raises ModelFolderError with one line that names the folder and the mistake."""
        try:
            config = read_config(path)
            family = read_family(config)
            return cls(config, family, read_shape(config, family), read_rope(config, family))
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
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    for architecture in named:
        if architecture in REFUSED:
            raise ModelFolderError(
                f"architecture {architecture} cannot be converted: {REFUSED[architecture]}"
            )
    found = ", ".join(map(str, named)) or f"none (model_type {config.get('model_type')!r})"
    raise ModelFolderError(f"architecture {found} is not supported; supported are {', '.join(FAMILIES)}")


def _positive_int(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelFolderError(f"config.json must have a positive integer {key}, found {value!r}")
    return value


def read_shape(config: dict[str, Any], family: Family) -> ModelShape:
    """Reads the model's sizes; raises ModelFolderError for features that Megatron's GPTModel lacks."""
    _refuse_unsupported(config, family)
    hidden_size = _positive_int(config, "hidden_size")
    heads = _positive_int(config, "num_attention_heads")
    groups = _positive_int(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise ModelFolderError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    head_dim = config.get("head_dim") or family.default_head_dim
    if head_dim is None and hidden_size % heads:
        raise ModelFolderError(
            f"config.json has no head_dim, and num_attention_heads {heads} does not divide "
            f"hidden_size {hidden_size}"
        )
    return ModelShape(
        num_layers=_positive_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_ffn_hidden_size(config),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim or hidden_size // heads,
        vocab_size=_positive_int(config, "vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=family.has_qkv_bias,
        has_qk_norm=family.has_qk_norm,
        num_experts=_num_experts(config) if family.has_experts else 0,
    )


def _ffn_hidden_size(config: dict[str, Any]) -> int:
    """Inner size of the MLP or of one expert. If the key moe_intermediate_size exists, intermediate_size belongs to layers without
    experts."""
    key = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    return _positive_int(config, key)


def _num_experts(config: dict[str, Any]) -> int:
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    return _positive_int(config, key)


def _refuse_unsupported(config: dict[str, Any], family: Family) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelFolderError(
            f"the model is quantized (quantization_config, {method}); use a folder with plain bf16, fp16 or "
            "fp32 weights"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ModelFolderError(f"{key} is true, which is not supported for {family.architecture}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelFolderError(f"hidden_act {activation!r} is not supported; supported is 'silu'")
    if _uses_sliding_window(config, family):
        key, value = (
            ("use_sliding_window", "false") if family.has_window_switch else ("sliding_window", "null")
        )
        raise ModelFolderError(
            "sliding-window attention is in use, which is not supported; if the model was trained with full "
            f"attention, or if your sequences fit in the window, set {key} to {value} in config.json"
        )
    if family.has_experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise ModelFolderError(
            f"only some layers have experts (mlp_only_layers {config.get('mlp_only_layers')}, decoder_sparse_step "
            f"{config.get('decoder_sparse_step', 1)}), which is not supported"
        )


def _uses_sliding_window(config: dict[str, Any], family: Family) -> bool:
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        return True
    window = config.get("sliding_window", family.default_sliding_window)
    if not family.has_window_switch:
        longest = config.get("max_position_embeddings", family.default_max_position_embeddings)
        return window is not None and window < longest
    if not config.get("use_sliding_window", False) or window is None:
        return False
    if not family.has_max_window_layers:
        return True
    # transformers applies the window to layers from max_window_layers on; its default is 28
    first_windowed = config.get("max_window_layers")
    return (28 if first_windowed is None else first_windowed) < _positive_int(config, "num_hidden_layers")


def read_rope(config: dict[str, Any], family: Family) -> Rope:
    """Reads the rotary embedding, in the form of transformers 5 (rope_parameters) or of earlier releases (rope_theta,
    rope_scaling)."""
    # if both keys exist, transformers uses rope_scaling
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta") or config.get("rope_theta") or family.default_rope_theta
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise ModelFolderError(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    if not isinstance(theta, int | float) or theta != int(theta):
        raise ModelFolderError(f"rope_theta {theta} is not an integer, as Megatron's --rotary-base must be")
    if kind == "default":
        return Rope(theta, None)
    if kind != "llama3":
        raise ModelFolderError(
            f"rope scaling type {kind!r} is not supported; supported are 'default' and 'llama3'"
        )
    rope.setdefault(
        "original_max_position_embeddings",
        config.get("max_position_embeddings", family.default_max_position_embeddings),
    )
    for key, value in _MEGATRON_LLAMA3.items():
        if rope.get(key) != value:
            raise ModelFolderError(
                f"llama3 rope scaling with {key} {rope.get(key)} is not supported: Megatron fixes it at {value:g}"
            )
    if not isinstance(rope.get("factor"), int | float):
        raise ModelFolderError("llama3 rope scaling has no factor")
    return Rope(theta, float(rope["factor"]))


def megatron_args(folder: Described, query_groups: int | None = None) -> dict[str, Any]:
    """Returns the values of Megatron's arguments (attributes of its args) for the folder's model.

    ``query_groups`` adds query groups whose weights are zero. Such a group contributes nothing to the output and gets no
    gradient, so the model stays the same in training.

    ``use_rope_scaling`` and ``rope_scaling_factor`` are arguments of GPTModel too. megatron.training 0.19 passes on the
    first but not the second, so the code that builds the model must pass both.
    """
    shape, config, family = folder.shape, folder.config, folder.family
    groups = query_groups or shape.num_query_groups
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
        "max_position_embeddings": config.get("max_position_embeddings")
        or family.default_max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(folder.rope.theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": folder.rope.llama3_factor is not None,
        "rope_scaling_factor": folder.rope.llama3_factor or 8.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.get("rms_norm_eps", family.default_norm_eps),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": shape.has_qkv_bias,
        "qk_layernorm": shape.has_qk_norm,
        "untie_embeddings_and_output_weights": not shape.is_tied,
        "vocab_size": shape.vocab_size,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config.get("initializer_range", 0.02),
        **(_expert_args(shape, config, family) if shape.num_experts else {"num_experts": None}),
    }


def _expert_args(shape: ModelShape, config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Megatron's arguments for the experts.

    If transformers normalises the weights of the chosen experts, Megatron must take the softmax over these experts alone.
    """
    is_normalized = family.always_normalizes_experts or config.get("norm_topk_prob", False)
    return {
        "num_experts": shape.num_experts,
        "moe_router_topk": _positive_int(config, "num_experts_per_tok"),
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_router_pre_softmax": not is_normalized,
    }
