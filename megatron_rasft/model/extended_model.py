"""Parts of models that Megatron's blocks lack: norms behind attention and MLP, two rotary bases, LongRoPE, scaled embeddings, GELU.

Gemma 3 and Phi-3 need them. weights/families/ sets the arguments.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rasft.model.attention import RMSNorm


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of GELU by tanh, which transformers calls gelu_pytorch_tanh."""
    return F.gelu(x, approximate="tanh")


@dataclass
class ExtendedConfig(TransformerConfig):
    """Megatron's configuration with further settings, which are arguments of the same names."""

    has_post_norms: bool = False
    """Whether the outputs of attention and MLP are normalised before they are added to the residual."""
    has_gelu: bool = False
    """Whether the gate of the MLP is GELU instead of SiLU."""
    embedding_scale: float = 1.0
    """Factor of the embeddings."""
    local_rotary_base: int | None = None
    """Base of the rotary embedding in layers with a sliding window; None: all layers have the same."""
    rotary_divisors: tuple[float, ...] = ()
    """Numbers by which the frequencies are divided, one for each pair of channels; empty: not divided."""
    rotary_factor: float = 1.0
    """Factor of cosine and sine."""

    def __post_init__(self) -> None:
        if self.has_gelu:
            self.gated_linear_unit, self.activation_func = True, gelu_tanh
            self.bias_activation_fusion = False  # Megatron has no fused kernel for a gate without biases
        if self.rotary_factor != 1.0:
            # Attention reads these attributes of YaRN, and multiplies cosine and sine by 0.1 mscale ln(scaling factor) + 1.
            self.yarn_rotary_scaling_factor = math.exp(10.0)
            self.yarn_mscale, self.yarn_mscale_all_dim = self.rotary_factor - 1.0, 0.0
        super().__post_init__()


EXTENSIONS = {field.name for field in fields(ExtendedConfig)} - {
    field.name for field in fields(TransformerConfig)
}
"""Names of the further settings."""


class TwoRotaryEmbeddings(torch.nn.Module):
    """Rotary embedding of layers without and with a window, side by side in the last dimension. Serves as GPTModel's rotary_pos_emb.

    Args:
        distant: the embedding of layers without a window.
        local_base: base in layers with a window.
        width: elements of a head.
    """

    def __init__(self, distant: RotaryEmbedding, local_base: int, width: int) -> None:
        super().__init__()
        self.distant = distant
        on_cpu = distant.inv_freq.device.type == "cpu"
        self.local = RotaryEmbedding(
            width, 1.0, rotary_base=local_base, use_cpu_initialization=on_cpu, cp_group=distant.cp_group
        )

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return int(self.distant.get_rotary_seq_len(*args, **kwargs))

    def get_emb(self, max_seq_len: int) -> Tensor:
        """Returns [s, 1, 1, 2 * d]: the frequencies of all positions."""
        return torch.cat([self.distant.get_emb(max_seq_len), self.local.get_emb(max_seq_len)], -1)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        """Returns [s / cp, 1, 1, 2 * d]: the frequencies of this rank's positions; of all positions if sequences are packed."""
        return torch.cat([self.distant(max_seq_len, **kwargs), self.local(max_seq_len, **kwargs)], -1)


class TwoBaseAttention(SelfAttention):
    """Megatron's attention with the rotary embedding of its kind of layer."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Like Megatron's; ``rotary_pos_emb`` [s, 1, 1, 2 * d] is that of TwoRotaryEmbeddings."""
        config = self.config
        distant, local = rotary_pos_emb.chunk(2, -1)
        has_window = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )
        rotary = (local if has_window else distant).contiguous()
        out: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, rotary_pos_emb=rotary, **kwargs
        )
        return out


class ExtendedModel(GPTModel):
    """GPTModel with the rotary embeddings and the factor of the embeddings of an ExtendedConfig."""

    rotary_pos_emb: Any

    def __init__(self, config: ExtendedConfig, *args: Any, rotary_base: int, **kwargs: Any) -> None:
        super().__init__(config, *args, rotary_base=rotary_base, **kwargs)
        if config.rotary_divisors:
            divisors = self.rotary_pos_emb.inv_freq.new_tensor(config.rotary_divisors)
            channels = torch.arange(len(divisors), device=divisors.device) * 2.0
            # rounded as in transformers (_compute_longrope_parameters in modeling_rope_utils.py)
            self.rotary_pos_emb.inv_freq = 1.0 / (divisors * rotary_base ** (channels / (2 * len(divisors))))
        if config.local_rotary_base is not None:
            self.rotary_pos_emb = TwoRotaryEmbeddings(
                self.rotary_pos_emb, config.local_rotary_base, config.kv_channels
            )
        if self.pre_process and config.embedding_scale != 1.0:
            # transformers rounds the factor to the type of the weights
            factor = float(torch.tensor(config.embedding_scale, dtype=config.params_dtype))
            self.embedding.register_forward_hook(lambda module, args, embedded: embedded * factor)


@functools.cache
def with_norm(linear: type) -> Any:
    """Returns a row-parallel linear layer, of Megatron or of Transformer Engine, whose output is normalised."""

    class NormedLinear(linear):  # type: ignore[misc]
        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(x)
            return self.post_norm(out), bias

    return NormedLinear


def extend_layer(layer: ModuleSpec, config: ExtendedConfig) -> None:
    """Changes the specification of a layer to one with the parts that the configuration asks for."""
    attention = layer.submodules.self_attention
    if config.local_rotary_base is not None:
        attention.module = TwoBaseAttention
    if config.has_post_norms:
        mlp = layer.submodules.mlp.keywords["submodules"]
        attention.submodules.linear_proj = with_norm(attention.submodules.linear_proj)
        mlp.linear_fc2 = with_norm(mlp.linear_fc2)
