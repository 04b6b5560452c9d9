"""Layer modules in plain torch: RMSNorm and scaled-dot-product core attention.

They serve on a CPU, on a GPU without Transformer Engine, and for generation everywhere. Unlike
Megatron's local modules they allow sequence parallelism, context parallelism and packed sequences.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight tells Megatron when it needs a sequence-parallel gradient sum."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # finalize_model_grads sums the gradient over the tensor-parallel group where this is set.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h], normalised in fp32."""
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


def zigzag_positions(length: int, rank: int, size: int) -> Tensor:
    """Positions of a sequence of ``length`` tokens that context-parallel ``rank`` of ``size`` holds.

    The sequence is cut into 2 * size equal chunks; rank r holds chunks r and 2 * size - 1 - r, so
    that causal attention costs every rank the same (the order Megatron and Transformer Engine use).

    Returns:
        [length / size] int64, increasing.
    """
    if size == 1:
        return torch.arange(length)
    chunk = length // (2 * size)
    assert chunk * 2 * size == length, f"sequence of {length} tokens is not a multiple of 2 * cp = {2 * size}"
    first, last = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(last, last + chunk)])


class SdpaCoreAttention(MegatronModule):
    """Causal grouped-query attention by torch's scaled_dot_product_attention.

    Under context parallelism the keys and values of the group are gathered; packed sequences attend
    within their own segment only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])).cp
        self.softmax_scale = softmax_scale
        # Torch prefers cuDNN's attention on Hopper. That builds a plan, which takes tens of milliseconds, for each new
        # length and keeps all of them, and here lengths change with every micro-batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"--attention-dropout {dropout} needs Transformer Engine's attention; the plain attention has "
                "none. Set it to 0, which is what reasoning models are fine-tuned with."
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [s/cp, b, n, d], or [t/cp, n, d] when packed.
            key: [s_kv/cp, b, n_kv, d], or [t/cp, n_kv, d].
            value: like key.
            attention_mask: None; attention is causal.

        Returns:
            [s/cp, b, n * d], or [t/cp, n * d] when packed.
        """
        if packed_seq_params is not None:
            out = self._packed(query, key, value, packed_seq_params)
            return out.reshape(out.shape[0], -1)
        assert attention_mask is None, "the plain attention is causal and takes no mask"
        out = self._causal(query, key, value)
        return out.reshape(out.shape[0], out.shape[1], -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[s, b, n, d] -> [s, b, n, d] without communication; causal unless a [s, s_kv] bool mask is given."""
        query, key, value = (
            x.permute(1, 2, 0, 3) for x in (query, key, value)
        )  # [s, b, n, d] -> [b, n, s, d]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.permute(2, 0, 1, 3)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            return self.attend(query, key, value)
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (key, value)
        )
        return self._attend_zigzag(query, key, value, rank, size)

    def _attend_zigzag(self, query: Tensor, key: Tensor, value: Tensor, rank: int, size: int) -> Tensor:
        length = key.shape[0]
        query_positions = zigzag_positions(length, rank, size)
        key_positions = torch.cat([zigzag_positions(length, r, size) for r in range(size)])
        mask = (key_positions[None, :] <= query_positions[:, None]).to(query.device)
        return self.attend(query, key, value, mask)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        bounds = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        starts = [b // size for b in bounds.tolist()]
        if size > 1:
            local = key.shape[0]
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group).view(
                    size, local, *x.shape[1:]
                )
                for x in (key, value)
            )
        outs = []
        for begin, end in itertools.pairwise(starts):
            if begin == end:
                continue
            q = query[begin:end, None]
            if size == 1:
                out = self.attend(q, key[begin:end, None], value[begin:end, None])
            else:
                # [cp, t/cp, n, d] -> this segment's chunks, in the order of the ranks that hold them
                k, v = (x[:, begin:end].reshape(-1, 1, *x.shape[2:]) for x in (key, value))
                out = self._attend_zigzag(q, k, v, rank, size)
            outs.append(out[:, 0])
        return torch.cat(outs)
