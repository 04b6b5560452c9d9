"""Refuses models that Megatron-Bridge would build differently from transformers, before anything is loaded."""

from collections.abc import Iterator
from typing import Any

from megatron_rasft.errors import ModelFolderError

_WRONG = {
    "Ernie4_5_MoeForCausalLM": "Megatron-Bridge 0.6.2 routes tokens by a sigmoid, transformers by a softmax",
}
"""Architecture -> how Megatron-Bridge's model differs from that of transformers, in all its sizes."""


def refuse_other_model(config: dict[str, Any], provider: Any) -> None:
    """Refuses a model that this program cannot train as Megatron-Bridge builds it, or that is not the one of transformers.

    Megatron-Bridge 0.6.2 ignores some settings without a warning, for example the windows of EXAONE-4.0-32B.

    Args:
        config: the model's config.json with the defaults of transformers.
        provider: Megatron-Bridge's configuration of the model.

    Raises:
        ModelFolderError: the message has the reason.
    """
    for architecture in config.get("architectures") or ():
        if architecture in _WRONG:
            raise ModelFolderError(f"architecture {architecture} is not supported: {_WRONG[architecture]}")
    if not hasattr(provider, "transformer_layer_spec"):
        raise ModelFolderError(
            "Megatron-Bridge builds another class than Megatron's GPTModel for it, which is not supported"
        )
    if config.get("final_logit_softcapping"):
        raise ModelFolderError(
            "it caps its output logits softly (final_logit_softcapping), but log-probabilities are calculated from hidden states and the "
            "output layer's weight"
        )
    if _has_windows(config) and not getattr(provider, "window_size", None):
        raise ModelFolderError(
            "some layers have a sliding window (sliding_window in config.json), which Megatron-Bridge ignores for this family"
        )
    for kind in _rope_types(config):
        if not _has_rope(provider, kind):
            raise ModelFolderError(f"Megatron-Bridge ignores rope scaling of type {kind!r} for this family")


def _has_windows(config: dict[str, Any]) -> bool:
    if kinds := config.get("layer_types"):
        return "sliding_attention" in kinds
    return bool(config.get("sliding_window")) and config.get("use_sliding_window") is not False


def _rope_types(config: dict[str, Any]) -> Iterator[str]:
    """Yields the kinds of rotary embeddings. Models with windows may have one for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        for settings in (rope, *rope.values()):
            if isinstance(settings, dict):
                yield str(settings.get("rope_type") or settings.get("type") or "default")


def _has_rope(provider: Any, kind: str) -> bool:
    """Returns whether the provider has this kind of rotary embedding. Each kind is in other fields of Megatron."""
    has_llama3 = bool(getattr(provider, "rope_scaling", False))
    if kind == "linear":
        is_divided = getattr(provider, "rope_scaling_factor", 1.0) != 1.0 and not has_llama3
        return is_divided or bool(getattr(provider, "seq_len_interpolation_factor", None))
    if kind == "yarn":
        return "yarn" in (
            getattr(provider, "position_embedding_type", ""),
            getattr(provider, "rope_type", ""),
        )
    return has_llama3 if kind == "llama3" else kind == "default"
