"""The states of gated delta nets while the model samples, in place of keys and values."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from torch import Tensor

from megatron_rasft.generation.kv_cache import KeyValueCache, Prefill
from megatron_rasft.model.delta_rule import delta_rule, l2norm, short_conv


class CachedDeltaNet(torch.nn.Module):
    """A gated delta net while the model samples: continues from the state of each row, and stores the new state.

    It replaces the complete net, because Megatron's forward pass can neither start from a state nor return one.

    Args:
        net: the net of a layer. Its heads are split over tensor-parallel ranks only.
        cache: gets this module as its next layer.
    """

    def __init__(self, net: GatedDeltaNet, cache: KeyValueCache) -> None:
        super().__init__()
        self._net = net
        self._cache = cache
        self.inputs: Tensor | None = None
        """[rows, kernel size - 1, c] the last inputs of the convolution; None until the first forward pass."""
        self.state: Tensor | None = None
        """[rows, n, d_k, d_v] fp32 state of the delta rule."""
        cache.layers.append(self)

    def forward(
        self, hidden_states: Tensor, *unused: Any, **also_unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, p, h] -> [s, p, h] for a Prefill; [rows, 1, h] -> [rows, 1, h] for a Decode."""
        net, step = self._net, self._cache.step
        projected, _ = net.in_proj(hidden_states)
        # a Decode has one token of each row, [rows, 1, c], which is one sequence per row already
        x = projected.transpose(0, 1) if isinstance(step, Prefill) else projected
        heads = net.num_v_heads_local_tp
        inputs, gate, beta, alpha = x.split(
            [2 * net.qk_dim_local_tp + net.v_dim_local_tp, net.v_dim_local_tp, heads, heads], -1
        )
        g, beta = net._compute_g_and_beta(net.A_log, net.dt_bias, alpha, beta)
        if self.inputs is None or self.state is None:
            self._allocate(inputs)
        if isinstance(step, Prefill):
            out = self._prefill(inputs, g, beta, step)
        else:
            out = self._decode(inputs, g, beta)
        normed = net._apply_gated_norm(out, gate.unflatten(-1, (-1, net.value_head_dim)))
        normed = normed.view(*x.shape[:2], -1)
        result: tuple[Tensor, Tensor | None] = net.out_proj(
            normed.transpose(0, 1).contiguous() if isinstance(step, Prefill) else normed
        )
        return result

    def _allocate(self, inputs: Tensor) -> None:
        net, num_rows = self._net, self._cache.num_rows
        self.inputs = inputs.new_zeros(num_rows, net.conv_kernel_dim - 1, inputs.shape[-1])
        sizes = (net.num_v_heads_local_tp, net.key_head_dim, net.value_head_dim)
        self.state = torch.zeros(num_rows, *sizes, dtype=torch.float32, device=inputs.device)

    def _prefill(self, inputs: Tensor, g: Tensor, beta: Tensor, step: Prefill) -> Tensor:
        assert self.inputs is not None and self.state is not None
        num_before, lengths = self.inputs.shape[1], step.lengths[:, None]
        # decay exp(0) = 1 and beta 0: the padding after a prompt does not change the state
        is_real = (torch.arange(inputs.shape[1], device=inputs.device) < lengths)[..., None]
        out, state = self._rule(short_conv(inputs, *self._kernel()), g * is_real, beta * is_real)
        padded = torch.nn.functional.pad(inputs, (0, 0, num_before, 0))
        # [p, kernel size - 1] positions in ``padded``
        last = lengths + torch.arange(num_before, device=inputs.device)
        self.inputs[step.rows] = padded.take_along_dim(last[..., None], 1)[step.prompts]
        self.state[step.rows] = state[step.prompts]
        return out

    def _decode(self, inputs: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        assert self.inputs is not None and self.state is not None
        num = inputs.shape[0]
        before = self.inputs[:num]
        convolved = short_conv(inputs, *self._kernel(), before=before)
        out, state = self._rule(convolved, g, beta, self.state[:num])
        self.inputs[:num] = torch.cat([before[:, 1:], inputs], 1)
        self.state[:num] = state
        return out

    def _kernel(self) -> tuple[Tensor, Tensor | None]:
        return self._net.conv1d.weight[:, 0], self._net.conv1d.bias

    def _rule(
        self, convolved: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        net = self._net
        key_size = net.qk_dim_local_tp
        query, key, value = convolved.split([key_size, key_size, net.v_dim_local_tp], -1)
        value = value.unflatten(-1, (-1, net.value_head_dim))
        repeats = net.num_value_heads // net.num_key_heads
        query, key = (
            l2norm(x.unflatten(-1, (-1, net.key_head_dim))).repeat_interleave(repeats, 2)
            for x in (query, key)
        )
        return delta_rule(query, key, value, g, beta, state)

    def clear(self, rows: Tensor) -> None:
        """Makes rows start new sequences."""
        if self.inputs is not None and self.state is not None:
            self.inputs[rows] = 0
            self.state[rows] = 0

    def save(self) -> Callable[[], None]:
        """Saves the states, and returns a function that restores them. Keys need no such copy: repeated steps overwrite them."""
        inputs, state = self.inputs, self.state
        if inputs is None or state is None:
            return lambda: None
        saved = inputs.clone(), state.clone()

        def restore() -> None:
            inputs.copy_(saved[0])
            state.copy_(saved[1])

        return restore

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the states of rows ``sources`` to rows ``targets``."""
        for stored in (self.inputs, self.state):
            if stored is not None:
                stored[targets] = stored[sources]

    def free(self) -> None:
        self.inputs = self.state = None
