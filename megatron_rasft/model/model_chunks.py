"""Builds model chunks: with Transformer Engine's layers if --transformer-impl asks for them, otherwise with plain torch."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.argument_utils import core_transformer_config_from_args
from torch import Tensor

from megatron_rasft.model.attention import RMSNorm, SdpaCoreAttention
from megatron_rasft.model.delta_net import delta_pattern, engine_block, plain_delta_layer
from megatron_rasft.model.extended_model import EXTENSIONS, ExtendedConfig, ExtendedModel, extend_layer
from megatron_rasft.model.latent_attention import LatentAttention


def config_class(args: Any) -> type[TransformerConfig]:
    """Returns the class of the configuration for a model's arguments."""
    return ExtendedConfig if EXTENSIONS & vars(args).keys() else TransformerConfig


def model_class(config: TransformerConfig) -> type[GPTModel]:
    """Returns the class of the model. docs/architecture.md says what a move to HybridModel takes."""
    return ExtendedModel if isinstance(config, ExtendedConfig) else GPTModel


class ExpertOutput(RowParallelLinear):
    """The second layer of an expert with biases, in plain torch.

    Megatron adds the bias to the result in place (MLP.forward in transformer/mlp.py). autograd forbids this for the result of the
    reduction over ranks, which is the layer's own product if there is one rank.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[t, f] -> ([t, h], bias)."""
        output, bias = super().forward(input_)
        return output.clone(), bias


def build_chunk(
    args: Any, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any
) -> GPTModel:
    """Builds one chunk of the model with random weights. Megatron's set-up functions call it with these arguments."""
    config = run_config(args)
    chunk = model_class(config)(
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
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        vp_stage=vp_stage,
    )
    for name, parameter in chunk.named_parameters():
        if name.endswith("softmax_offset"):
            # Tensor-parallel ranks split the sinks. Without this mark the gradient's norm would have those of one rank only.
            parameter.tensor_model_parallel = True
        elif ".experts." in name and ".bias" in name:
            # Experts are not split, so each rank has the whole gradient of its own tokens. Megatron would sum it over ranks twice.
            parameter.sequence_parallel = False
    return chunk


def run_config(args: Any) -> TransformerConfig:
    """Returns Megatron's configuration of the layers for a run's arguments."""
    config: TransformerConfig = core_transformer_config_from_args(args, config_class(args))
    config.variable_seq_lengths = False  # all micro-batches of a step have one shape
    if args.distributed_backend == "gloo":
        # gloo sends asynchronously and reads the tensor later, but Megatron would free its storage after the call.
        config.deallocate_pipeline_outputs = False
    return config


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns the specification of the decoder block for GPTModel.

    With ``config.transformer_impl`` "transformer_engine" the layers are Megatron's own TE layers, otherwise the same layers with
    this package's RMSNorm and SdpaCoreAttention. Parameter names in a checkpoint are the same for both.
    """
    if config.transformer_impl == "transformer_engine":
        if config.experimental_attention_variant is not None:
            return engine_block(config, vp_stage)
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        if config.multi_latent_attention:
            for spec in block.layer_specs:
                spec.submodules.self_attention.module = LatentAttention
        elif isinstance(config, ExtendedConfig):
            for spec in {
                id(spec): spec for spec in block.layer_specs
            }.values():  # layers share a specification
                extend_layer(spec, config)
        return block
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    last = first + get_num_layers_to_build(config, vp_stage)
    kinds = list(zip(layers_with_experts(config), delta_pattern(config), strict=True))[first:last]
    specs = {kind: _plain_layer(config, has_experts=kind[0], is_delta=kind[1]) for kind in set(kinds)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=RMSNorm)


def layers_with_experts(config: TransformerConfig) -> list[bool]:
    """Returns for each layer of the model whether it has experts, as Megatron reads --moe-layer-freq."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [has_experts == 1 for has_experts in frequency]


def _plain_layer(config: TransformerConfig, *, has_experts: bool, is_delta: bool) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm and has_experts,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.multi_latent_attention:
        # As in Transformer Engine's layers, only the norm before a dense MLP is fused with it.
        layer.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if has_experts:
        # Megatron renames this norm in checkpoints as if it were fused with a dense MLP, which an MoE layer does not have.
        names = layer.sharded_state_dict_keys_map
        layer.sharded_state_dict_keys_map = {k: v for k, v in names.items() if k != "pre_mlp_layernorm."}
    if has_experts and config.add_bias_linear:
        experts: Any = layer.mlp.keywords["submodules"].experts
        experts.keywords["submodules"].linear_fc2 = ExpertOutput
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.multi_latent_attention:
        layer.self_attention.module = LatentAttention
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if isinstance(config, ExtendedConfig):
        extend_layer(spec, config)
    return plain_delta_layer(spec) if is_delta else spec
