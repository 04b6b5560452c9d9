"""A model folder as Megatron-Bridge describes it, for families without a table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rasft.bridge.package import import_auto_bridge
from megatron_rasft.bridge.settings import refuse_lost_settings
from megatron_rasft.errors import ModelFolderError, first_line
from megatron_rasft.weights.architecture import ModelDescription, read_config
from megatron_rasft.weights.families import ModelShape
from megatron_rasft.weights.folder import (
    ModelFolder,
    check_tokenizer,
    open_shards,
    shard_files,
)
from megatron_rasft.weights.quantization import CONFIG_KEY
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
            config = read_config(path)
            _refuse_model_with_table(path)
            _refuse_quantized(config)
            vocab_size = _vocab_size(config)
            auto_bridge = import_auto_bridge(FLAG)
            shards, stored = open_shards(path, shard_files(path))
            refuse_quantized(stored)
            bridge = _call(lambda: auto_bridge.from_hf_pretrained(str(path)))
            provider = _call(lambda: bridge.to_megatron_provider(load_weights=False))
            refuse_lost_settings(config, provider)
            check_tokenizer(path, vocab_size)
        except ModelFolderError as error:
            raise ModelFolderError(f"model folder {path}: {error}") from error.__cause__
        return cls(
            path=path,
            config=config,
            shape=_shape(provider, vocab_size),
            tensors=stored,
            buffers=set(),
            _shards=shards,
            bridge=bridge,
            provider=provider,
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


def _vocab_size(config: dict[str, Any]) -> int:
    size = config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise ModelFolderError(
            "config.json has no vocab_size at its top level: models of several parts (text and vision) cannot be trained here"
        )
    return size


def _call[T](work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        # Megatron-Bridge raises many kinds of errors for models that it does not support.
        raise ModelFolderError(f"Megatron-Bridge cannot describe the model: {first_line(error)}") from error


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
