"""The delta rule and the short convolution in plain torch, compared with those of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from megatron_rasft.model.delta_rule import (
    causal_conv1d,
    chunk_gated_delta_rule,
    delta_rule,
    l2norm,
    short_conv,
)

HEADS, KEY_DIM, VALUE_DIM = 3, 8, 12


def inputs(length: int, batch: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(length)
    sizes = {"query": KEY_DIM, "key": KEY_DIM, "value": VALUE_DIM}
    made = {name: torch.randn(batch, length, HEADS, size) for name, size in sizes.items()}
    made["g"] = -torch.rand(batch, length, HEADS)
    made["beta"] = torch.rand(batch, length, HEADS)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def normalized(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return given | {name: l2norm(given[name]) for name in ("query", "key")}


def gradients(out: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), list(given.values())))


@pytest.mark.parametrize("reference", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
def test_values_and_gradients_are_those_of_transformers(reference: Any, length: int) -> None:
    given = inputs(length, batch=2)
    expected, _ = reference(**given, use_qk_l2norm_in_kernel=True)
    found, _ = chunk_gated_delta_rule(**normalized(given))
    assert torch.allclose(found, expected, atol=1e-5)
    for mine, theirs in zip(gradients(found, given), gradients(expected, given), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_state_continues_a_sequence() -> None:
    given = normalized(inputs(100))
    whole, last = delta_rule(**given)
    first, state = delta_rule(**{name: x[:, :70] for name, x in given.items()})
    second, end = delta_rule(**{name: x[:, 70:] for name, x in given.items()}, state=state)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)
    assert torch.allclose(end, last, atol=1e-6)


BOUNDS = torch.tensor([0, 30, 30, 31, 120])


def test_packed_sequences_start_with_an_empty_state() -> None:
    given = normalized(inputs(120))
    found, _ = chunk_gated_delta_rule(**given, cu_seqlens=BOUNDS)
    for start, stop in ((0, 30), (30, 31), (31, 120)):
        alone, _ = chunk_gated_delta_rule(**{name: x[:, start:stop] for name, x in given.items()})
        assert torch.allclose(found[:, start:stop], alone, atol=1e-6)


def test_the_convolution_is_that_of_transformers_and_does_not_see_other_sequences() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 120, 5), torch.randn(5, 4)
    packed, _ = causal_conv1d(x, weight, activation="silu", cu_seqlens=BOUNDS)
    for start, stop in ((0, 30), (30, 31), (31, 120)):
        alone = causal_conv1d_fn(x[:, start:stop].transpose(1, 2), weight, activation="silu")
        assert torch.allclose(packed[:, start:stop], alone.transpose(1, 2), atol=1e-6)
    continued = short_conv(x[:, 50:], weight, before=x[:, 47:50])
    whole, _ = causal_conv1d(x, weight, activation="silu")
    assert torch.allclose(continued, whole[:, 50:], atol=1e-6)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(AssertionError, match="gelu"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), activation="gelu")
