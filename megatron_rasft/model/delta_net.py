"""The layers of models that mix gated delta nets with full attention: their specification, and the norm inside of them."""

import copy
from typing import Any

import torch
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import gated_delta_net
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common, gdn
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rasft.model import delta_rule
from megatron_rasft.model.attention import RMSNorm


class HeadNorm(RMSNorm):
    """The norm of a delta net's heads. Its weight is not zero-centred, even if those of the other norms are.

    Each tensor-parallel rank normalises its own heads. Megatron sums the gradients of such a weight only if it is named q_layernorm
    or k_layernorm, or under sequence parallelism (finalize_model_grads.py), so the sum is part of the backward pass here.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(config, hidden_size, eps, is_zero_centered=False)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self._tp_group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp

    def scale(self) -> Tensor:
        return copy_to_tensor_model_parallel_region(self.weight, group=self._tp_group)


def use_plain_delta_rule() -> None:
    """Makes Megatron's gated delta nets use the functions in plain torch, where flash-linear-attention has no kernels.

    Megatron imports the kernels as names of these modules, and refuses to build a layer without them.
    """
    if common.HAVE_FLA and torch.cuda.is_available():
        return
    for module in (common, gdn, gated_delta_net):
        for name, function in {
            "HAVE_FLA": True,
            "l2norm": delta_rule.l2norm,
            "causal_conv1d": delta_rule.causal_conv1d,
            "chunk_gated_delta_rule": delta_rule.chunk_gated_delta_rule,
        }.items():
            if hasattr(module, name):
                setattr(module, name, function)


def plain_delta_layer(attention_layer: ModuleSpec) -> ModuleSpec:
    """Returns a layer with a gated delta net in place of the attention of a layer in plain torch."""
    use_plain_delta_rule()
    layer = copy.copy(attention_layer)
    layer.submodules = copy.copy(attention_layer.submodules)
    layer.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=HeadNorm, out_proj=RowParallelLinear
        ),
    )
    names = layer.submodules.sharded_state_dict_keys_map
    layer.submodules.sharded_state_dict_keys_map = names | {
        "input_layernorm.": "self_attention.in_proj.layer_norm_"
    }
    return layer


def engine_block(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns Megatron's specification of this stage with Transformer Engine's layers, and with this package's norm of heads."""
    block = get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage)
    for layer in block.layer_specs or ():
        mixer = layer.submodules.self_attention
        if mixer.module is GatedDeltaNet:
            mixer.submodules.out_norm = HeadNorm
    return block


def delta_pattern(config: TransformerConfig) -> list[bool]:
    """Returns for every layer of the model whether it is a gated delta net."""
    if config.experimental_attention_variant is None:
        return [False] * config.num_layers
    return [bool(kind) for kind in get_linear_attention_pattern(config)]
