"""MLPs of GLM-4.5 and DeepSeek-V3: one MLP in the first layers, then experts behind a sigmoid router, and shared experts."""

import re
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.config_values import flag, positive_int, positive_number, unsupported
from megatron_rasft.weights.families.declaration import Config
from megatron_rasft.weights.families.entries import MLP_NORM, Entry, gated_mlp
from megatron_rasft.weights.families.experts import mixture
from megatron_rasft.weights.families.layouts import replicated
from megatron_rasft.weights.families.shape import ModelShape

_EXPERTS_PER_GROUP_SCORE = 2
"""transformers scores a group of experts by the sum of its two best. Megatron takes moe_router_topk / moe_router_group_topk of them
(group_limited_topk in core/transformer/moe/moe_utils.py)."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_DENSE_MLP = (MLP_NORM, *gated_mlp("mlp", "mlp", lambda s: s.dense_ffn_hidden_size))

_ROUTING_BIAS = Entry(
    ("mlp.router.expert_bias",),
    ("mlp.gate.e_score_correction_bias",),
    lambda s: ((s.num_experts,),),
    replicated(lambda s: s.num_experts),
    is_sharded=False,
    is_buffer=True,
)

MIXTURE = (
    *mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    _ROUTING_BIAS,
    *gated_mlp("mlp.shared_experts", "mlp.shared_experts", lambda s: s.shared_ffn_hidden_size),
)


def mlp_entries(shape: ModelShape, layer: int) -> tuple[Entry, ...]:
    """The entries of a layer's MLP and of the norm before it."""
    return _DENSE_MLP if layer < shape.num_dense_layers else MIXTURE


def is_after_last_layer(name: str, shape: ModelShape) -> bool:
    """Returns whether a tensor belongs to a layer for multi-token prediction. These layers are numbered after those of the model."""
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= shape.num_layers


def mixture_sizes(config: Config, *, num_dense_layers: int, size: int, num_experts: int) -> dict[str, Any]:
    """Reads the sizes of experts and shared experts, behind ``num_dense_layers`` layers without them.

    ``size`` and ``num_experts`` are transformers' defaults.
    """
    num_layers = positive_int(config, "num_hidden_layers")
    if num_dense_layers >= num_layers:
        raise ModelFolderError(
            f"none of the {num_layers} layers has experts: the first {num_dense_layers} have none"
        )
    size = positive_int(config, "moe_intermediate_size", default=size)
    number = "n_routed_experts" if config.get("n_routed_experts") is not None else "num_local_experts"
    return {
        "ffn_hidden_size": size,
        "num_experts": positive_int(config, number, default=num_experts),
        "num_dense_layers": num_dense_layers,
        "dense_ffn_hidden_size": positive_int(config, "intermediate_size"),
        "shared_ffn_hidden_size": size * positive_int(config, "n_shared_experts", default=1),
    }


def mixture_args(
    config: Config, shape: ModelShape, *, top_k: int, scaling: float, num_groups: int, top_groups: int
) -> dict[str, Any]:
    """Returns Megatron's arguments for the experts. The keyword arguments are transformers' defaults.

    Training does not change the routing bias (moe_router_bias_update_rate 0), so the reference has the same one.
    """
    top_k = positive_int(config, "num_experts_per_tok", default=top_k)
    _check_normalization(config, top_k)
    return {
        "num_experts": shape.num_experts,
        "moe_router_topk": top_k,
        "ffn_hidden_size": shape.dense_ffn_hidden_size,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size,
        "moe_layer_freq": [int(layer >= shape.num_dense_layers) for layer in range(shape.num_layers)],
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": positive_number(config, "routed_scaling_factor", scaling),
        **_group_args(config, shape.num_experts, top_k, num_groups, top_groups),
    }


def _check_normalization(config: Config, top_k: int) -> None:
    """Refuses weights of experts that do not sum to 1, or a single expert whose weight is 1: Megatron normalises if there are several."""
    is_normalized = flag(config, "norm_topk_prob", default=True)
    if is_normalized != (top_k > 1):
        raise unsupported(
            f"norm_topk_prob {str(is_normalized).lower()} with num_experts_per_tok {top_k} is not supported: Megatron normalises the "
            "sigmoid weights of several experts, and never that of one"
        )


def _group_args(
    config: Config, num_experts: int, top_k: int, num_groups: int, top_groups: int
) -> dict[str, Any]:
    """Returns Megatron's arguments for routing within groups of experts; None if every group is always chosen."""
    groups = positive_int(config, "n_group", default=num_groups)
    top = positive_int(config, "topk_group", default=top_groups)
    if num_experts % groups or not top <= groups or top_k > num_experts // groups * top:
        raise ModelFolderError(
            f"n_group {groups} and topk_group {top} do not fit {num_experts} experts, {top_k} per token"
        )
    if top == groups:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if top_k // top != _EXPERTS_PER_GROUP_SCORE:
        raise unsupported(
            f"topk_group {top} with num_experts_per_tok {top_k} is not supported: Megatron would score groups by {top_k // top} experts "
            f"instead of {_EXPERTS_PER_GROUP_SCORE}"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": top}
