"""The gated delta rule and its short convolution in plain torch, for machines without flash-linear-attention's kernels.

The functions of packed sequences have the arguments of the kernels that Megatron calls (core/ssm/gated_delta_net).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 64
"""Tokens that are computed at once. More tokens need larger triangular systems, fewer tokens need more steps."""


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divides [..., d] by its Euclidean norm, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Convolves each channel over time, without looking ahead or into another packed sequence, and applies SiLU.

    Args:
        x: [b, s, c]; b is 1 if packed.
        weight: [c, kernel size].
        activation: must be "silu" or "swish".
        cu_seqlens: bounds of packed sequences; None if there is one sequence per row.

    Returns:
        [b, s, c], and None for the final state.
    """
    assert activation in ("silu", "swish"), f"the convolution has no activation {activation}"
    parts = [short_conv(part, weight, bias) for part in _segments(x, cu_seqlens)]
    return torch.cat(parts, 1), None


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Convolves [b, s, c] over time and applies SiLU. ``before`` are the [b, kernel size - 1, c] inputs before x (None: zeros)."""
    if before is None:
        before = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2])
    inputs = torch.cat([before, x], 1).transpose(1, 2)  # [b, c, kernel size - 1 + s]
    out = F.conv1d(inputs, weight[:, None], bias, groups=weight.shape[0])
    return F.silu(out).transpose(1, 2)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Computes the gated delta rule of sequences that start with an empty state.

    Args:
        query: [b, s, n, d_k], normalised; b is 1 if packed.
        key: like query.
        value: [b, s, n, d_v].
        g: [b, s, n] logarithm of the decay of the state, at most 0.
        beta: [b, s, n] how much of the old value of a key is replaced, from 0 to 1.
        cu_seqlens: bounds of packed sequences, each of which starts with an empty state; None if there is one sequence per row.

    Returns:
        [b, s, n, d_v] in the type of ``query``, and None for the final state.
    """
    outs = []
    for parts in zip(*(_segments(x, cu_seqlens) for x in (query, key, value, g, beta)), strict=True):
        outs.append(delta_rule(*parts)[0])
    return torch.cat(outs, 1), None


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the gated delta rule of one sequence per row, in fp32.

    The state S maps keys to values. Token t replaces a part of the value of its key, and reads the value of its query:
    S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) S_(t-1)^T k_t)^T, and o_t = S_t^T q_t / sqrt(d_k).

    Args:
        state: [b, n, d_k, d_v] fp32 before the first token; None: zeros. The other arguments are those of
            ``chunk_gated_delta_rule``.

    Returns:
        [b, s, n, d_v] in the type of ``query``, and the state after the last token.
    """
    # [b, s, n, ...] -> [b, n, s, ...]
    wide = [x.transpose(1, 2).float() for x in (query, key, value, g, beta)]
    wide[0] = wide[0] * query.shape[-1] ** -0.5
    if state is None:
        state = wide[0].new_zeros(*wide[1].shape[:2], key.shape[-1], value.shape[-1])
    outs = []
    for q, k, v, decay, share in zip(*(x.split(_CHUNK, 2) for x in wide), strict=True):
        out, state = _chunk(q, k, v, decay, share, state)
        outs.append(out)
    return torch.cat(outs, 2).transpose(1, 2).to(query.dtype), state


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the tokens of one chunk at once.

    Token t adds k_t u_t^T to the state. Each u depends on those before it, which is a triangular system of equations.
    """
    total = g.cumsum(-1)[..., None]  # [b, n, s, 1] logarithm of the decay since the start of the chunk
    # [b, n, s, s]: the decay from token j to token i >= j. The first tril keeps exp from overflowing above the diagonal.
    between = (total - total.transpose(-1, -2)).tril().exp().tril()
    added = beta[..., None] * (value - total.exp() * (key @ state))
    if key.shape[2] > 1:
        coupling = beta[..., None] * (key @ key.transpose(-1, -2)) * between
        # Only what is below the diagonal is read. The diagonal is taken as ones.
        added = torch.linalg.solve_triangular(coupling, added, upper=False, unitriangular=True)
    out = total.exp() * (query @ state) + ((query @ key.transpose(-1, -2)) * between) @ added
    last = total[:, :, -1:]
    state = last.exp() * state + (key * (last - total).exp()).transpose(-1, -2) @ added
    return out, state


def _segments(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[Tensor]:
    """Yields the packed sequences of [1, t, ...], or x itself if it is not packed."""
    if cu_seqlens is None:
        yield x
        return
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start < stop:
            yield x[:, start:stop]
