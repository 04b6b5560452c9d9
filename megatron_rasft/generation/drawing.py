"""Draws tokens from logits on the device, without making the host wait for the device."""

import torch
from torch import Tensor


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row by nucleus (top-p) sampling (arXiv 1904.09751).

    The nucleus is the smallest set of most likely tokens whose probability reaches ``top_p``. The token is found by
    inverting the nucleus's cumulative distribution at the given uniform number.

    Args:
        logits: [b, v] fp32.
        uniforms: [b] fp64 in [0, 1).
        temperature: >= 0; 0 takes the most likely token.
        top_p: in (0, 1].
        num_candidates: with ``top_p`` below 1, number of most likely tokens that are sorted.

    Returns:
        Tokens [b] int64. Their log-probabilities [b] fp32 under softmax(logits / temperature), before top-p. And
        [b] bool, False for rows whose candidates do not reach ``top_p``: these need more candidates.
    """
    is_exact = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None])[:, 0], is_exact
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    # fp64: a cumulative sum of 150,000 fp32 probabilities would lose the least likely tokens.
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
    """Finds the index whose interval of the cumulative probabilities [b, n] contains uniforms * total. Returns [b, 1] int64."""
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    # Rounding can move u * total up to the total itself: then take the last index with a probability above 0.
    return torch.minimum(place, torch.searchsorted(cumulative, total))


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occurred before less likely, for a penalty above 1 (arXiv 1909.05858, section 4.1).

    Args:
        logits: [b, v]; positive ones of seen tokens are divided by the penalty, negative ones multiplied by it.
        seen: [b, v] bool, True for tokens of prompt and response.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
