"""Multi-latent attention (DeepSeek-V3) in Megatron's layers, for both kinds of linear layers."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rasft.model.attention import RMSNorm

_LATENT_EPS = 1e-6
"""transformers gives the norms of the latents this constant, whatever config.json says (DeepseekV3Attention)."""


class LatentNorm(RMSNorm):
    """The norm of a latent, with an epsilon of its own."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **unused: Any) -> None:
        super().__init__(config, hidden_size, eps=_LATENT_EPS)


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, with the right gradient of the keys' positions if plain layers are tensor-parallel.

    Plain layers split the down projection over the ranks. Each rank's heads then give a part of the gradient of the one
    key with positions that all heads share. Megatron sums these parts only if the latents are split over the sequence.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Returns the classes of the layers. The norms are never fused with projections, and queries without latent have none.

        Megatron's resolver (mla_qk_norm_config.py) would give the latter a fused norm.
        """
        linear = submodules.linear_q_proj
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {**dict.fromkeys(names, linear), "q_layernorm": LatentNorm, "kv_layernorm": LatentNorm}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, latent = super()._qkv_down_projection(hidden_states)
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if latent.shape[-1] == sum(sizes):
            return query, latent
        latent = gather_from_tensor_model_parallel_region(latent)
        if self.config.sequence_parallel:
            return query, scatter_to_sequence_parallel_region(latent)
        compressed, positions = latent.split(sizes, -1)
        return query, torch.cat([compressed, copy_to_tensor_model_parallel_region(positions)], -1)
