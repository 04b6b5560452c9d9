"""Draws the next tokens from their logits, on the device and without reading anything back."""

import torch
from torch import Tensor


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by inversion: the smallest set of most likely tokens whose mass reaches top_p, then u.

    Args:
        logits: [b, v] fp32.
        uniforms: [b] fp64 in [0, 1).
        temperature: > 0; 0 takes the most likely token.
        top_p: in (0, 1].
        num_candidates: with top_p below 1, how many of the most likely tokens are sorted.

    Returns:
        tokens [b] int64, their log-probabilities [b] fp32 under softmax(logits / temperature), and [b] bool,
        False where the candidates do not reach top_p: that row must be drawn again with more candidates.
    """
    is_exact = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None])[:, 0], is_exact
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.double().exp()
    if top_p >= 1.0:
        place = _invert(probs.cumsum(-1), uniforms)
        return place[:, 0], logprobs.gather(1, place)[:, 0], is_exact
    num = min(num_candidates, probs.shape[1])
    ordered, ids = torch.topk(probs, num, dim=-1)
    reached = ordered.cumsum(-1)
    before = reached - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    token = ids.gather(1, _invert(kept.cumsum(-1), uniforms))
    if num < probs.shape[1]:
        is_exact = reached[:, -1] >= top_p
    return token[:, 0], logprobs.gather(1, token)[:, 0], is_exact


def _invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """[b, n] cumulative masses and [b] fp64 -> [b, 1] the place whose mass u * total falls into."""
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    # Rounding can put u on the total: step back to the last place with any mass.
    return torch.minimum(place, torch.searchsorted(cumulative, total))


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): positive logits of seen tokens / penalty, negative * penalty."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
