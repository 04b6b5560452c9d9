"""Refilled, moved and repeated rows sample the same tokens as each sequence sampled alone."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_rasft.generation import decoding
from megatron_rasft.generation.decoding import Decoder, DecoderModel, Rows
from megatron_rasft.generation.kv_cache import CachedAttention, Decode, KeyValueCache, Prefill
from megatron_rasft.model.attention import SdpaCoreAttention
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.types import Request, Response, SamplingParams

VOCAB, HEADS, GROUPS, DIM = 13, 4, 2, 8
LENGTH = 48
PROMPTS = [[3, 5, 1, 12, 9, 9, 2], [1, 7, 4], [8, 8, 8], [0, 11], [6], [10]]
"""Sorts requests with the longest prompt first, as Decoder expects."""

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
    """A model of embedding, one attention layer with rotary positions, and output layer.

    It computes in fp64, so that rounding differences cannot change a sampled token.
    """

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

    def decoder_model(
        self, num_rows: int, is_fitted: bool = False, **changes: Any
    ) -> tuple[DecoderModel, KeyValueCache]:
        cache = KeyValueCache(num_rows, LENGTH, is_fitted)
        config: Any = SimpleNamespace(
            attention_dropout=0.0, softmax_type="vanilla", window_size=None, window_attn_skip_freq=None
        )
        layer = CachedAttention(SdpaCoreAttention(config, 1, pg_collection=SimpleNamespace(cp=None)), cache)  # type: ignore[arg-type]
        values: dict[str, Any] = {
            "forward": partial(self.forward, layer, cache),
            "frequencies": self.frequencies,
            "broadcast_from_last_stage": lambda tensor: tensor,
            "all_agree": lambda agrees: agrees,
            "dtype": torch.float64,
            "vocab_size": VOCAB,
            "has_graphs": False,
            "steps_per_read": 1,
        }
        return DecoderModel(**{**values, **changes}), cache

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
        """[v] logits after the sequence ``ids``, recomputed from the formula of attention."""
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
    """Samples one sequence alone, and recomputes all of it for each token."""
    uniforms = torch.rand(
        params.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ids, logprobs = list(prompt), []
    for step in range(params.max_response_tokens(len(prompt))):
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
    """Samples all requests with ``num_rows`` rows; ``changes`` replace fields of the DecoderModel."""
    decoder_model, cache = model.decoder_model(num_rows, **changes)
    return Decoder(decoder_model, cache, requests(params), params, lambda: False).run()


@pytest.fixture(autouse=True)
def small_key_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "KEY_BUCKET", 8)
    monkeypatch.setattr(decoding, "PLAIN_KEY_BUCKET", 4)


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[str, list[list[tuple[list[int], list[float]]]]]]:
    model = OneLayer()
    yield {
        name: [[alone(model, r.prompt_ids, seed, params) for seed in r.seeds] for r in requests(params)]
        for name, params in PARAMS.items()
    }


@pytest.mark.parametrize("is_fitted", [False, True])
@pytest.mark.parametrize("num_rows,steps_per_read", [(18, 1), (18, 16), (5, 1), (5, 7), (1, 16)])
@pytest.mark.parametrize("name", PARAMS)
def test_rows_sample_the_tokens_of_each_sequence_alone(
    expected: dict, name: str, num_rows: int, steps_per_read: int, is_fitted: bool
) -> None:
    params = PARAMS[name]
    found = sample(OneLayer(), params, num_rows, steps_per_read=steps_per_read, is_fitted=is_fitted)
    for group, others in zip(found, expected[name], strict=True):
        assert [r.token_ids for r in group] == [tokens for tokens, _ in others]
        for response, (tokens, logprobs) in zip(group, others, strict=True):
            assert response.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert response.finish_reason == ("stop" if tokens[-1] in params.stop_ids else "length")


def test_the_samples_end_at_different_tokens(expected: dict) -> None:
    lengths = {len(tokens) for group in expected["plain"] for tokens, _ in group}
    assert len(lengths) > 5, "otherwise no row would be refilled while others continue"


@pytest.mark.parametrize("steps_per_read", [1, 7])
def test_steps_are_repeated_if_a_nucleus_exceeds_the_candidates(
    expected: dict, monkeypatch: pytest.MonkeyPatch, steps_per_read: int
) -> None:
    monkeypatch.setattr(decoding, "NUCLEUS_CANDIDATES", 2)
    for name in ("nucleus", "penalised nucleus"):
        model = OneLayer()
        found = sample(model, PARAMS[name], 5, steps_per_read=steps_per_read)
        assert [[r.token_ids for r in group] for group in found] == [
            [tokens for tokens, _ in others] for others in expected[name]
        ]
        few = len(model.passes)
        with monkeypatch.context() as context:
            context.setattr(decoding, "NUCLEUS_CANDIDATES", VOCAB)
            sample(model, PARAMS[name], 5, steps_per_read=steps_per_read)
        assert few > len(model.passes) - few, "two candidates must be too few, so that steps are repeated"


class HostReads(TorchFunctionMode):
    """Counts the calls that make the host wait for the device."""

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
def test_the_host_reads_the_device_once_for_many_tokens(name: str) -> None:
    model = OneLayer()
    # All responses have 24 tokens, so the host reads after 8, 16 and 24 tokens, and then collects the responses once.
    params = replace(PARAMS[name], stop_ids=frozenset(), max_new_tokens=24)
    with HostReads() as reads:
        sample(model, params, len(PROMPTS) * params.num_samples, steps_per_read=8)
    assert sum(kind == "Decode" for kind, _ in model.passes) == 24
    lists_of_host_tensors = 2 * len(PROMPTS) * params.num_samples  # reads of the collected responses
    assert reads.num == 3 + 1 + lists_of_host_tensors


def test_steps_of_one_graph_use_the_same_tensors_and_shapes_are_few(
    expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replayed graph reads the addresses that it was captured with, so they must not change between steps."""
    used: dict[Any, set[Any]] = {}
    created: list[Rows] = []

    class RecordedRows(Rows):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            created.append(self)

    class Recorder:
        def __init__(self, is_enabled: bool, all_agree: Any) -> None:
            assert is_enabled

        def run(self, shape: Any, step: Any) -> Any:
            out = step()  # the first call allocates the cache
            (rows,), layer = created, cache.layers[0]
            tensors = (rows.token, rows.position, layer.keys, layer.values, decoder_model.frequencies)
            used.setdefault(shape, set()).add(tuple(tensor.data_ptr() for tensor in tensors))
            return out

    monkeypatch.setattr(decoding, "Rows", RecordedRows)
    monkeypatch.setattr(decoding, "StepGraphs", Recorder)
    monkeypatch.setattr(decoding, "FEWEST_ROWS", 2)
    params = PARAMS["plain"]
    decoder_model, cache = OneLayer().decoder_model(8, has_graphs=True, steps_per_read=3)
    found = Decoder(decoder_model, cache, requests(params), params, lambda: False).run()
    assert [[r.token_ids for r in group] for group in found] == [
        [tokens for tokens, _ in others] for others in expected["plain"]
    ]
    assert all(len(addresses) == 1 for addresses in used.values())
    assert {8} < {num for num, _ in used} <= {8, 4, 2}
    assert {length % 8 for _, length in used} == {0}


def test_without_graphs_few_more_keys_are_read_than_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = CachedAttention.forward

    def recorded(layer: CachedAttention, *args: Any) -> Tensor:
        step = layer._cache.step
        if isinstance(step, Decode):
            read.append(step.mask.shape[-1] - int(step.positions.max()))
        return plain(layer, *args)

    monkeypatch.setattr(CachedAttention, "forward", recorded)
    sample(OneLayer(), PARAMS["plain"], 5)
    assert read and max(read) <= 4


def test_samples_of_a_prompt_share_its_prefill_and_prefills_are_limited_in_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, params = OneLayer(), PARAMS["greedy"]
    sample(model, params, len(PROMPTS) * params.num_samples)
    # The last token of a prompt is decoded, so prompts of one token have only padding in the others' prefill.
    assert [shape for kind, shape in model.passes if kind == Prefill.__name__] == [(6, 6)]
    model.passes.clear()
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 7)
    sample(model, params, len(PROMPTS) * params.num_samples)
    assert [shape for kind, shape in model.passes if kind == Prefill.__name__] == [(1, 6), (3, 2)]


def test_should_stop_is_called_about_every_32_tokens() -> None:
    model, asked = OneLayer(), []
    params = replace(PARAMS["plain"], stop_ids=frozenset(), max_total_tokens=None, max_new_tokens=30)

    def should_stop() -> bool:
        asked.append(sum(kind == "Decode" for kind, _ in model.passes))
        return len(asked) == 3

    decoder_model, cache = model.decoder_model(3, steps_per_read=16)
    with pytest.raises(Stopped):
        Decoder(decoder_model, cache, requests(params), params, should_stop).run()
    assert asked == [0, 46, 90]


def rows_with(num: int, **state: list[int]) -> Rows:
    rows = Rows(num, max_new_tokens=4, num_seen=6, device=torch.device("cpu"))
    rows.is_over.fill_(False)
    for name, values in state.items():
        getattr(rows, name).copy_(torch.tensor(values))
    return rows


def advance(rows: Rows, tokens: list[int], stops: list[int]) -> None:
    drawn = torch.tensor(tokens, dtype=torch.float64)
    rows.advance(drawn, -drawn / 8, torch.tensor(stops))


def test_advance_ends_a_row_at_a_stop_token_or_its_limit() -> None:
    rows = rows_with(4, limit=[4, 4, 1, 4], position=[7, 3, 5, 0])
    rows.is_over[3] = True
    advance(rows, [2, 5, 1, 3], stops=[5, 0])
    assert rows.is_over.tolist() == [False, True, True, True]
    assert rows.count.tolist() == [1, 1, 1, 0], "a row that was over gets no token"
    assert rows.position.tolist() == [8, 3, 5, 0], "rows that are over stay inside the cache"
    assert rows.token[0] == 2
    assert rows.drawn[0, :3, 0].tolist() == [2.0, 5.0, 1.0]
    assert rows.drawn[1, :3, 0].tolist() == [-0.25, -0.625, -0.125]
    assert rows.seen.int().tolist()[0] == [0, 0, 1, 0, 0, 0]


def test_rows_that_are_over_keep_their_response_while_others_continue() -> None:
    rows = rows_with(2, limit=[1, 4])
    for token in (1, 2, 3):
        advance(rows, [token, token], stops=[-1])
    assert rows.count.tolist() == [1, 3]
    assert rows.drawn[0, 0, 0] == 1.0
    assert rows.drawn[0, 1, :3].tolist() == [1.0, 2.0, 3.0]


def test_advance_of_fewer_rows_leaves_the_others_alone() -> None:
    rows = rows_with(3, limit=[4, 4, 4])
    advance(rows, [2, 3], stops=[-1])
    assert rows.count.tolist() == [1, 1, 0] and rows.position.tolist() == [1, 1, 0]


def test_restored_rows_sample_the_same_tokens_again() -> None:
    rows = rows_with(2, limit=[2, 4], position=[3, 4])
    advance(rows, [2, 3], stops=[-1])
    states = ("token", "position", "count", "is_over", "seen")
    before = {name: getattr(rows, name).clone() for name in states}
    restore = rows.save()
    advance(rows, [4, 5], stops=[-1])
    assert rows.is_over.tolist() == [True, False]
    restore()
    for name, state in before.items():
        assert torch.equal(getattr(rows, name), state), name
    advance(rows, [1, 1], stops=[-1])
    assert rows.drawn[0, :, :2].tolist() == [[2.0, 1.0], [3.0, 1.0]]


def test_moved_rows_carry_their_whole_state() -> None:
    rows = rows_with(3, limit=[1, 2, 3], position=[4, 5, 6])
    advance(rows, [1, 2, 3], stops=[-1])
    names = ("token", "position", "count", "limit", "is_over", "uniforms", "seen")
    expected = {name: getattr(rows, name)[2].clone() for name in names}
    drawn = rows.drawn[:, 2].clone()
    rows.move(torch.tensor([2]), torch.tensor([0]))
    for name, state in expected.items():
        assert torch.equal(getattr(rows, name)[0], state), name
    assert torch.equal(rows.drawn[:, 0], drawn)
    assert rows.limit.tolist() == [3, 2, 3]
