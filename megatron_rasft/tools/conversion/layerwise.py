"""Computes a model's logits from a Megatron checkpoint, one layer at a time, in plain torch and fp32.

It interprets the checkpoint's layouts independently, without the tables of weights/families/, so that comparing the logits with
transformers' tests the tables.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rasft.tools.conversion.layerwise_delta import delta_net
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder
from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.rope import Rope, Yarn


@torch.no_grad()
def layerwise_logits(
    checkpoint: TorchDistFolder,
    folder: HfFolder,
    tokens: Tensor,
    *,
    weight_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes the logits of every position.

    Args:
        checkpoint: the Megatron checkpoint.
        folder: the model's description.
        tokens: [b, s] int64.
        weight_dtype: type to round the weights to before they are used; None: no rounding.

    Returns:
        [b, s, v] fp32, without Megatron's padding of the vocabulary.
    """
    return _Forward(checkpoint, folder, weight_dtype).logits(tokens)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class _Forward:
    def __init__(
        self, checkpoint: TorchDistFolder, folder: HfFolder, weight_dtype: torch.dtype | None
    ) -> None:
        self.checkpoint = checkpoint
        self.weight_dtype = weight_dtype
        self.shape = folder.shape
        self.args = megatron_args(folder)
        self.rope = folder.rope
        self.groups = self.shape.num_query_groups
        self.is_centered = bool(self.args.get("layernorm_zero_centered_gamma"))
        self.has_post_norms = folder.family.has_post_norms
        self.activation = _ACTIVATIONS[folder.family.activation[1]]

    def _weight(self, name: str, *index: int) -> Tensor:
        key = f"decoder.layers.{name}" if index else name
        if key not in self.checkpoint.tensors and index:  # the checkpoint does not stack its layers
            key, index = f"decoder.layers.{index[0]}.{name}", index[1:]
        weight = self.checkpoint.read(key, index)
        return (weight if self.weight_dtype is None else weight.to(self.weight_dtype)).float()

    def _norm(self, x: Tensor, name: str, *index: int, eps: float | None = None) -> Tensor:
        weight = self._weight(name, *index) + self.is_centered
        eps = self.args["layernorm_epsilon"] if eps is None else eps
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def logits(self, tokens: Tensor) -> Tensor:
        embedding = self._weight("embedding.word_embeddings.weight")
        x = embedding[tokens] * self.args.get("embedding_scale", 1.0)  # [b, s, h]
        if not self.shape.is_tied:
            del embedding
        latent = self.shape.latent
        rotated = int(self.shape.head_dim * self.rope.partial) if latent is None else latent.rotary_dim
        attention = self._attention if latent is None else self._latent_attention
        distant = rotary_angles(tokens.shape[1], rotated, self.rope)
        local = distant if self.rope.local_theta is None else self._local_angles(tokens.shape[1], rotated)
        for layer in range(self.shape.num_layers):
            is_delta = self.shape.delta_layers[layer]
            angles = local if self._has_window(layer) else distant
            x = x + (self._delta_net(x, layer) if is_delta else attention(x, angles, layer))
            has_experts = self.shape.num_experts and layer >= self.shape.num_dense_layers
            x = x + (self._experts(x, layer) if has_experts else self._mlp(x, layer))
        x = self._norm(x, "decoder.final_layernorm.weight")
        output = embedding if self.shape.is_tied else self._weight("output_layer.weight")
        return x @ output[: self.shape.vocab_size].T

    def _local_angles(self, length: int, rotated: int) -> Tensor:
        """The angles of layers with a window, if their rotary embedding has its own base."""
        assert self.rope.local_theta is not None, "called for such models only"
        return rotary_angles(length, rotated, Rope(self.rope.local_theta, None))

    def _attention(self, x: Tensor, angles: Tensor, layer: int) -> Tensor:
        batch, length, d = *x.shape[:2], self.shape.head_dim
        x = self._norm(x, "self_attention.linear_qkv.layer_norm_weight", layer)
        x = x @ self._weight("self_attention.linear_qkv.weight", layer).T
        if self.shape.has_qkv_bias:
            x = x + self._weight("self_attention.linear_qkv.bias", layer)
        per_group = self.shape.num_attention_heads // self.groups
        gates = per_group * bool(self.args.get("attention_output_gate"))
        # a group consists of its queries, their gates, its key and its value; groups added by --rasft-query-groups come last
        x = x.view(batch, length, -1, per_group + gates + 2, d)[:, :, : self.groups]
        query, gate, key, value = x.split([per_group, gates, 1, 1], 3)  # [b, s, g, *, d]
        query = query.flatten(2, 3)
        key, value = (t.flatten(2, 3) for t in (key, value))
        if self.shape.has_qk_norm:
            query = self._norm(query, "self_attention.q_layernorm.weight", layer)
            key = self._norm(key, "self_attention.k_layernorm.weight", layer)
        if not self.args.get("no_rope_freq") or not self.args["no_rope_freq"][layer]:
            query, key = (self._rotate(x, angles) for x in (query, key))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [b, heads, s, d]
        x = self._attend(query, key, value, layer).transpose(1, 2).flatten(2)
        if gates:
            x = x * gate.flatten(2).sigmoid()
        x = x @ self._weight("self_attention.linear_proj.weight", layer)[:, : x.shape[-1]].T
        if self.args["add_bias_linear"]:
            x = x + self._weight("self_attention.linear_proj.bias", layer)
        return self._post_norm(x, "self_attention.linear_proj", layer)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Computes attention of [b, heads, s, d]. A sink is a further score of its head, whose value is zero."""
        mask, scale = self._mask(query.shape[2], layer), self.args.get("softmax_scale")
        if self.args.get("softmax_type") != "learnable":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
            )
        heads = query.shape[1]
        sinks = self._weight("self_attention.core_attention.softmax_offset", layer)[:heads, None, None]
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
        scores = scores.masked_fill(~mask, float("-inf"))
        total = scores.logsumexp(-1, keepdim=True).logaddexp(sinks)
        return (scores - total).exp() @ value

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        """Rotates queries or keys. If neighbours form pairs, it reorders the dimensions of both, which changes no score."""
        if self.rope.is_interleaved:
            rotated, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], -1)
            x = torch.cat([rotated[..., ::2], rotated[..., 1::2], rest], -1)
        return rotate(x, angles, self.rope.attention_factor)

    def _post_norm(self, x: Tensor, name: str, layer: int) -> Tensor:
        """Normalises the output of a projection, if the model does."""
        return self._norm(x, f"{name}.post_norm.weight", layer) if self.has_post_norms else x

    def _has_window(self, layer: int) -> bool:
        return self.args["window_size"] is not None and bool(self.args["window_attn_skip_freq"][layer])

    def _mask(self, length: int, layer: int) -> Tensor:
        """[s, s] bool: the keys that each query of a layer sees."""
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if self._has_window(layer):
            mask = mask.triu(-self.args["window_size"][0])
        return mask

    def _latent_attention(self, x: Tensor, angles: Tensor, layer: int) -> Tensor:
        """Computes queries, keys and values from latents. Neighbouring dimensions form a rotated pair."""
        latent = self.shape.latent
        assert latent is not None, "called for such models only"
        x = self._norm(x, "input_layernorm.weight", layer)
        key_value, shared_key = self._project(x, "linear_kv_down_proj", layer).split(
            [latent.key_value_rank, latent.rotary_dim], -1
        )
        key_value = self._norm(key_value, "self_attention.kv_layernorm.weight", layer, eps=1e-6)
        key_value = self._project(key_value, "linear_kv_up_proj", layer)
        if latent.query_rank is None:
            query = self._project(x, "linear_q_proj", layer)
        else:
            query = self._project(x, "linear_q_down_proj", layer)
            query = self._norm(query, "self_attention.q_layernorm.weight", layer, eps=1e-6)
            query = self._project(query, "linear_q_up_proj", layer)
        heads = (self.shape.num_attention_heads, -1)
        key, value = key_value.unflatten(-1, heads).split([latent.plain_dim, latent.value_dim], -1)
        query, rotated = query.unflatten(-1, heads).split([latent.plain_dim, latent.rotary_dim], -1)
        yarn = self.rope.yarn
        factor = 1.0 if yarn is None else yarn.attention_factor
        rotated, shared = (
            rotate(torch.cat([t[..., ::2], t[..., 1::2]], -1), angles, factor)
            for t in (rotated, shared_key[:, :, None])
        )
        query, key = torch.cat([query, rotated], -1), torch.cat([key, shared.expand_as(rotated)], -1)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [b, heads, s, *]
        scale = latent.key_dim**-0.5
        if yarn is not None and yarn.factor > 1:
            scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2
        x = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return self._project(x.transpose(1, 2).flatten(2), "linear_proj", layer)

    def _project(self, x: Tensor, name: str, layer: int) -> Tensor:
        return x @ self._weight(f"self_attention.{name}.weight", layer).T

    def _delta_net(self, x: Tensor, layer: int) -> Tensor:
        delta = self.shape.delta
        assert delta is not None
        x = self._norm(x, "self_attention.in_proj.layer_norm_weight", layer)
        eps = self.args["layernorm_epsilon"]
        return delta_net(x, lambda name: self._weight(f"self_attention.{name}", layer), delta, eps)

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        x = self._norm(x, "mlp.linear_fc1.layer_norm_weight", layer)
        x = self._gated(
            x, self._weight("mlp.linear_fc1.weight", layer), self._weight("mlp.linear_fc2.weight", layer)
        )
        return self._post_norm(x, "mlp.linear_fc2", layer)

    def _experts(self, x: Tensor, layer: int) -> Tensor:
        x = self._norm(x, "pre_mlp_layernorm.weight", layer)
        scores = x @ self._weight("mlp.router.weight", layer).T
        if self.args["add_bias_linear"]:
            scores = scores + self._weight("mlp.router.bias", layer)
        weights, chosen = self._route(scores, layer)
        total = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            weight = (weights * (chosen == expert)).sum(-1, keepdim=True)
            total += weight * self._expert(x, layer, expert)
        if self.shape.shared_ffn_hidden_size:
            names = (f"mlp.shared_experts.linear_fc{i}.weight" for i in (1, 2))
            shared = self._gated(x, *(self._weight(name, layer) for name in names))
            if self.args.get("moe_shared_expert_gate"):
                shared = shared * (x @ self._weight("mlp.shared_experts.gate_weight", layer).T).sigmoid()
            total += shared
        return total

    def _gated(self, x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        """Computes a gated MLP. The first half of fc1's rows is the gate projection, the second half the up projection."""
        gate, up = (x @ fc1.T).chunk(2, -1)
        return (self.activation(gate) * up) @ fc2.T

    def _expert(self, x: Tensor, layer: int, expert: int) -> Tensor:
        def read(name: str) -> Tensor:
            return self._weight(f"mlp.experts.experts.{name}", layer, expert)

        fc1, fc2 = read("linear_fc1.weight"), read("linear_fc2.weight")
        if not self.args["add_bias_linear"]:
            return self._gated(x, fc1, fc2)
        gate, up = (x @ fc1.T + read("linear_fc1.bias")).chunk(2, -1)
        limit = self.args["activation_func_clamp_value"]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (gate * (1.702 * gate).sigmoid() * (up + 1)) @ fc2.T + read("linear_fc2.bias")

    def _route(self, scores: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Returns weights and numbers of the experts, both [b, s, k], for the router's outputs [b, s, experts]."""
        top_k = self.args["moe_router_topk"]
        if self.args.get("moe_router_score_function") == "sigmoid":
            scores = scores.sigmoid()
            biased = scores + self._weight("mlp.router.expert_bias", layer)
            chosen = self._keep_best_groups(biased).topk(top_k, -1).indices
            weights = scores.gather(-1, chosen)
            return self.args["moe_router_topk_scaling_factor"] * weights / weights.sum(
                -1, keepdim=True
            ), chosen
        if self.args["moe_router_pre_softmax"]:
            weights, chosen = scores.softmax(-1).topk(top_k, -1)
            return weights, chosen
        weights, chosen = scores.topk(top_k, -1)
        return weights.softmax(-1), chosen

    def _keep_best_groups(self, scores: Tensor) -> Tensor:
        """Replaces scores by -inf outside the best groups of experts, which are those with the largest sum of two scores."""
        num_groups = self.args["moe_router_num_groups"]
        if num_groups is None:
            return scores
        grouped = scores.unflatten(-1, (num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(self.args["moe_router_group_topk"], -1).indices
        is_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~is_kept[..., None], float("-inf")).flatten(-2)


def rotary_angles(length: int, head_dim: int, rope: Rope) -> Tensor:
    """Returns the [s, d / 2] fp32 angle of each position and frequency, with the model's scaling."""
    frequencies = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.long is not None:
        frequencies = frequencies / torch.tensor(rope.long.divisors)
    if rope.linear_factor is not None:
        frequencies = frequencies / rope.linear_factor
    if rope.llama3_factor is not None:
        # frequencies whose wavelength is within the original context
        turns = 8192 * frequencies / (2 * math.pi)
        smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / rope.llama3_factor + smooth * frequencies
    if rope.yarn is not None:
        kept = _yarn_kept(head_dim, rope.theta, rope.yarn)
        frequencies = (1 - kept) * frequencies / rope.yarn.factor + kept * frequencies
    return torch.arange(length, dtype=torch.float32)[:, None] * frequencies


def _yarn_kept(head_dim: int, theta: float, yarn: Yarn) -> Tensor:
    """Returns [d / 2]: the share of each frequency that YaRN keeps, 1 for short wavelengths and 0 for long ones."""

    def channel(num_turns: float) -> float:
        """The channel that turns ``num_turns`` times within the original positions."""
        return (
            head_dim * math.log(yarn.original_positions / (num_turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
    if yarn.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def rotate(x: Tensor, angles: Tensor, factor: float = 1.0) -> Tensor:
    """Rotates the first elements of [b, s, heads, d], two for each angle.

    Of these, element i of the first half and element i of the second half form a pair.
    """
    cos, sin = factor * angles.cos()[:, None], factor * angles.sin()[:, None]
    rotated, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], -1)
    first, second = rotated.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
