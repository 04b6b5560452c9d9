"""Transformer Engine's kernels for packed sequences under context parallelism, in plain torch.

A rank holds two chunks of each sequence side by side, called the first and the second half. Log-sum-exps are [n, t].
"""

import itertools

import torch
from torch import Tensor

KERNELS = (
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
)


def _half(cu_seqlens: Tensor, half: int) -> Tensor:
    """Indices of the tokens in the first (0) or second (1) half of every sequence."""
    bounds = cu_seqlens.tolist()
    places = []
    for begin, end in itertools.pairwise(bounds):
        middle = (begin + end) // 2
        places.append(torch.arange(begin, middle) if half == 0 else torch.arange(middle, end))
    return torch.cat(places)


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """Selects one half of every sequence: [t, n, d] -> [t/2, n, d]."""
    return tensor[_half(cu_seqlens, half)]


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, is_packed: bool, length: int) -> Tensor:
    """Selects the log-sum-exps of the second halves: [n, t] -> [n, t/2]."""
    assert is_packed
    result = lse[:, _half(cu_seqlens, 1)].contiguous()
    assert result.shape[1] == length
    return result


def thd_second_half_lse_correction(lse: Tensor, of_step: Tensor, cu_seqlens: Tensor, is_packed: bool) -> None:
    """Adds the log-sum-exps of a step [n, t/2] to those of the second halves, in place."""
    assert is_packed
    places = _half(cu_seqlens, 1)
    lse[:, places] = torch.logaddexp(lse[:, places], of_step)


def thd_out_correction(
    out: Tensor,
    of_step: Tensor,
    old_lse: Tensor,
    new_lse: Tensor,
    lse_of_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    is_packed: bool,
) -> None:
    """Merges the output of a step into the output of earlier steps, in place, weighted by their shares of the sum."""
    assert is_packed
    places = _half(cu_seqlens, 1) if only_second_half else torch.arange(old_lse.shape[1])
    tokens = out.view(-1, *out.shape[-2:])
    old = (old_lse - new_lse)[:, places].exp().t().unsqueeze(-1)  # [t, n, 1]
    new = (lse_of_step - new_lse[:, places]).exp().t().unsqueeze(-1)
    merged = tokens[places].float() * old + of_step.view(len(places), *out.shape[-2:]).float() * new
    tokens[places] = merged.to(out.dtype)


def thd_grad_correction(grad: Tensor, of_step: Tensor, cu_seqlens: Tensor, first: str, second: str) -> None:
    """Adds or copies the gradient of a step to each half, or sets a half to zero or leaves it unchanged, in place.

    If a half is unchanged or set to zero, ``of_step`` has the tokens of the other half only.
    """
    is_whole = {first, second}.isdisjoint({"none", "zero"})
    for half, action in enumerate((first, second)):
        places = _half(cu_seqlens, half)
        if action == "zero":
            grad[places] = 0
        elif action != "none":
            values = of_step[places] if is_whole else of_step
            grad[places] = grad[places] + values if action == "add" else values
