"""Keys and values of the sampled sequences, stored by the attention modules themselves.

Megatron's static inference context stores keys before the rotary embedding and rotates every cached key again in each
layer for each token. Here Megatron's SelfAttention is given the frequencies of the new tokens only, so it rotates
only these, and the core attention stores the keys as they arrive. A row of the cache is one sequence; rows have
lengths of their own, so a row can start a new sequence while the others continue.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rasft.training.attention import SdpaCoreAttention


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """A forward pass over prompts [p, s], padded on the right, that stores their keys in rows of the cache.

    Real tokens never attend to the padding, because attention is causal. The stored padding is masked by
    the row's position and overwritten as the row grows.
    """

    frequencies: Tensor
    """[s, 1, 1, d] rotary frequencies."""
    prompts: Tensor
    """[m] int64, which prompt each stored row begins with: samples of one prompt share its prefill."""
    rows: Tensor
    """[m] int64 distinct rows of the cache."""


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A forward pass over one token of each of the first n rows, laid out as tokens [1, n].

    Megatron then sees one sequence of n tokens, so each row can have its own rotary frequency, also with
    Transformer Engine's fused kernel, which takes one frequency per position of the sequence.
    """

    frequencies: Tensor
    """[n, 1, 1, d] rotary frequencies at ``positions``."""
    rows: Tensor
    """[n] int64: 0 .. n - 1."""
    positions: Tensor
    """[n] int64 position of each row's token."""
    mask: Tensor
    """[n, 1, 1, length] 0 where the row holds a key and -inf elsewhere, in the model's dtype."""


class KeyValueCache:
    """The cache of all layers, and what the next forward pass does with it.

    Args:
        num_rows: sequences held at once.
        length: longest sequence, prompt and response.
    """

    def __init__(self, num_rows: int, length: int) -> None:
        self.num_rows = num_rows
        self.length = length
        self.layers: list[CachedAttention] = []
        self.step: Prefill | Decode | None = None

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first ``length`` keys of rows ``sources`` to rows ``targets``, which are other rows."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                if stored is not None:
                    stored[targets, :, :length] = stored[sources, :, :length]

    def free(self) -> None:
        """Let the memory go at once. Cache and layers refer to each other, so it would otherwise wait for a collection."""
        for layer in self.layers:
            layer.keys = layer.values = None


class CachedAttention(torch.nn.Module):
    """Core attention of one layer while the model samples: stores the new keys and values, then attends.

    Args:
        attention: computes the attention inside a prompt.
    """

    def __init__(self, attention: SdpaCoreAttention, cache: KeyValueCache) -> None:
        super().__init__()
        self._attention = attention
        self._cache = cache
        self.keys: Tensor | None = None
        """[rows, n_kv, length, d], rotated."""
        self.values: Tensor | None = None
        cache.layers.append(self)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """[s, p, n, d] -> [s, p, n * d] for a Prefill; [rows, 1, n, d] -> [rows, 1, n * d] for a Decode."""
        if self.keys is None or self.values is None:
            # Zeros and not empty memory: a masked key that is NaN would still make the output NaN.
            shape = (self._cache.num_rows, key.shape[2], self._cache.length, key.shape[3])
            self.keys, self.values = key.new_zeros(shape), key.new_zeros(shape)
        step = self._cache.step
        if isinstance(step, Prefill):
            for stored, new in ((self.keys, key), (self.values, value)):
                stored[step.rows, :, : new.shape[0]] = new.permute(1, 2, 0, 3)[step.prompts]
            return self._attention.attend(query, key, value).flatten(2)
        assert step is not None, "a forward pass while sampling says what it stores"
        return self._decode(query, key, value, step)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, step: Decode) -> Tensor:
        assert self.keys is not None and self.values is not None
        num_rows, num_groups = key.shape[0], key.shape[2]
        self.keys[step.rows, :, step.positions] = key[:, 0]
        self.values[step.rows, :, step.positions] = value[:, 0]
        length = step.mask.shape[-1]
        # The query heads that share a key head become queries of it: no kernel needs grouped-query support,
        # which those that take a mask lack, and each key is read once.
        grouped = query[:, 0].unflatten(1, (num_groups, -1))  # [rows, n, d] -> [rows, n_kv, n / n_kv, d]
        out = F.scaled_dot_product_attention(
            grouped,
            self.keys[:num_rows, :, :length],
            self.values[:num_rows, :, :length],
            attn_mask=step.mask,
            scale=self._attention.softmax_scale,
        )
        return out.reshape(num_rows, 1, -1)


class RotaryAtPositions(torch.nn.Module):
    """Gives Megatron's GPTModel the rotary frequencies of the next forward pass, in place of its RotaryEmbedding.

    RotaryEmbedding caches its results by length alone (rotary_pos_embedding.py). Under context parallelism
    it would return frequencies that training cut for one rank, or leave uncut ones to training.
    """

    def __init__(self, cache: KeyValueCache) -> None:
        super().__init__()
        self._cache = cache

    def get_rotary_seq_len(self, *unused: Any, **also_unused: Any) -> int:
        """GPTModel asks for this length only to hand it to ``forward``, which has no use for it."""
        return 0

    def forward(self, *unused: Any, **also_unused: Any) -> Tensor:
        """[s, 1, 1, d] frequencies of the tokens that the next forward pass is given."""
        assert self._cache.step is not None, "a forward pass while sampling says where its tokens are"
        return self._cache.step.frequencies
