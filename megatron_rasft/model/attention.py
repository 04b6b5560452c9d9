"""Layer modules in plain torch: RMSNorm and scaled-dot-product core attention.

They are used on CPUs, on GPUs without Transformer Engine, and for sampling everywhere. Unlike Megatron's own modules
without Transformer Engine (fusions/, transformer/dot_product_attention.py) they support sequence parallelism, context
parallelism and packed sequences.
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
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

_SINK_DIMS = 8
"""Dimensions of queries and keys that are added for the sinks. One is used. Kernels want a multiple of 8."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight is marked for Megatron's gradient sum under sequence parallelism.

    Args:
        is_zero_centered: whether the factor is 1 + weight; None: as the config says.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        is_zero_centered: bool | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        if is_zero_centered is None:
            is_zero_centered = config.layernorm_zero_centered_gamma
        self.is_zero_centered = is_zero_centered
        start = torch.full((hidden_size,), float(not is_zero_centered), device=_device(config))
        self.weight = torch.nn.Parameter(start.to(config.params_dtype))
        # Each tensor-parallel rank sees a part of the tokens. finalize_model_grads.py sums the gradients of weights
        # with this attribute over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h], normalised in fp32."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        if self.is_zero_centered:  # multiplied in fp32, because 1 + weight has too many digits for BF16
            return (normed * (1 + self.scale().float())).to(x.dtype)
        return normed.to(x.dtype) * self.scale()

    def scale(self) -> Tensor:
        """Returns the weight as the forward pass uses it."""
        return self.weight


def _device(config: TransformerConfig) -> Any:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


def zigzag_positions(length: int, rank: int, size: int) -> Tensor:
    """Positions in a sequence of ``length`` tokens that context-parallel rank ``rank`` of ``size`` computes.

    The sequence is cut into 2 * size equal chunks. Rank r holds chunks r and 2 * size - 1 - r, because early chunks
    attend to few keys and late ones to many: every rank then has the same work. Megatron (get_batch_on_this_cp_rank in
    core/utils.py) and Transformer Engine use the same order.

    Returns:
        [length / size] int64, increasing.
    """
    if size == 1:
        return torch.arange(length)
    chunk = length // (2 * size)
    assert chunk * 2 * size == length, f"sequence of {length} tokens is not a multiple of 2 * cp = {2 * size}"
    first, last = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(last, last + chunk)])


def _window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Returns the window of a layer, whose number starts at 1. Megatron's window_size has the tokens before and after a query."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    assert config.window_size is not None, "Megatron has just checked it"
    before, after = config.window_size
    assert after == 0, "a causal model sees no later tokens"
    return before + 1


def visible_keys(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Returns which keys causal attention sees.

    Args:
        queries: [n] int64 positions.
        keys: [k] int64 positions.
        window: number of latest tokens that a query sees, its own included; None: all.

    Returns:
        [n, k] bool.
    """
    is_visible = keys[None, :] <= queries[:, None]
    if window is not None:
        is_visible &= keys[None, :] > queries[:, None] - window
    return is_visible


def with_sink_key(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a first key to which every query of a head gives the head's sink as score, and whose value is zero.

    In an added dimension queries have sink / scale, the new key has 1, and the other keys have 0. So every kernel of attention
    computes sinks, and their gradients.

    Args:
        query: [s, b, n, d].
        key: [s_kv, b, n_kv, d].
        value: like key.
        sinks: [n].
        scale: factor of the scores.

    Returns:
        [s, b, n, d + 8], [s_kv + 1, b, n_kv, d + 8] and the same.
    """
    one_hot = torch.zeros(_SINK_DIMS, dtype=query.dtype, device=query.device)
    one_hot[0] = 1
    of_heads = (sinks.to(query.dtype) / scale)[:, None] * one_hot  # [n, 8]
    query = torch.cat([query, of_heads.expand(*query.shape[:2], -1, -1)], -1)
    key, value = (F.pad(x, (0, _SINK_DIMS, 0, 0, 0, 0, 1, 0)) for x in (key, value))
    is_sink = torch.zeros_like(key)
    is_sink[0, ..., -_SINK_DIMS] = 1
    return query, key + is_sink, value


class SdpaCoreAttention(MegatronModule):
    """Causal grouped-query attention with torch's scaled_dot_product_attention, in some layers within a sliding window.

    If the config says so, each head has a learned sink: a score that takes a share of every softmax, but adds nothing to the
    output. It has the name that it has in Megatron's and Transformer Engine's modules.

    Under context parallelism each rank gathers all keys and values of the group and computes its own queries. Packed
    sequences attend only to themselves.
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
        self._groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = self._groups.cp
        self.softmax_scale = softmax_scale
        self.softmax_offset: torch.nn.Parameter | None = None
        """[n/tp], the sinks; None if the model has none."""
        if config.softmax_type == "learnable":
            sinks = torch.zeros(config.num_attention_heads // self._groups.tp.size(), device=_device(config))
            self.softmax_offset = torch.nn.Parameter(sinks.to(config.params_dtype))
        self.window = _window_of(config, layer_number)
        """Number of latest tokens that a query attends to, its own included; None: all."""
        # Torch prefers cuDNN's attention on Hopper. For each new length cuDNN prepares an execution plan, which takes
        # tens of milliseconds and is never freed. Here almost every micro-batch has a new length.
        torch.backends.cuda.enable_cudnn_sdp(False)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"--attention-dropout {dropout} needs Transformer Engine, because the attention in plain torch has no "
                "dropout. Install it, or set the flag to 0, the usual value for fine-tuning reasoning models."
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
        """Computes causal attention. Under context parallelism two all-gathers run, one of the keys and one of the values.

        Args:
            query: [s/cp, b, n, d], or [t/cp, n, d] if packed.
            key: [s/cp, b, n_kv, d], or [t/cp, n_kv, d] if packed.
            value: like key.
            attention_mask: must be None: the mask is always causal.
            packed_seq_params: bounds of packed sequences; None if there is one sequence per row.

        Returns:
            [s/cp, b, n * d], or [t/cp, n * d] if packed.
        """
        if packed_seq_params is not None:
            out = self._packed(query, key, value, packed_seq_params)
            return out.reshape(out.shape[0], -1)
        assert attention_mask is None, "the plain attention is causal and takes no mask"
        out = self._causal(query, key, value)
        return out.reshape(out.shape[0], out.shape[1], -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes attention without communication, within the layer's window.

        Args:
            query: [s, b, n, d].
            key: [s_kv, b, n_kv, d].
            value: like key.
            mask: [s, s_kv] bool, True for keys to attend to. None is causal, within the window, and needs s = s_kv.

        Returns:
            [s, b, n, d].
        """
        if mask is None and self.window is not None and query.shape[0] > self.window:
            return self._attend_in_blocks(query, key, value, self.window)
        if self.softmax_offset is None:
            return _scaled_dot_product(query, key, value, mask, self.softmax_scale)
        dim, scale = query.shape[-1], self.softmax_scale or query.shape[-1] ** -0.5
        query, key, value = with_sink_key(query, key, value, self.softmax_offset, scale)
        if mask is not None:
            return _scaled_dot_product(query, key, value, F.pad(mask, (1, 0), value=True), scale)[..., :dim]
        # A first query for the first key keeps attention causal.
        query = F.pad(query, (0, 0, 0, 0, 0, 0, 1, 0))
        return _scaled_dot_product(query, key, value, None, scale)[1:, ..., :dim]

    def _attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """Computes causal attention within a window, for a block of queries at a time, which see the keys of at most two blocks."""
        outs = []
        for begin in range(0, query.shape[0], window):
            end, first = min(begin + window, query.shape[0]), max(0, begin - window + 1)
            places = torch.arange(first, end, device=query.device)
            mask = visible_keys(places[begin - first :], places, window)
            outs.append(self.attend(query[begin:end], key[first:end], value[first:end], mask))
        return torch.cat(outs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describes the sinks, which tensor-parallel ranks split, for Megatron's checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._groups.tp,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

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
        mask = visible_keys(query_positions, key_positions, self.window).to(query.device)
        return self.attend(query, key, value, mask)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        bounds = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        starts = [bound // size for bound in bounds.tolist()]  # each rank holds 1 / size of every sequence
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
                # [cp, t/cp, n, d] -> the chunks of this sequence, ordered by the rank that holds them
                k, v = (x[:, begin:end].reshape(-1, 1, *x.shape[2:]) for x in (key, value))
                out = self._attend_zigzag(q, k, v, rank, size)
            outs.append(out[:, 0])
        return torch.cat(outs)


def _scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Computes attention of [s, b, n, d]; causal if ``mask`` is None."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, n, d] -> [b, n, s, d]
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.permute(2, 0, 1, 3)
