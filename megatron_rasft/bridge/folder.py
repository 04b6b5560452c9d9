"""A model folder as Megatron-Bridge describes it, for families without a table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rasft.bridge.package import import_auto_bridge
from megatron_rasft.bridge.settings import refuse_other_model
from megatron_rasft.errors import ModelFolderError, first_line
from megatron_rasft.weights.architecture import ModelDescription, read_config
from megatron_rasft.weights.config_values import list_of, positive_int
from megatron_rasft.weights.families import ModelShape
from megatron_rasft.weights.folder import ModelFolder, check_tokenizer
from megatron_rasft.weights.quantization import CONFIG_KEY
from megatron_rasft.weights.shard_files import open_shards, shard_files
from megatron_rasft.weights.stored_tensors import refuse_quantized

FLAG = "--model-source bridge"


@dataclass(frozen=True, kw_only=True)
class BridgedFolder(ModelFolder):
    """A folder opened by ``BridgedFolder.open``. ``tensors`` are those of its files."""

    bridge: Any = field(repr=False)
    """AutoBridge of the folder."""
    provider: Any = field(repr=False)
    """Megatron-Bridge's configuration of the model, which also builds it."""
    buffers: set[str]
    """``BridgedTensors.load`` enters those that Megatron-Bridge keeps in another type than the parameters."""

    @classmethod
    def open(cls, path: str | Path) -> "BridgedFolder":
        """Opens a folder whose family Megatron-Bridge supports. Reads no weights.

        Raises:
            ValueError: Megatron-Bridge is missing.
            ModelFolderError: one line with the folder and the reason.
        """
        path = Path(path)
        try:
            _refuse_model_with_table(path)
            described = describe(path)
            shards, stored = open_shards(path, shard_files(path))
            refuse_quantized(stored)
            check_tokenizer(path, described.vocab_size)
        except ModelFolderError as error:
            raise ModelFolderError(f"model folder {path}: {error}") from error.__cause__
        return cls(
            path=path,
            config=described.config,
            shape=_shape(described.provider, described.vocab_size),
            tensors=stored,
            buffers=set(),
            _shards=shards,
            bridge=described.bridge,
            provider=described.provider,
        )

    @property
    def architecture(self) -> str:
        return ", ".join(self.config["architectures"])

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def megatron_args(self) -> dict[str, Any]:
        """Returns the values of Megatron's arguments (attributes of its args) that describe this model; see ``weights.megatron_args``.

        Megatron reads them for its own checks, its checkpoints and its count of operations. ``provider`` builds the model.
        """
        shape, provider = self.shape, self.provider
        args = {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "group_query_attention": True,
            "num_query_groups": shape.num_query_groups,
            "kv_channels": shape.head_dim,
            "max_position_embeddings": self.config.get("max_position_embeddings") or provider.seq_length,
            "position_embedding_type": "rope",
            "normalization": provider.normalization,
            "layernorm_epsilon": provider.layernorm_epsilon,
            "swiglu": bool(provider.gated_linear_unit),
            "add_bias_linear": provider.add_bias_linear,
            "add_qkv_bias": provider.add_qkv_bias,
            "qk_layernorm": provider.qk_layernorm,
            "untie_embeddings_and_output_weights": not shape.is_tied,
            "vocab_size": shape.vocab_size,
            "padded_vocab_size": shape.vocab_size,  # Megatron-Bridge neither pads nor trims
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "num_experts": shape.num_experts or None,
        }
        if shape.num_experts:
            args |= {
                "moe_router_topk": provider.moe_router_topk,
                "moe_ffn_hidden_size": shape.ffn_hidden_size,
            }
        return args


class _Description(NamedTuple):
    """What Megatron-Bridge makes of a config.json."""

    config: dict[str, Any]
    vocab_size: int
    bridge: Any
    provider: Any


def describe(path: Path) -> _Description:
    """Describes a model by its config.json alone.

    Raises:
        ValueError: Megatron-Bridge is missing.
        ModelFolderError: Megatron-Bridge does not support the model, or this program cannot train it.
    """
    config = read_config(path)
    _refuse_parts(config)
    _refuse_quantized(config)
    vocab_size = positive_int(config, "vocab_size")
    auto_bridge = import_auto_bridge(FLAG)
    bridge = _call(lambda: auto_bridge.from_hf_pretrained(str(path)))
    provider = _call(lambda: bridge.to_megatron_provider(load_weights=False))
    refuse_other_model(bridge.hf_pretrained.config.to_dict() | config, provider)
    return _Description(config, vocab_size, bridge, provider)


def _refuse_model_with_table(path: Path) -> None:
    """Refuses a model that our tables can build: they are tested in every layout, and the trainer can sample from it."""
    try:
        known = ModelDescription.read(path)
    except ModelFolderError:
        return
    raise ModelFolderError(
        f"{FLAG} is for models without a table, and {known.family.architecture} has one. Leave the flag out"
    )


def _refuse_quantized(config: dict[str, Any]) -> None:
    if config.get(CONFIG_KEY):
        raise ModelFolderError(
            f"config.json has a {CONFIG_KEY}, and {FLAG} reads no quantized weights; use a folder with plain bf16, fp16 or fp32 weights"
        )


def _refuse_parts(config: dict[str, Any]) -> None:
    for architecture in list_of(config, "architectures", str):
        if architecture.endswith("ForConditionalGeneration"):
            raise ModelFolderError(
                f"architecture {architecture} is not supported by {FLAG}: models of several parts, such as text and vision"
            )


def _call[T](work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        # Megatron-Bridge raises many kinds of errors for models that it does not support.
        reason = first_line(error).removeprefix("✗ ").rpartition("Last error: ")[2]
        raise ModelFolderError(f"Megatron-Bridge cannot describe the model: {reason}") from error


def _shape(provider: Any, vocab_size: int) -> ModelShape:
    heads = provider.num_attention_heads
    num_experts = provider.num_moe_experts or 0
    return ModelShape(
        num_layers=provider.num_layers,
        hidden_size=provider.hidden_size,
        ffn_hidden_size=(num_experts and provider.moe_ffn_hidden_size) or provider.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=provider.num_query_groups or heads,
        head_dim=provider.kv_channels or provider.hidden_size // heads,
        vocab_size=vocab_size,
        is_tied=provider.share_embeddings_and_output_weights,
        has_qkv_bias=provider.add_qkv_bias,
        has_qk_norm=provider.qk_layernorm,
        num_experts=num_experts,
    )
