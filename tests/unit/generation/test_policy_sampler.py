"""Switching the model to sampling and back, and the number of rows that fit into memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from megatron_rasft.generation import policy_sampler
from megatron_rasft.generation.kv_cache import CachedAttention, KeyValueCache, RotaryAtPositions
from megatron_rasft.generation.policy_sampler import (
    PolicySampler,
    generation_mode,
    rows_that_fit,
    self_attentions,
)
from megatron_rasft.model.attention import SdpaCoreAttention

VOCAB, GROUPS, DIM = 1000, 2, 16


class Attention(SelfAttention):
    """A self-attention layer with the attributes that sampling uses."""

    def __init__(self, config: Any, core_attention: torch.nn.Module) -> None:
        torch.nn.Module.__init__(self)
        self.config = config
        self.layer_number = 1
        self.pg_collection = SimpleNamespace(cp=None)
        self.core_attention = core_attention
        self.num_query_groups_per_partition = GROUPS
        self.hidden_size_per_attention_head = DIM


class Chunk(torch.nn.Module):
    """A chunk of a GPTModel with two layers: Transformer Engine's attention and torch's."""

    def __init__(self, post_process: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(
            sequence_parallel=False,
            fp8="hybrid",
            fp4=None,
            softmax_scale=None,
            attention_dropout=0.0,
            window_size=None,
            window_attn_skip_freq=None,
            softmax_type="vanilla",
            params_dtype=dtype,
            num_moe_experts=None,
        )
        self.post_process = post_process
        self.rotary_pos_emb = torch.nn.Identity()
        plain = SdpaCoreAttention(self.config, 2, pg_collection=SimpleNamespace(cp=None))  # type: ignore[arg-type]
        self.layers = torch.nn.ModuleList(
            [Attention(self.config, torch.nn.Identity()), Attention(self.config, plain)]
        )
        self.weight = torch.nn.Parameter(torch.ones(1))


def modules_of(chunk: Chunk) -> list[Any]:
    return [
        chunk.training,
        chunk.config.fp8,
        chunk.rotary_pos_emb,
        *(layer.core_attention for layer in self_attentions(chunk)),
    ]


def test_generation_mode_replaces_attention_and_restores_everything() -> None:
    chunk, cache = Chunk(), KeyValueCache(2, 8)
    before = modules_of(chunk)
    with generation_mode([chunk], cache):
        assert not torch.is_grad_enabled()
        assert not chunk.training and chunk.config.fp8 is None
        assert isinstance(chunk.rotary_pos_emb, RotaryAtPositions)
        assert [layer.core_attention for layer in self_attentions(chunk)] == cache.layers
        cache.layers[0].keys = torch.zeros(1)
    assert torch.is_grad_enabled()
    assert all(now is then for now, then in zip(modules_of(chunk), before, strict=True))
    assert cache.layers[0].keys is None, "the cache must be freed when training continues"


def test_generation_mode_restores_everything_after_an_error() -> None:
    chunk = Chunk()
    before = modules_of(chunk)
    with pytest.raises(RuntimeError, match="out of memory"), generation_mode([chunk], KeyValueCache(2, 8)):
        raise RuntimeError("out of memory")
    assert all(now is then for now, then in zip(modules_of(chunk), before, strict=True))


def test_generation_mode_switches_sequence_parallelism_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, switched = Chunk(), []
    chunk.config.sequence_parallel = True
    monkeypatch.setattr(
        policy_sampler, "set_model_to_sequence_parallel", lambda model, is_on: switched.append((model, is_on))
    )
    with generation_mode([chunk], KeyValueCache(2, 8)):
        assert switched == [(chunk, False)]
    assert switched == [(chunk, False), (chunk, True)]


def test_each_attention_layer_gets_a_cache_of_its_own() -> None:
    chunks, cache = [Chunk(), Chunk(post_process=False)], KeyValueCache(2, 8)
    with generation_mode(chunks, cache):
        layers = [layer.core_attention for chunk in chunks for layer in self_attentions(chunk)]
        assert len(set(map(id, layers))) == 4
        assert all(isinstance(layer, CachedAttention) for layer in layers)


@pytest.mark.parametrize(
    ("free_bytes", "row_bytes", "num_rows"),
    [
        (100e9, 1e9, 64),
        (127e9, 1e9, 64),
        (128e9, 1e9, 128),
        (1e15, 1e9, 512),
        (2e9, 1e9, 2),
        (1e6, 1e9, 1),
    ],
)
def test_rows_that_fit_are_a_power_of_two_up_to_512(
    free_bytes: float, row_bytes: float, num_rows: int
) -> None:
    assert rows_that_fit(free_bytes, row_bytes) == num_rows


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_row_takes_keys_values_and_on_the_last_stage_logits(dtype: torch.dtype, num_bytes: int) -> None:
    length, num_layers = 256, 4
    cached = 2 * num_bytes * num_layers * GROUPS * DIM * length
    first = PolicySampler([Chunk(post_process=False, dtype=dtype), Chunk(post_process=False)], VOCAB)
    last = PolicySampler([Chunk(post_process=False, dtype=dtype), Chunk(post_process=True)], VOCAB)
    assert first.row_bytes(length) == cached
    assert last.row_bytes(length) == cached + 48 * VOCAB


def test_a_cpu_samples_a_fixed_number_of_rows_and_reads_every_token() -> None:
    sampler = PolicySampler([Chunk()], VOCAB)
    assert sampler.num_rows_that_fit(10**9) == 64
    assert sampler.steps_per_read == 1
