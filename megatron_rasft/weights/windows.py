"""Reads the sliding windows of a config.json."""

from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.config_values import flag, list_of, positive_int, unsupported
from megatron_rasft.weights.families import Family

_WINDOWED = "sliding_attention"


def window_args(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Returns Megatron's arguments for the layers whose tokens see only the latest ones.

    transformers' sliding_window W is the number of visible tokens with the query's own. Megatron's window_size is the
    number of tokens before and after it, (W - 1, 0).
    """
    size = window_of(config, family)
    layers = [] if size is None else windowed_layers(config, family)
    if size is None or not any(layers) or _is_without_effect(size, config, family):
        return {"window_size": None, "window_attn_skip_freq": None}
    return {
        "window_size": (size - 1, 0),
        "window_attn_skip_freq": [int(is_windowed) for is_windowed in layers],
    }


def _is_without_effect(size: int, config: dict[str, Any], family: Family) -> bool:
    return size >= family.longest(config) and family.default_local_rope_theta is None


def window_of(config: dict[str, Any], family: Family) -> int | None:
    """Returns the number of tokens that a layer with a window sees; None: the model has no window."""
    kinds = _layer_types(config, family)
    size = config.get("sliding_window", family.default_sliding_window)
    if family.has_window_switch and not flag(config, "use_sliding_window"):
        size = None  # transformers saves 0 or null then
    elif size is not None:
        size = positive_int(config, "sliding_window", default=size)
    if size is None and _WINDOWED in kinds:
        switch = " with use_sliding_window true" if family.has_window_switch else ""
        raise ModelFolderError(
            f"layer_types has layers with {_WINDOWED}, but config.json has no sliding_window{switch}; add it, or "
            "remove layer_types if the model was trained with full attention"
        )
    return size


def windowed_layers(config: dict[str, Any], family: Family) -> list[bool]:
    """Returns for each layer of a model with a window whether the layer has it. transformers reads layer_types before other keys."""
    if kinds := _layer_types(config, family):
        return [kind == _WINDOWED for kind in kinds]
    return family.windowed_layers(config)


def _layer_types(config: dict[str, Any], family: Family) -> list[str]:
    """Reads the kinds of layers; empty if config.json does not name them."""
    kinds: list[str] = list_of(config, "layer_types", str)
    known = {*family.layer_types, *((_WINDOWED,) if family.reads_layer_types else ())}
    if other := sorted(set(kinds) - known):
        raise unsupported(
            f"layers of type {', '.join(other)} (layer_types) are not supported for {family.architecture}"
        )
    if kinds and family.reads_layer_types and len(kinds) != positive_int(config, "num_hidden_layers"):
        raise ModelFolderError(
            f"layer_types has {len(kinds)} entries for {config['num_hidden_layers']} layers (num_hidden_layers)"
        )
    return kinds
