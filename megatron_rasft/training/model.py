"""Builds model chunks: with Transformer Engine's layers if --transformer-impl asks for them, otherwise with plain torch."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_rasft.training.attention import RMSNorm, SdpaCoreAttention


def build_chunk(
    args: Any, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any
) -> GPTModel:
    """Builds one chunk of the model with random weights. Megatron's set-up functions call it with these arguments."""
    config = core_transformer_config_from_args(args)
    config.variable_seq_lengths = False  # all micro-batches of a step have one shape
    if args.distributed_backend == "gloo":
        # gloo sends asynchronously and reads the tensor later, but Megatron would free its storage after the call.
        config.deallocate_pipeline_outputs = False
    return GPTModel(
        config,
        layer_spec(config, vp_stage),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        vp_stage=vp_stage,
    )


def layer_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Returns the specification of the decoder block for GPTModel.

    With ``config.transformer_impl`` "transformer_engine" the layers are Megatron's own TE layers, otherwise the same layers with
    this package's RMSNorm and SdpaCoreAttention. Parameter names in a checkpoint are the same for both.
    """
    kind: dict[str, Any] = {
        "qk_layernorm": config.qk_layernorm,
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
    }
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**kind)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", **kind)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # Megatron renames this norm in checkpoints as if it were fused with a dense MLP, which an MoE layer does not have.
        names = layer.sharded_state_dict_keys_map
        layer.sharded_state_dict_keys_map = {k: v for k, v in names.items() if k != "pre_mlp_layernorm."}
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)
