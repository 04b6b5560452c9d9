"""Transformer Engine's attention kernels in plain torch.

The forward pass returns the log-sum-exp, from which the backward pass computes gradients. Under context parallelism the backward
pass gets output and log-sum-exp of the whole sequence, and is called once for each block of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_emulation.kernels import CALLS

KERNELS = ("fused_attn_fwd", "fused_attn_bwd")

Piece = tuple[Any, Any]
"""Index of the queries, and index of the keys, of one sequence."""


def _mask(mask_type: Any, bottom_right: bool, num_queries: int, num_keys: int, window: Any) -> Tensor | None:
    """[sq, sk] bool: True where a query may attend to a key. None allows all.

    ``window`` is the number of visible tokens before and after the query, -1 for all.
    """
    if "CAUSAL" not in mask_type.name:
        return None
    shift = num_keys - num_queries if bottom_right or "BOTTOM_RIGHT" in mask_type.name else 0
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(shift)
    return mask if window[0] < 0 else mask.triu(shift - window[0])


def _pieces(
    layout: str,
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
) -> Iterator[Piece]:
    """The sequences of a batch, as indices that select tensors [s, n, d]."""
    if layout.startswith("THD"):
        lengths_q, lengths_kv = cu_q.diff().tolist(), cu_kv.diff().tolist()
        begins_q = (cu_q if padded_q is None else padded_q).tolist()
        begins_kv = (cu_kv if padded_kv is None else padded_kv).tolist()
        for row, (num_q, num_kv) in enumerate(zip(lengths_q, lengths_kv, strict=True)):
            yield slice(begins_q[row], begins_q[row] + num_q), slice(begins_kv[row], begins_kv[row] + num_kv)
    elif layout.startswith("SB"):
        for row in range(q.shape[1]):
            yield (slice(None), row), (slice(None), row)
    else:
        for row in range(q.shape[0]):
            yield row, row


def _layout(value: Any) -> str:
    return value.name.removeprefix("NVTE_")


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention scores [n, sq, sk] fp32 of q [sq, n, d] and k [sk, n, d]."""
    scores = scale * torch.einsum("qnd,knd->nqk", q, k)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _wide(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values [s, g, d] in fp32, repeated for the heads of each group."""
    return x.float().repeat_interleave(num_heads // x.shape[1], 1)


def fused_attn_fwd(
    max_q: int,
    max_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    o_format: Any,
    scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window: Any,
    bottom_right: bool,
    cu_q: Tensor,
    cu_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: Any,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    *unused: Any,
) -> list[Tensor]:
    """Returns the output (shaped like q), the fp32 log-sum-exp [b, n, sq, 1] (packed: [t, n, 1]), and the random state."""
    assert dropout == 0.0
    name = _layout(layout)
    is_packed = name.startswith("THD")
    CALLS["attention_thd" if is_packed else "attention_sbhd"] += 1
    if is_packed:
        assert max_q >= int(cu_q.diff().max()) and max_kv >= int(cu_kv.diff().max()), (
            "a sequence is longer than max_seqlen"
        )
    heads = q.shape[-2]
    out = torch.zeros_like(q)
    sums = []
    for of_q, of_k in _pieces(name, q, k, cu_q, cu_kv, padded_q, padded_kv):
        queries = q[of_q].float()
        mask = _mask(mask_type, bottom_right, queries.shape[0], k[of_k].shape[0], window)
        scores = _scores(queries, _wide(k[of_k], heads), scale, mask)
        log_sum = scores.logsumexp(-1)
        probs = (scores - log_sum.unsqueeze(-1)).exp()
        out[of_q] = torch.einsum("nqk,knd->qnd", probs, _wide(v[of_k], heads)).to(q.dtype)
        sums.append((of_q, log_sum))
    if is_packed:
        stats = torch.zeros(q.shape[0], heads, 1)
        for of_q, log_sum in sums:
            stats[of_q, :, 0] = log_sum.t()
    else:
        stats = torch.stack([log_sum for _, log_sum in sums]).unsqueeze(-1)
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int,
    max_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window: Any,
    bottom_right: bool,
    deterministic: bool,
    cu_q: Tensor,
    cu_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    d_out: Tensor,
    dtype: Any,
    saved: list[Tensor],
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    *unused: Any,
) -> list[Tensor | None]:
    """Gradients of q, k and v from the output and the log-sum-exp in ``saved``."""
    name = _layout(layout)
    is_packed = name.startswith("THD")
    heads, groups = q.shape[-2], k.shape[-2]
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    out, d_out = out.reshape(q.shape), d_out.reshape(q.shape)
    for row, (of_q, of_k) in enumerate(_pieces(name, q, k, cu_q, cu_kv, padded_q, padded_kv)):
        queries, keys, values = q[of_q].float(), _wide(k[of_k], heads), _wide(v[of_k], heads)
        grad, result = d_out[of_q].float(), out[of_q].float()
        log_sum = saved[0][of_q, :, 0].t() if is_packed else saved[0][row, :, :, 0]  # [n, sq]
        mask = _mask(mask_type, bottom_right, queries.shape[0], keys.shape[0], window)
        probs = (_scores(queries, keys, scale, mask) - log_sum.unsqueeze(-1)).exp()
        d_probs = torch.einsum("qnd,knd->nqk", grad, values)
        d_scores = scale * probs * (d_probs - (grad * result).sum(-1).t().unsqueeze(-1))
        d_q[of_q] = torch.einsum("nqk,knd->qnd", d_scores, keys).to(q.dtype)
        for target, of_heads in (
            (d_k, torch.einsum("nqk,qnd->knd", d_scores, queries)),
            (d_v, torch.einsum("nqk,qnd->knd", probs, grad)),
        ):
            of_groups = of_heads.reshape(of_heads.shape[0], groups, heads // groups, -1).sum(2)
            target[of_k] = of_groups.to(target.dtype)
    return [d_q, d_k, d_v, None, None]
