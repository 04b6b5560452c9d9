"""Computes a gated delta net from a Megatron checkpoint, in plain torch and fp32; see layerwise.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rasft.weights.families.shape import DeltaShape


def delta_net(x: Tensor, weight: Callable[[str], Tensor], delta: DeltaShape, eps: float) -> Tensor:
    """Computes the net of one layer.

    Args:
        x: [b, s, h] normalised hidden states.
        weight: returns a weight of the net by its name in the checkpoint.
        delta: the sizes of the net.
        eps: epsilon of the norm of the heads.

    Returns:
        [b, s, h].
    """
    parts = ("query", "key", "value", "z", "beta", "alpha")
    query, key, value, z, beta, alpha = (x @ weight(f"in_proj.weight.{part}").T for part in parts)
    query, key, value = (
        _convolved(y, weight(f"conv1d.weight.{part}"))
        for y, part in ((query, "query"), (key, "key"), (value, "value"))
    )
    decay = (-weight("A_log").exp() * F.softplus(alpha + weight("dt_bias"))).exp()
    repeats = delta.num_value_heads // delta.num_key_heads
    query, key = (
        _unit(y.unflatten(-1, (-1, delta.key_dim))).repeat_interleave(repeats, 2) for y in (query, key)
    )
    out = _delta_rule(query, key, value.unflatten(-1, (-1, delta.value_dim)), decay, beta.sigmoid())
    out = weight("out_norm.weight") * out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    return (out.flatten(2) * F.silu(z)) @ weight("out_proj.weight").T


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolves [b, s, c] over time with a [c, 1, k] kernel."""
    size = kernel.shape[-1]
    padded = F.pad(x, (0, 0, size - 1, 0))
    parts = [padded[:, i : i + x.shape[1]] * kernel[:, 0, i] for i in range(size)]
    return F.silu(torch.stack(parts).sum(0))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Applies the delta rule token by token: the state forgets, then a part of what it has for the key is replaced by the value."""
    state = torch.zeros(*key.shape[:1], *key.shape[2:], value.shape[-1])  # [b, n, d_k, d_v]
    outs = []
    for t in range(key.shape[1]):
        state = state * decay[:, t, :, None, None]
        known = torch.einsum("bnkv,bnk->bnv", state, key[:, t])
        new = beta[:, t, :, None] * (value[:, t] - known)
        state = state + torch.einsum("bnk,bnv->bnkv", key[:, t], new)
        outs.append(torch.einsum("bnkv,bnk->bnv", state, query[:, t]) * key.shape[-1] ** -0.5)
    return torch.stack(outs, 1)
