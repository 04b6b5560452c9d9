"""The KV cache for sampling: core attention modules that store keys and values, and a matching rotary embedding.

Megatron's StaticInferenceContext stores keys before the rotary embedding, and each layer rotates all cached keys again
for every token (transformer/attention.py). Here SelfAttention gets the rotary frequencies of the new tokens only, so it
rotates only these, and the core attention stores keys that are already rotated.

A row of the cache is one sequence. Rows have different lengths, so a row can start a new sequence while others continue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from megatron_rasft.model.attention import SdpaCoreAttention, visible_keys


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """A forward pass over prompts [p, s], padded on the right, that stores their keys and values in rows of the cache.

    Attention is causal, so real tokens do not attend to the padding. The keys of the padding are stored too, but
    decode steps mask keys beyond the row's position, and overwrite them as the row grows.
    """

    frequencies: Tensor
    """[s, 1, 1, d] rotary frequencies."""
    prompts: Tensor
    """[m] int64 in 0 .. p - 1: the prompt of each row in ``rows``. Several samples of a prompt share its prefill."""
    rows: Tensor
    """[m] int64 rows of the cache, each at most once."""
    lengths: Tensor
    """[p] int64 number of tokens of each prompt, without the padding."""


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A forward pass over one token of each of the first n rows, laid out as tokens [1, n].

    Rows have different positions, so every token needs rotary frequencies of its own. Megatron and Transformer Engine's
    fused kernel take one frequency per position of a sequence, so the n tokens are passed as one sequence.
    """

    frequencies: Tensor
    """[n, 1, 1, d] rotary frequencies at ``positions``."""
    rows: Tensor
    """[n] int64: 0 .. n - 1, as a tensor for indexing."""
    positions: Tensor
    """[n] int64 position of each row's token in its sequence."""
    mask: Tensor
    """[n, 1, 1, length] in the model's dtype: 0 at keys of the row's sequence, -inf elsewhere."""


class CachedLayer(Protocol):
    """The part of the cache that belongs to one layer."""

    def clear(self, rows: Tensor) -> None: ...
    def save(self) -> Callable[[], None]: ...
    def move(self, sources: Tensor, targets: Tensor, length: int) -> None: ...
    def free(self) -> None: ...


class KeyValueCache:
    """Keys and values, or states, of all layers of this rank.

    Args:
        num_rows: number of sequences that are sampled at once.
        length: maximum number of tokens of prompt plus response.
        is_fitted: whether the memory is only as long as each decode step reads. On a CPU attention then takes half the time or
            less, because keys are contiguous. CUDA graphs need memory that stays in its place.
    """

    def __init__(self, num_rows: int, length: int, is_fitted: bool = False) -> None:
        self.num_rows = num_rows
        self.length = length
        self.is_fitted = is_fitted
        self.layers: list[CachedLayer] = []
        self.step: Prefill | Decode | None = None
        """The kind of the next forward pass. The caller sets it before each pass."""

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first ``length`` tokens of rows ``sources`` to rows ``targets``. No row may occur in both."""
        for layer in self.layers:
            layer.move(sources, targets, length)

    def clear(self, rows: Tensor) -> None:
        """Makes rows start new sequences. A Prefill does it too."""
        for layer in self.layers:
            layer.clear(rows)

    def save(self) -> Callable[[], None]:
        """Saves what repeated decode steps would not overwrite, and returns a function that restores it."""
        restores = [layer.save() for layer in self.layers]

        def restore() -> None:
            for undo in restores:
                undo()

        return restore

    def free(self) -> None:
        """Frees the memory at once. Cache and layers form a reference cycle, which Python would collect much later."""
        for layer in self.layers:
            layer.free()


class CachedAttention(torch.nn.Module):
    """Core attention of one layer while the model samples: stores the new keys and values, then attends.

    Args:
        attention: computes attention within prompts during a Prefill.
        cache: gets this module as its next layer.
    """

    def __init__(self, attention: SdpaCoreAttention, cache: KeyValueCache) -> None:
        super().__init__()
        self._attention = attention
        self._cache = cache
        self.keys: Tensor | None = None
        """[rows, n_kv, length, d], after the rotary embedding; None until the first forward pass shows the shape."""
        self.values: Tensor | None = None
        cache.layers.append(self)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """[s, p, n, d] -> [s, p, n * d] for a Prefill; [rows, 1, n, d] -> [rows, 1, n * d] for a Decode."""
        step = self._cache.step
        if isinstance(step, Prefill):
            longest = max(key.shape[0], 0 if self.keys is None else self.keys.shape[2])
            self._make_room(key, value, self._cache.num_rows, longest)
            for stored, new in ((self.keys, key), (self.values, value)):
                assert stored is not None, "_make_room has allocated them"
                stored[step.rows, :, : new.shape[0]] = new.permute(1, 2, 0, 3)[step.prompts]
            return self._attention.attend(query, key, value).flatten(2)
        assert step is not None, "KeyValueCache.step must be set before a forward pass"
        return self._decode(query, key, value, step)

    def clear(self, rows: Tensor) -> None:
        """Does nothing: decode steps mask keys beyond a row's position."""

    def save(self) -> Callable[[], None]:
        """Saves nothing: repeated steps overwrite the same keys."""
        return lambda: None

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first ``length`` keys and values of rows ``sources`` to rows ``targets``."""
        for stored in (self.keys, self.values):
            if stored is not None:
                stored[targets, :, :length] = stored[sources, :, :length]

    def free(self) -> None:
        self.keys = self.values = None

    def _make_room(self, key: Tensor, value: Tensor, num_rows: int, length: int) -> None:
        """Allocates keys and values. If the cache is fitted, later calls give them this length and number of rows."""
        if self.keys is None or self.values is None:
            num_rows, full = self._cache.num_rows, self._cache.length
            # Zeros instead of uninitialised memory: the weight 0 of a masked key times a NaN value would be NaN.
            self.keys, self.values = (
                new.new_zeros(num_rows, new.shape[2], length if self._cache.is_fitted else full, new.shape[3])
                for new in (key, value)
            )
        elif self._cache.is_fitted and self.keys.shape[2] != length:
            self.keys, self.values = (_resized(kept, num_rows, length) for kept in (self.keys, self.values))

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, step: Decode) -> Tensor:
        num_rows, num_groups = key.shape[0], key.shape[2]
        self._make_room(key, value, num_rows, step.mask.shape[-1])
        assert self.keys is not None and self.values is not None
        self.keys[step.rows, :, step.positions] = key[:, 0]
        self.values[step.rows, :, step.positions] = value[:, 0]
        mask, length, window = step.mask, step.mask.shape[-1], self._attention.window
        if window is not None:
            places = torch.arange(length, device=mask.device)
            is_visible = visible_keys(step.positions, places, window)
            mask = mask.masked_fill(~is_visible[:, None, None], float("-inf"))
        # The query heads of a group become several queries of its one key head. Then each key is read once, and the
        # kernel needs no support for grouped queries, which torch's kernels with a mask do not have.
        grouped = query[:, 0].unflatten(1, (num_groups, -1))  # [rows, n, d] -> [rows, n_kv, n / n_kv, d]
        keys, values = self.keys[:num_rows, :, :length], self.values[:num_rows, :, :length]
        if self._attention.softmax_offset is None:
            scale = self._attention.softmax_scale
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        else:
            out = self._attend_with_sinks(grouped, keys, values, mask, self._attention.softmax_offset)
        return out.reshape(num_rows, 1, -1)

    def _attend_with_sinks(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sinks: Tensor
    ) -> Tensor:
        """Computes the softmax itself, because torch's kernels would need a copy of the cache with one more key."""
        scale = self._attention.softmax_scale or query.shape[-1] ** -0.5
        scores = query @ keys.transpose(-1, -2) * scale + mask  # [rows, n_kv, n / n_kv, length]
        of_heads = sinks.to(scores.dtype).view(1, *query.shape[1:3], 1).expand(len(query), -1, -1, -1)
        weights = torch.cat([of_heads, scores], -1).softmax(-1, dtype=torch.float32)[..., 1:]
        return weights.to(values.dtype) @ values


def _resized(stored: Tensor, num_rows: int, length: int) -> Tensor:
    """Copies [rows, n_kv, old length, d] to [num_rows, n_kv, length, d]. New places are 0."""
    resized = stored.new_empty(num_rows, stored.shape[1], length, stored.shape[3])
    num_kept = min(length, stored.shape[2])
    resized[:, :, :num_kept] = stored[:num_rows, :, :num_kept]
    resized[:, :, num_kept:] = 0
    return resized


class RotaryAtPositions(torch.nn.Module):
    """Replaces GPTModel's RotaryEmbedding while the model samples: returns the frequencies of the next forward pass.

    RotaryEmbedding caches results by length alone (rotary_pos_embedding.py). Under context parallelism training needs
    frequencies cut for one rank and sampling needs all of them, so each would get the other's cached results.

    Args:
        rotary: the module to replace.
        cache: has the frequencies of the next forward pass.
    """

    def __init__(self, rotary: Any, cache: KeyValueCache) -> None:
        super().__init__()
        self._factor = rotary.get_emb(1)[1] if isinstance(rotary, YarnRotaryEmbedding) else None
        self._cache = cache

    def get_rotary_seq_len(self, *unused: Any, **also_unused: Any) -> int:
        """Returns a placeholder. GPTModel passes the length to ``forward``, which ignores it."""
        return 0

    def forward(self, *unused: Any, **also_unused: Any) -> Tensor | tuple[Tensor, float]:
        """Returns [s, 1, 1, d]: the frequencies of the input tokens.

        YaRN's module returns a pair with its factor. GPTModel ignores the factor, because its attention layers have it.
        """
        assert self._cache.step is not None, "KeyValueCache.step must be set before a forward pass"
        frequencies = self._cache.step.frequencies
        return frequencies if self._factor is None else (frequencies, self._factor)


def rotary_frequencies(rotary: Any, length: int) -> Tensor:
    """Returns [length, 1, 1, d]: the frequencies of all positions.

    RotaryEmbedding.forward (rotary_pos_embedding.py) would cut them for one context-parallel rank and cache the result by
    length. get_emb does neither. YaRN's also returns its factor.
    """
    found = rotary.get_emb(length)
    return found[0] if isinstance(found, tuple) else found
