"""Families whose layers all have a router and experts."""

from typing import Any

from megatron_rasft.weights.config_values import flag, list_of, positive_int, unsupported
from megatron_rasft.weights.families.declaration import Config, Family
from megatron_rasft.weights.families.entries import ATTENTION, MLP, QK_NORM, Entry
from megatron_rasft.weights.families.layouts import replicated
from megatron_rasft.weights.families.shape import ModelShape


def mixture(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """Entries of a router and its experts, which replace the MLP. Families name the tensors of an expert differently."""
    norm, fc1, fc2 = MLP
    return (
        norm._replace(megatron=("pre_mlp_layernorm.weight",)),
        Entry(
            ("mlp.router.weight",),
            (f"{block}.gate.weight",),
            lambda s: ((s.num_experts, s.hidden_size),),
            replicated(lambda s: s.num_experts),
            is_sharded=False,
        ),
        fc1._replace(
            megatron=(
                "mlp.experts.local_experts.{e}.linear_fc1.weight",
                "mlp.experts.linear_fc1.weight{e}",
            ),
            hf=(f"{block}.experts.{{e}}.{gate}.weight", f"{block}.experts.{{e}}.{up}.weight"),
            is_expert=True,
        ),
        fc2._replace(
            megatron=(
                "mlp.experts.local_experts.{e}.linear_fc2.weight",
                "mlp.experts.linear_fc2.weight{e}",
            ),
            hf=(f"{block}.experts.{{e}}.{down}.weight",),
            is_expert=True,
        ),
    )


def _mixtral_sizes(config: Config) -> dict[str, Any]:
    return {"num_experts": read_num_experts(config, 8)}


def expert_sizes(config: Config, *, size: int, num_experts: int) -> dict[str, Any]:
    """Reads the sizes of the experts; intermediate_size belongs to layers without experts.

    ``size`` and ``num_experts`` are transformers' defaults.
    """
    sparse_step = positive_int(config, "decoder_sparse_step", default=1)
    if list_of(config, "mlp_only_layers", int) or sparse_step != 1:
        raise unsupported(
            f"only some layers have experts (mlp_only_layers {config.get('mlp_only_layers')}, decoder_sparse_step "
            f"{sparse_step}), which is not supported"
        )
    return {
        "ffn_hidden_size": positive_int(config, "moe_intermediate_size", default=size),
        "num_experts": read_num_experts(config, num_experts),
    }


def read_num_experts(config: Config, default: int) -> int:
    """Reads the number of experts, which transformers 5 writes as num_local_experts in every family."""
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    return positive_int(config, key, default)


def router_args(config: Config, shape: ModelShape, default_top_k: int, is_normalized: bool) -> dict[str, Any]:
    """Returns Megatron's arguments for the experts.

    If transformers normalises the weights of the chosen experts, Megatron must take the softmax over these experts alone.
    """
    return {
        "num_experts": shape.num_experts,
        "moe_router_topk": positive_int(config, "num_experts_per_tok", default_top_k),
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_router_pre_softmax": not is_normalized,
    }


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    default_query_groups=8,
    mlp=mixture("block_sparse_moe", gate="w1", up="w3", down="w2"),
    default_max_position_embeddings=131072,
    default_rope_theta=1e6,
    default_norm_eps=1e-5,
    own_sizes=_mixtral_sizes,
    own_args=lambda config, shape: router_args(config, shape, 2, is_normalized=True),
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    default_query_groups=4,
    attention=ATTENTION + QK_NORM,
    mlp=mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    default_max_position_embeddings=32768,
    default_sliding_window=4096,
    has_window_switch=True,
    own_sizes=lambda config: expert_sizes(config, size=768, num_experts=128),
    own_args=lambda config, shape: router_args(
        config, shape, 8, is_normalized=flag(config, "norm_topk_prob")
    ),
)
