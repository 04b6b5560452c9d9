"""Builds model chunks by Megatron-Bridge's provider, in the layout and precision of a run."""

import argparse
from dataclasses import fields
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rasft.bridge.folder import FLAG, BridgedFolder
from megatron_rasft.errors import ModelFolderError, first_line

_LAYOUT = tuple(f.name for f in fields(ModelParallelConfig))

_RUN = (
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split attention_backend hidden_dropout attention_dropout "
    "calculate_per_token_loss apply_rope_fusion bias_dropout_fusion recompute_granularity recompute_method recompute_num_layers "
    "distribute_saved_activations recompute_modules fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval "
    "fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red "
    "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe fp4_quantizer_factory quant_recipe "
    "moe_aux_loss_coeff moe_z_loss_coeff moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion "
    "moe_router_fusion moe_router_padding_for_quantization moe_router_padding_for_fp8 cp_comm_type transformer_impl "
    "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size batch_invariant_mode use_te_activation_func"
).split()
"""Fields of TransformerConfig that the flags of a run set: pipeline split, precision, recomputation, kernels and communication. All
others describe the architecture, and Megatron-Bridge sets them."""


def refuse_flags(args: argparse.Namespace, folder: BridgedFolder) -> None:
    """Refuses flags that would change the architecture, because Megatron-Bridge sets it, and layouts that it cannot convert.

    Raises:
        ValueError: the message names the flag.
    """
    if folder.shape.vocab_size % args.tensor_model_parallel_size:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} does not divide the vocabulary of "
            f"{folder.shape.vocab_size}, which Megatron-Bridge ({FLAG}) does not pad. Use another size."
        )
    own = {f.name for f in fields(TransformerConfig)} - {*_LAYOUT, *_RUN}
    for name in sorted(own & args.given_flags.keys()):
        wanted, value = getattr(args, name), getattr(folder.provider, name, None)
        if wanted != value:
            raise ValueError(
                f"{args.given_flags[name]} {wanted} is refused: with {FLAG} Megatron-Bridge sets it to {value} for this model. "
                "Leave the flag out."
            )


def build_chunk(
    folder: BridgedFolder,
    config: TransformerConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    is_packed: bool,
) -> GPTModel:
    """Builds one chunk of the model with random weights.

    Args:
        folder: the model.
        config: layout, precision and kernels of the run. Its architecture is not used.
        is_packed: whether the run packs several sequences into a row.

    Raises:
        ModelFolderError: Megatron-Bridge cannot build the model in this layout, or this program cannot train it.
    """
    provider = folder.provider
    for name in (*_LAYOUT, *_RUN):
        setattr(provider, name, getattr(config, name))
    provider.vocab_size, provider.should_pad_vocab = folder.shape.vocab_size, False
    provider.mtp_num_layers = None  # the objective has no loss for them
    provider.moe_router_bias_update_rate = 0.0  # as in our tables, so that the reference has the same bias
    # Its kernels are Apex's, and Megatron's own attention (EXAONE 4) asks for them in 16 bits.
    provider.masked_softmax_fusion = False
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    try:
        provider.finalize()
        chunk = provider.provide(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    except Exception as error:
        # Errors are of many kinds, for layouts and features that a family's classes do not support.
        raise ModelFolderError(
            f"model folder {folder.path}: Megatron-Bridge cannot build the model in this layout: {first_line(error)}"
        ) from error
    _set_epsilon(chunk, provider.layernorm_epsilon)
    if is_packed and any(type(module) is DotProductAttention for module in chunk.modules()):
        raise ModelFolderError(
            f"model folder {folder.path}: the attention that Megatron-Bridge gives {folder.architecture} takes no packed sequences. "
            "Use --rasft-batch-layout padded"
        )
    if unusual := _unusual_output(chunk):
        raise ModelFolderError(
            f"model folder {folder.path}: {FLAG} cannot train {folder.architecture}: {unusual}, but the log-probabilities "
            "are calculated from hidden states and the output layer's weight"
        )
    return chunk


def _set_epsilon(chunk: Any, epsilon: float) -> None:
    """Sets the epsilon of norms after attention and MLP (Gemma, EXAONE 4). Megatron-Bridge 0.6 leaves it at 1e-5 there."""
    for name, module in chunk.named_modules():
        if name.endswith(".post_layernorm"):
            module.eps = epsilon


def _unusual_output(chunk: Any) -> str:
    """Returns how the model calculates its logits, if not by a plain output layer; empty if it does.

    ``training/forward.py`` takes the place of the output layer. Soft caps or scales of logits would be lost.
    """
    if type(chunk).forward is not GPTModel.forward:
        return f"{type(chunk).__name__} has a forward pass of its own"
    if not chunk.post_process:
        return ""
    layer = chunk.output_layer
    if type(layer) is not ColumnParallelLinear:
        return f"its output layer is a {type(layer).__name__}"
    return "its output layer has a bias" if layer.bias is not None else ""
