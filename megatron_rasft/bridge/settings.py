"""Refuses settings of a config.json that Megatron-Bridge does not take over, with which it would build another model than transformers."""

from typing import Any

from megatron_rasft.errors import ModelFolderError


def refuse_lost_settings(config: dict[str, Any], provider: Any) -> None:
    """Refuses sliding windows and scaled rotary embeddings that Megatron-Bridge's provider does not have.

    Megatron-Bridge 0.6.2 ignores them without a warning in families whose other models do not have them, for example the windows of
    EXAONE-4.0-32B.

    Raises:
        ModelFolderError: names the key of config.json.
    """
    if _has_windows(config) and not getattr(provider, "window_size", None):
        raise ModelFolderError(
            "some layers have a sliding window (sliding_window in config.json), which Megatron-Bridge ignores for this family"
        )
    kind = _rope_type(config)
    if kind != "default" and not _scales_rope(provider):
        raise ModelFolderError(f"Megatron-Bridge ignores rope scaling of type {kind!r} for this family")


def _has_windows(config: dict[str, Any]) -> bool:
    if kinds := config.get("layer_types"):
        return "sliding_attention" in kinds
    return bool(config.get("sliding_window")) and config.get("use_sliding_window") is not False


def _rope_type(config: dict[str, Any]) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _scales_rope(provider: Any) -> bool:
    """Returns whether the provider scales its rotary embedding, by any of Megatron's fields."""
    return bool(
        getattr(provider, "rope_scaling", False)
        or getattr(provider, "seq_len_interpolation_factor", None)
        or getattr(provider, "rope_scaling_factor", 1.0) != 1.0
        or "yarn" in (getattr(provider, "position_embedding_type", ""), getattr(provider, "rope_type", ""))
    )
