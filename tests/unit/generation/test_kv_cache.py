"""Cached attention compared with attention over complete sequences, row by row."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rasft.generation.kv_cache import (
    CachedAttention,
    Decode,
    KeyValueCache,
    Prefill,
    RotaryAtPositions,
)
from megatron_rasft.model.attention import SdpaCoreAttention

HEADS, GROUPS, DIM, LENGTH, ROWS = 4, 2, 8, 12, 3
NO_FREQUENCIES = torch.zeros(1, 1, 1, DIM)


def cached_attention(
    window: int | None = None, sinks: Tensor | None = None, is_fitted: bool = False
) -> tuple[CachedAttention, KeyValueCache]:
    before = None if window is None else (window - 1, 0)
    windows = {"window_size": before, "window_attn_skip_freq": None}
    config: Any = SimpleNamespace(attention_dropout=0.0, softmax_type="vanilla", **windows)
    cache = KeyValueCache(ROWS, LENGTH, is_fitted)
    attention = SdpaCoreAttention(config, 1, softmax_scale=0.3, pg_collection=SimpleNamespace(cp=None))  # type: ignore[arg-type]
    attention.softmax_offset = None if sinks is None else torch.nn.Parameter(sinks, requires_grad=False)
    return CachedAttention(attention, cache), cache


def random_heads(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attended(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None) -> Tensor:
    """[n * d] output of one query [n, d] over keys and values [s, n_kv, d], head by head; ``sinks`` are further scores."""
    out = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = 0.3 * keys[:, group] @ query[head]
        weights = torch.softmax(scores if sinks is None else torch.cat([scores, sinks[head : head + 1]]), 0)
        weights = weights[: len(keys)]
        out.append(weights @ values[:, group])
    return torch.cat(out)


def prefill(cache: KeyValueCache, prompts: list[int], rows: list[int]) -> None:
    lengths = torch.full((max(prompts) + 1,), LENGTH)
    cache.step = Prefill(
        frequencies=NO_FREQUENCIES,
        prompts=torch.tensor(prompts),
        rows=torch.tensor(rows),
        lengths=lengths,
    )


def decode(cache: KeyValueCache, positions: list[int], length: int = LENGTH) -> None:
    places = torch.tensor(positions)
    is_masked = torch.arange(length)[None] > places[:, None]
    mask = torch.zeros(len(positions), length, dtype=torch.float64).masked_fill(is_masked, float("-inf"))
    cache.step = Decode(
        frequencies=NO_FREQUENCIES,
        rows=torch.arange(len(positions)),
        positions=places,
        mask=mask[:, None, None],
    )


@pytest.mark.parametrize("window", [LENGTH, 2])
def test_a_prefill_attends_causally_and_stores_keys_in_the_rows_of_each_prompt(window: int) -> None:
    layer, cache = cached_attention(window)
    query = random_heads(4, 2, HEADS, seed=1)
    key, value = random_heads(4, 2, GROUPS, seed=2), random_heads(4, 2, GROUPS, seed=3)
    prefill(cache, prompts=[0, 1, 1], rows=[1, 0, 2])
    out = layer(query, key, value, None)
    assert out.shape == (4, 2, HEADS * DIM)
    for prompt in range(2):
        for place in range(4):
            seen = slice(max(0, place + 1 - window), place + 1)
            expected = attended(query[place, prompt], key[seen, prompt], value[seen, prompt])
            torch.testing.assert_close(out[place, prompt], expected)
    assert layer.keys is not None and layer.values is not None
    for row, prompt in {1: 0, 0: 1, 2: 1}.items():
        assert torch.equal(layer.keys[row, :, :4], key[:, prompt].transpose(0, 1))
        assert torch.equal(layer.values[row, :, :4], value[:, prompt].transpose(0, 1))
    assert not layer.keys[:, :, 4:].any(), "memory after the prompt must be zero, because 0 * NaN is NaN"


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)])
@pytest.mark.parametrize("window", [None, 4])
def test_a_decode_step_attends_to_the_keys_of_its_row_up_to_its_position(
    window: int | None, sinks: Tensor | None
) -> None:
    layer, cache = cached_attention(window, sinks)
    key, value = random_heads(5, 2, GROUPS, seed=2), random_heads(5, 2, GROUPS, seed=3)
    prefill(cache, prompts=[0, 1], rows=[0, 1])
    layer(random_heads(5, 2, HEADS, seed=1), key, value, None)
    # Row 0 has 5 tokens. Row 1 has 2 tokens, and its other keys are padding. Each row gets a new token.
    query = random_heads(2, 1, HEADS, seed=4)
    new_key, new_value = random_heads(2, 1, GROUPS, seed=5), random_heads(2, 1, GROUPS, seed=6)
    decode(cache, positions=[5, 2])
    out = layer(query, new_key, new_value, None)
    assert out.shape == (2, 1, HEADS * DIM)
    for row, length in enumerate((5, 2)):
        keys = torch.cat([key[:length, row], new_key[row]])[-(window or LENGTH) :]
        values = torch.cat([value[:length, row], new_value[row]])[-(window or LENGTH) :]
        torch.testing.assert_close(out[row, 0], attended(query[row, 0], keys, values, sinks))
    assert layer.keys is not None and torch.equal(layer.keys[1, :, 2], new_key[1, 0])


def test_moved_rows_continue_with_their_keys() -> None:
    layer, cache = cached_attention()
    key, value = random_heads(3, 3, GROUPS, seed=2), random_heads(3, 3, GROUPS, seed=3)
    prefill(cache, prompts=[0, 1, 2], rows=[0, 1, 2])
    layer(random_heads(3, 3, HEADS, seed=1), key, value, None)
    cache.move(torch.tensor([2]), torch.tensor([0]), 3)
    query = random_heads(1, 1, HEADS, seed=4)
    new_key, new_value = random_heads(1, 1, GROUPS, seed=5), random_heads(1, 1, GROUPS, seed=6)
    decode(cache, positions=[3])
    out = layer(query, new_key, new_value, None)
    keys, values = torch.cat([key[:, 2], new_key[0]]), torch.cat([value[:, 2], new_value[0]])
    torch.testing.assert_close(out[0, 0], attended(query[0, 0], keys, values))


def test_a_fitted_cache_is_as_long_as_the_steps_read_and_keeps_its_keys() -> None:
    layer, cache = cached_attention(is_fitted=True)
    key, value = random_heads(3, 3, GROUPS, seed=2), random_heads(3, 3, GROUPS, seed=3)
    prefill(cache, prompts=[0, 1, 2], rows=[0, 1, 2])
    layer(random_heads(3, 3, HEADS, seed=1), key, value, None)
    keys, values = list(key.unbind(1)), list(value.unbind(1))
    for position, (num_rows, length) in enumerate([(3, 4), (3, 9), (2, 9), (2, 7)], 3):
        query = random_heads(num_rows, 1, HEADS, seed=position)
        new_key, new_value = (random_heads(num_rows, 1, GROUPS, seed=10 * position + i) for i in range(2))
        decode(cache, [position] * num_rows, length)
        out = layer(query, new_key, new_value, None)
        assert layer.keys is not None and layer.keys.shape[2] == length
        assert layer.keys[:num_rows].is_contiguous(), "attention over other keys is slower"
        for row in range(num_rows):
            keys[row], values[row] = (
                torch.cat([keys[row], new_key[row]]),
                torch.cat([values[row], new_value[row]]),
            )
            torch.testing.assert_close(out[row, 0], attended(query[row, 0], keys[row], values[row]))


def test_every_layer_is_moved_and_freed() -> None:
    layer, cache = cached_attention()
    assert cache.layers == [layer]
    cache.move(torch.tensor([1]), torch.tensor([0]), 2)  # before the first pass there are no keys to move
    prefill(cache, prompts=[0], rows=[1])
    layer(
        random_heads(2, 1, HEADS, seed=1),
        random_heads(2, 1, GROUPS, seed=2),
        random_heads(2, 1, GROUPS, seed=3),
        None,
    )
    cache.free()
    assert layer.keys is None and layer.values is None


def test_the_model_gets_the_frequencies_of_the_next_forward_pass() -> None:
    cache = KeyValueCache(ROWS, LENGTH)
    rotary = RotaryAtPositions(torch.nn.Identity(), cache)
    with pytest.raises(AssertionError, match="step"):
        rotary(rotary.get_rotary_seq_len(None), packed_seq=False)
    frequencies = torch.arange(4.0)[:, None, None, None]
    zero = torch.tensor([0])
    cache.step = Prefill(frequencies=frequencies, prompts=zero, rows=zero, lengths=zero)
    assert rotary(7, packed_seq=False) is frequencies


def test_a_forward_pass_without_a_step_is_refused() -> None:
    layer, _ = cached_attention()
    heads = random_heads(1, 1, HEADS, seed=1), *(random_heads(1, 1, GROUPS, seed=2) for _ in range(2))
    with pytest.raises(AssertionError, match="step"):
        layer(*heads, None)
