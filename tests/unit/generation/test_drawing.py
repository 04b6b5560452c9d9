"""Drawn tokens compared with nucleus sampling and the repetition penalty written as loops."""

import math

import numpy as np
import pytest
import torch

from megatron_rasft.generation.drawing import apply_repetition_penalty, draw


def nucleus(logits: np.ndarray, u: float, temperature: float, top_p: float) -> int:
    """Takes the most likely tokens until the sum of their probabilities reaches top_p, and inverts their distribution at u."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: -probs[i]) if top_p < 1 else list(range(len(probs)))
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probs[token]
        if top_p < 1 and mass >= top_p:
            break
    reached = 0.0
    for token in kept:
        reached += probs[token]
        if u * mass < reached:
            return token
    return kept[-1]


@pytest.mark.parametrize(
    "temperature,top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.9, 0.5), (1.5, 0.05), (1.0, 0.999)]
)
@pytest.mark.parametrize("vocab_size,spread", [(11, 2.0), (700, 0.1), (700, 4.0)])
@pytest.mark.parametrize("num_candidates", [100, 10_000])
def test_draw_is_nucleus_sampling(
    vocab_size: int, spread: float, temperature: float, top_p: float, num_candidates: int
) -> None:
    random = np.random.default_rng(3)
    logits = (spread * random.standard_normal((200, vocab_size))).astype(np.float32)
    uniforms = random.random(200)
    tokens, logprobs, is_exact = draw(
        torch.from_numpy(logits), torch.from_numpy(uniforms), temperature, top_p, num_candidates
    )
    scaled = logits.astype(np.float64) / temperature
    exact = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    best = -np.sort(-np.exp(exact), axis=-1)[:, :num_candidates]
    is_limited = top_p < 1 and num_candidates < vocab_size
    assert is_exact.tolist() == ((best.sum(-1) >= top_p).tolist() if is_limited else [True] * 200)
    rows = np.flatnonzero(is_exact.numpy())
    expected = [nucleus(logits[row], uniforms[row], temperature, top_p) for row in rows]
    assert tokens.numpy()[rows].tolist() == expected
    np.testing.assert_allclose(logprobs.numpy()[rows], exact[rows, expected], atol=1e-5)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    tokens, logprobs, is_exact = draw(
        torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.999], dtype=torch.float64), 0.0, 0.1, 1
    )
    assert tokens.tolist() == [1] and is_exact.tolist() == [True]
    assert float(logprobs) == pytest.approx(2.0 - math.log(1 + math.e**2 + math.e), abs=1e-6)


def test_frequencies_of_drawn_tokens_are_their_probabilities() -> None:
    num = 20000
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, -30.0])
    uniforms = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    tokens, *_ = draw(logits.expand(num, -1), uniforms, 1.0, 1.0, num)
    expected = torch.softmax(logits.double(), 0)[:4] * num
    counts = torch.bincount(tokens, minlength=5).double()
    assert counts[4] == 0
    chi_square = float(((counts[:4] - expected) ** 2 / expected).sum())
    assert chi_square < 16.3, "above the 99.9 % quantile for 3 degrees of freedom"


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_extreme_uniform_numbers_draw_tokens_of_the_nucleus(u: float, top_p: float) -> None:
    logits = torch.tensor([[-2000.0, 1.0, 0.9, 0.8, -2000.0]])
    tokens, *_ = draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, top_p, 5)
    assert int(tokens) == (1 if u == 0.0 else 2 if top_p < 1 else 3)


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0, 3.0], [2.0, -1.0, 0.0, 3.0]])
    seen = torch.tensor([[True, True, True, False], [False, False, False, True]])
    assert apply_repetition_penalty(logits, seen, 2.0).tolist() == [
        [1.0, -2.0, 0.0, 3.0],
        [2.0, -1.0, 0.0, 1.5],
    ]
