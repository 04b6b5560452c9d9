"""Sampling in refilled rows: the tokens of sampling each sequence alone, whatever the rows do."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_rasft.training import decoding
from megatron_rasft.training.attention import SdpaCoreAttention
from megatron_rasft.training.decoding import Decoder, Engine
from megatron_rasft.training.generation import rows_that_fit
from megatron_rasft.training.kv_cache import CachedAttention, Decode, KeyValueCache, Prefill
from megatron_rasft.training.stopping import Stopped
from megatron_rasft.types import Request, Response, SamplingParams

VOCAB, HEADS, GROUPS, DIM = 13, 4, 2, 8
LENGTH = 48
PROMPTS = [[3, 5, 1, 12, 9, 9, 2], [1, 7, 4], [8, 8, 8], [0, 11], [6], [10]]
"""Longest first, as PolicySampler hands them over."""

PLAIN = SamplingParams(
    num_samples=3,
    max_new_tokens=30,
    temperature=1.0,
    top_p=1.0,
    repetition_penalty=1.0,
    stop_ids=frozenset([4]),
    max_batch_size=None,
    max_total_tokens=LENGTH - 16,
)
PARAMS = {
    "plain": PLAIN,
    "nucleus": replace(PLAIN, top_p=0.8, temperature=1.3),
    "penalised": replace(PLAIN, repetition_penalty=1.4),
    "penalised nucleus": replace(PLAIN, repetition_penalty=1.4, top_p=0.7),
    "greedy": replace(PLAIN, temperature=0.0, stop_ids=frozenset()),
}


class OneLayer:
    """Embedding, one attention layer with rotary positions, output: all in fp64, so that rounding decides nothing."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.embedding = normal(VOCAB, HEADS * DIM)
        self.query = normal(HEADS * DIM, HEADS * DIM) / 5
        self.key, self.value = (normal(HEADS * DIM, GROUPS * DIM) / 5 for _ in range(2))
        self.output = normal(HEADS * DIM, VOCAB) / 4
        angles = torch.outer(torch.arange(LENGTH).double(), 0.3 ** torch.arange(DIM // 2).double())
        self.frequencies = torch.cat([angles, angles], -1)[:, None, None]
        self.passes: list[tuple[str, tuple[int, ...]]] = []

    def engine(self, num_rows: int, **changes: Any) -> tuple[Engine, KeyValueCache]:
        cache = KeyValueCache(num_rows, LENGTH)
        attention = SdpaCoreAttention.__new__(SdpaCoreAttention)
        torch.nn.Module.__init__(attention)
        attention.softmax_scale = None
        layer = CachedAttention(attention, cache)
        values: dict[str, Any] = {
            "forward": partial(self.forward, layer, cache),
            "frequencies": self.frequencies,
            "share": lambda tensor: tensor,
            "all_agree": lambda says_so: says_so,
            "dtype": torch.float64,
            "vocab_size": VOCAB,
            "has_graphs": False,
            "steps_per_look": 1,
        }
        return Engine(**{**values, **changes}), cache

    def forward(self, layer: CachedAttention, cache: KeyValueCache, tokens: Tensor) -> Tensor | None:
        step = cache.step
        assert step is not None
        self.passes.append((type(step).__name__, tuple(tokens.shape)))
        hidden = self.embedding[tokens].transpose(0, 1)  # [s, b, h]
        query, key, value = (
            (hidden @ weight).unflatten(-1, (-1, DIM)) for weight in (self.query, self.key, self.value)
        )
        out = layer(rotated(query, step.frequencies), rotated(key, step.frequencies), value, None)
        return (out @ self.output)[:, 0].float() if isinstance(step, Decode) else None

    def next_logits(self, ids: list[int]) -> np.ndarray:
        """[v] after the whole sequence, by the formula of attention."""
        hidden = self.embedding[ids]
        query, key, value = (
            (hidden @ w).unflatten(-1, (-1, DIM)) for w in (self.query, self.key, self.value)
        )
        query, key = (rotated(x, self.frequencies[: len(ids), 0]) for x in (query, key))
        out = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = key[:, group] @ query[-1, head] / math.sqrt(DIM)
            out.append(torch.softmax(scores, 0) @ value[:, group])
        return (torch.cat(out) @ self.output).float().numpy()


def rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * frequencies.cos() + torch.cat([-second, first], -1) * frequencies.sin()


def alone(
    model: OneLayer, prompt: list[int], seed: int, params: SamplingParams
) -> tuple[list[int], list[float]]:
    """One sequence sampled by itself, recomputed from the start at each token."""
    uniforms = torch.rand(
        params.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ids, logprobs = list(prompt), []
    for step in range(params.room(len(prompt))):
        logits = model.next_logits(ids).astype(np.float64)
        for token in set(ids):
            logits[token] *= params.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        scaled = logits / (params.temperature or 1.0)
        probs = np.exp(scaled - scaled.max())
        probs /= probs.sum()
        order = np.argsort(-probs) if params.top_p < 1 else np.arange(VOCAB)
        before = np.cumsum(probs[order]) - probs[order]
        kept = order[before < params.top_p] if params.top_p < 1 else order
        reached = np.cumsum(probs[kept])
        token = int(kept[np.searchsorted(reached, float(uniforms[step]) * reached[-1], side="right")])
        if params.temperature == 0:
            token = int(np.argmax(logits))
        ids.append(token)
        logprobs.append(float(np.log(probs[token])))
        if token in params.stop_ids:
            break
    return ids[len(prompt) :], logprobs


def requests(params: SamplingParams) -> list[Request]:
    return [
        Request(prompt_ids=prompt, seeds=[10 * i + k for k in range(params.num_samples)])
        for i, prompt in enumerate(PROMPTS)
    ]


def sample(model: OneLayer, params: SamplingParams, num_rows: int, **changes: Any) -> list[list[Response]]:
    """Sample with ``num_rows`` rows; OneLayer.engine takes the changes."""
    engine, cache = model.engine(num_rows, **changes)
    return Decoder(engine, cache, requests(params), params, lambda: False).run()


@pytest.fixture(autouse=True)
def few_keys_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "KEY_BUCKET", 8)


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[str, list[list[tuple[list[int], list[float]]]]]]:
    model = OneLayer()
    yield {
        name: [[alone(model, r.prompt_ids, seed, params) for seed in r.seeds] for r in requests(params)]
        for name, params in PARAMS.items()
    }


@pytest.mark.parametrize("num_rows,steps_per_look", [(18, 1), (18, 16), (5, 1), (5, 7), (1, 16)])
@pytest.mark.parametrize("name", PARAMS)
def test_rows_sample_what_each_sequence_samples_alone(
    expected: dict, name: str, num_rows: int, steps_per_look: int
) -> None:
    params = PARAMS[name]
    found = sample(OneLayer(), params, num_rows, steps_per_look=steps_per_look)
    for group, others in zip(found, expected[name], strict=True):
        assert [r.token_ids for r in group] == [tokens for tokens, _ in others]
        for response, (tokens, logprobs) in zip(group, others, strict=True):
            assert response.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert response.finish_reason == ("stop" if tokens[-1] in params.stop_ids else "length")


def test_the_samples_end_at_different_tokens(expected: dict) -> None:
    lengths = {len(tokens) for group in expected["plain"] for tokens, _ in group}
    assert len(lengths) > 5, "otherwise nothing is refilled while other rows go on"


@pytest.mark.parametrize("steps_per_look", [1, 7])
def test_a_nucleus_beyond_the_candidates_is_drawn_again(
    expected: dict, monkeypatch: pytest.MonkeyPatch, steps_per_look: int
) -> None:
    monkeypatch.setattr(decoding, "_NUCLEUS_CANDIDATES", 2)
    for name in ("nucleus", "penalised nucleus"):
        model = OneLayer()
        found = sample(model, PARAMS[name], 5, steps_per_look=steps_per_look)
        assert [[r.token_ids for r in group] for group in found] == [
            [tokens for tokens, _ in others] for others in expected[name]
        ]
        few = len(model.passes)
        with monkeypatch.context() as context:
            context.setattr(decoding, "_NUCLEUS_CANDIDATES", VOCAB)
            sample(model, PARAMS[name], 5, steps_per_look=steps_per_look)
        assert few > len(model.passes) - few, "two candidates were meant to be too few"


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    READS = (
        Tensor.tolist,
        Tensor.item,
        Tensor.cpu,
        Tensor.numpy,
        Tensor.nonzero,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        torch.nonzero,
    )

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", "penalised nucleus"])
def test_the_host_reads_once_for_many_tokens(name: str) -> None:
    model = OneLayer()
    # A response that fits no look exactly, and none that ends before: only the looks themselves read.
    params = replace(PARAMS[name], stop_ids=frozenset(), max_new_tokens=24)
    with HostReads() as reads:
        sample(model, params, len(PROMPTS) * params.num_samples, steps_per_look=8)
    assert sum(kind == "Decode" for kind, _ in model.passes) == 24
    lists_of_the_end = 2 * len(PROMPTS) * params.num_samples  # taken of a tensor that is on the host already
    assert reads.num == 3 + 1 + lists_of_the_end


def test_with_graphs_the_shapes_are_few_and_the_tensors_stay(
    expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph captured for a shape must be right for the next step of that shape: the same tensors."""
    used: dict[Any, set[Any]] = {}

    class Recorder:
        def __init__(self, is_enabled: bool, all_agree: Any) -> None:
            assert is_enabled

        def run(self, shape: Any, step: Any) -> Any:
            rows = decoder._rows
            layer = decoder._cache.layers[0]
            out = step()  # allocates the cache at the first call
            addresses = (rows.token, rows.position, layer.keys, layer.values, decoder._engine.frequencies)
            used.setdefault(shape, set()).add(tuple(t.data_ptr() for t in addresses))
            return out

    monkeypatch.setattr(decoding, "StepGraphs", Recorder)
    monkeypatch.setattr(decoding, "_FEWEST_ROWS", 2)
    params = PARAMS["plain"]
    engine, cache = OneLayer().engine(8, has_graphs=True, steps_per_look=3)
    decoder = Decoder(engine, cache, requests(params), params, lambda: False)
    found = decoder.run()
    assert [[r.token_ids for r in group] for group in found] == [
        [tokens for tokens, _ in others] for others in expected["plain"]
    ]
    assert all(len(addresses) == 1 for addresses in used.values())
    assert {8} < {num for num, _ in used} <= {8, 4, 2}
    assert {length % 8 for _, length in used} == {0}


def test_samples_of_a_prompt_share_its_prefill_which_is_cut_by_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, params = OneLayer(), PARAMS["greedy"]
    sample(model, params, len(PROMPTS) * params.num_samples)
    # The last token of a prompt is decoded, so two prompts have nothing to prefill.
    assert [shape for kind, shape in model.passes if kind == Prefill.__name__] == [(6, 6)]
    model.passes.clear()
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 7)
    sample(model, params, len(PROMPTS) * params.num_samples)
    assert [shape for kind, shape in model.passes if kind == Prefill.__name__] == [(1, 6), (3, 2)]


def test_a_stop_is_asked_for_every_32_tokens() -> None:
    model, asked = OneLayer(), []
    params = replace(PARAMS["plain"], stop_ids=frozenset(), max_total_tokens=None, max_new_tokens=30)

    def should_stop() -> bool:
        asked.append(sum(kind == "Decode" for kind, _ in model.passes))
        return len(asked) == 3

    engine, cache = model.engine(3, steps_per_look=16)
    with pytest.raises(Stopped):
        Decoder(engine, cache, requests(params), params, should_stop).run()
    assert asked == [0, 46, 90]


def test_rows_that_fit_are_a_power_of_two() -> None:
    assert rows_that_fit(100e9, 1e9) == 64
    assert rows_that_fit(128e9, 1e9) == 128
    assert rows_that_fit(1e15, 1e9) == 512
    assert rows_that_fit(1e6, 1e9) == 1
