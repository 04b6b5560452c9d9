"""The declaration of a model family."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_rasft.weights.config_values import positive_int, refusal, short, unsupported
from megatron_rasft.weights.families.entries import ATTENTION, MLP, QK_NORM, QKV_BIAS, Entry, JoinedExperts
from megatron_rasft.weights.families.shape import ModelShape

Config = dict[str, Any]
"""The content of a config.json."""

_WHOLE_MODEL = ("tie_word_embeddings", "quantization_config")
"""Keys outside of text_config that apply to the language model too."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its name in transformers, and its differences from the other families.

    The defaults are those of transformers' configuration classes, because a config.json may omit keys that equal them.
    tests/unit/weights/test_architecture.py compares the two.
    """

    architecture: str
    text_model_type: str | None = None
    """For a model that also sees images: model_type of the language model in config.json's text_config. None: no text_config."""
    text_variants: "tuple[Family, ...]" = ()
    """Families of the same architecture with another text_model_type."""
    is_own_code: bool = False
    """Whether the model's classes are Python code in its folder, and not in transformers. Exports get a copy of that code."""
    prefix: str = "model."
    """Start of the language model's names, except the output layer's."""
    output: str = "lm_head.weight"
    """Name of the output layer."""
    more_defaults: tuple[tuple[str, int], ...] = ()
    """Keys that config.json may omit, and their values, if this class has no field for them."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Key and value of the activation in config.json."""
    attention: tuple[Entry, ...] = ATTENTION
    mlp: tuple[Entry, ...] = MLP
    mixed_layers: Callable[[ModelShape, int], tuple[Entry, ...]] | None = None
    """Returns the entries of a layer, if the layers of a model differ; None: ``attention`` and ``mlp`` are in every layer."""
    joined_experts: tuple[JoinedExperts, ...] = ()
    """Tensors that may take the place of the experts' own tensors in a folder."""
    writes_joined_experts: bool = False
    """Whether a folder is written with these tensors if the template has no weights to imitate."""
    default_head_dim: int | None = None
    """head_dim if config.json omits it; None means hidden_size / num_attention_heads."""
    default_query_groups: int | None = None
    """num_key_value_heads if config.json omits it; None means num_attention_heads."""
    default_max_position_embeddings: int
    default_is_tied: bool = False
    default_rope_theta: float = 10000.0
    default_local_rope_theta: float | None = None
    """Base of the rotary embedding in layers with a sliding window, if they have their own; None: all layers have the same."""
    default_rope: Config | None = field(default=None, hash=False)
    """rope_parameters if config.json omits them; None: no scaling."""
    scales_late_queries: bool = False
    """True if queries from original_max_position_embeddings on are multiplied by a factor that llama_4_scaling_beta gives."""
    default_norm_eps: float = 1e-6
    layer_types: tuple[str, ...] = ("full_attention",)
    """Kinds of layers in config.json's layer_types that the table has, besides sliding_attention."""
    default_sliding_window: int | None = None
    has_window_switch: bool = False
    """True if config.json's sliding_window applies only when use_sliding_window is true."""
    reads_layer_types: bool = False
    """True if sliding_attention in config.json's layer_types gives a layer the window; False: transformers ignores that list."""
    windowed_layers: Callable[[Config], list[bool]] = lambda config: (
        [True] * positive_int(config, "num_hidden_layers")
    )
    """Returns for each layer of a model with a window whether it has the window, if config.json has no layer_types."""
    is_served: bool = True
    """Whether a server of SGLang has taken the weights of this family (benchmarks/served_families.py)."""
    is_window_served: bool = False
    """Whether SGLang's model of this family has the window; False: it attends to all tokens."""
    fixed_flags: tuple[tuple[str, bool, bool], ...] = (
        ("attention_bias", False, False),
        ("mlp_bias", False, False),
    )
    """Flags of config.json for which the table has one value only: key, value if the key is omitted, value of the table."""
    default_partial_rotary: float = 1.0
    """Share of each head's dimensions that the rotary embedding rotates, if config.json omits it."""
    reads_partial_rotary: bool = False
    """Whether transformers reads that share although its default is 1."""
    rotates_neighbours: bool = False
    """Whether the rotary embedding rotates pairs of neighbouring dimensions; False: of dimensions in both halves."""
    long_rope_types: tuple[str, ...] = ()
    """Names of LongRoPE among config.json's types of rope scaling."""
    is_carried: Callable[[str, ModelShape], bool] = lambda name, shape: False
    """Returns whether a stored tensor is not part of the trained model, so that exports get a copy of it."""
    own_sizes: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Returns the fields of ModelShape that only this family has, and refuses what only its config.json can ask for."""
    own_args: Callable[[Config, ModelShape], dict[str, Any]] = lambda config, shape: {}
    """Returns Megatron's arguments that only this family has, or has otherwise than ``megatron_args``."""

    @property
    def layer_entries(self) -> tuple[Entry, ...]:
        """The entries of a layer, for families whose layers do not differ."""
        return self.attention + self.mlp

    def entries(self, shape: ModelShape, layer: int) -> tuple[Entry, ...]:
        """The entries of a layer of a model."""
        return self.layer_entries if self.mixed_layers is None else self.mixed_layers(shape, layer)

    def variant(self, config: Config) -> "Family":
        """The family of the language model in a config.json."""
        text = config.get("text_config")
        found = text.get("model_type") if isinstance(text, dict) else None
        return next((family for family in self.text_variants if family.text_model_type == found), self)

    def text_config(self, config: Config) -> Config:
        """The language model's part of a config.json."""
        if self.text_model_type is None:
            return dict(self.more_defaults) | config
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise refusal("text_config", "an object as", text)
        found = text.get("model_type", self.text_model_type)
        if found != self.text_model_type:
            raise unsupported(
                f"a text_config of model_type {short(found)} is not supported for {self.architecture}"
            )
        return dict(self.more_defaults) | text | {key: config[key] for key in _WHOLE_MODEL if key in config}

    def longest(self, config: Config) -> int:
        """The largest number of positions of a model."""
        return positive_int(config, "max_position_embeddings", default=self.default_max_position_embeddings)

    @property
    def has_qkv_bias(self) -> bool:
        return any(entry in self.attention for entry in QKV_BIAS)

    @property
    def has_qk_norm(self) -> bool:
        return any(entry in self.attention for entry in QK_NORM)

    @property
    def has_partial_rotary(self) -> bool:
        """Whether config.json's partial_rotary_factor has a meaning."""
        return self.reads_partial_rotary or self.default_partial_rotary != 1.0

    @property
    def has_post_norms(self) -> bool:
        """Whether layers also have norms behind attention and MLP."""
        return any("post_norm" in name for entry in self.attention for name in entry.megatron)

    @property
    def has_latent_attention(self) -> bool:
        return any("kv_down_proj" in name for entry in self.attention for name in entry.megatron)

    @property
    def has_sinks(self) -> bool:
        """Whether heads have sinks: learned scores that take a share of each softmax."""
        return any(name.endswith("softmax_offset") for entry in self.attention for name in entry.megatron)

    @property
    def has_expert_biases(self) -> bool:
        """Whether experts have biases. Megatron does not split such experts over tensor-parallel ranks."""
        return any(entry.is_expert and ".bias" in name for entry in self.mlp for name in entry.megatron)

    @property
    def has_experts(self) -> bool:
        return any(entry.is_expert for entry in self.mlp)
