"""The kernels of the log-probabilities, compiled for and run on a GPU, compared with fp64 formulas."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rasft.machine.wgrad import MegatronOutputWeight, write_product
from megatron_rasft.objective.fused_logprobs import ReferenceLogits, fused_logprobs
from megatron_rasft.types import KLDirection

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN = 40, 64
PADDED, VOCABULARY = 20480, 20001
"""Padded size of five tiles of columns, and a vocabulary size that is not a multiple of a vector load."""


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with torch.device("cuda"):
        torch.manual_seed(0)
        yield


def gradients_of(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def expected_terms(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, kind: KLDirection | None
) -> tuple[Tensor, Tensor]:
    """Computes log-probabilities and KL divergences from fp64 logits."""
    log_p = logits[:, :VOCABULARY].log_softmax(-1)
    log_q = ref_logits[:, :VOCABULARY].log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "reverse":
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], kl if kind else torch.zeros_like(kl)


@pytest.mark.parametrize("chunk_tokens", [0, 16])
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("kind", [None, "forward", "reverse"])
def test_logprobs_kl_and_gradients_equal_the_formula(
    kind: KLDirection | None, is_fused: bool, chunk_tokens: int
) -> None:
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    weight: Any = (torch.randn(PADDED, HIDDEN) * 0.3).bfloat16().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(PADDED, HIDDEN), False
    ref_hidden = torch.randn(TOKENS, HIDDEN).bfloat16()
    ref_weight = (torch.randn(PADDED, HIDDEN) * 0.3).bfloat16()
    labels = torch.randint(VOCABULARY, (TOKENS,))
    weights = torch.linspace(-1.0, 2.0, TOKENS)
    reference = None
    if kind is not None:
        reference = ReferenceLogits(hidden=ref_hidden, weight=ref_weight, direction=kind)

    output = MegatronOutputWeight(weight=weight, tp_group=None, sums_hidden_grad=False, is_fused=is_fused)
    logprobs, kl = fused_logprobs(hidden, output, labels, VOCABULARY, chunk_tokens, reference)
    loss = (weights * logprobs).sum() + (0.0 if kl is None else 0.3 * kl.sum())
    hidden_grad, weight_grad = gradients_of(loss, hidden, weight)

    # The same BF16 logits, then fp64
    logits = (hidden.detach() @ weight.detach().t()).double().requires_grad_()
    want_logprobs, want_kl = expected_terms(logits, (ref_hidden @ ref_weight.t()).double(), labels, kind)
    want_loss = (weights.double() * want_logprobs).sum() + 0.3 * want_kl.sum()
    (logits_grad,) = gradients_of(want_loss, logits)

    torch.testing.assert_close(logprobs.double(), want_logprobs, rtol=1e-5, atol=1e-5)
    if kl is not None:
        torch.testing.assert_close(kl.double(), want_kl, rtol=1e-4, atol=1e-5)
    got = weight.main_grad if is_fused else weight_grad
    assert_near(hidden_grad, logits_grad @ weight.detach().double())
    assert_near(got, logits_grad.t() @ hidden.detach().double())


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Compares with a tolerance of 2**-7, because the gradient of each logit is rounded to BF16 (relative error 2**-9)."""
    gap = (found.double() - expected).norm() / expected.norm()
    assert gap < 2**-7, gap


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("has_transformer_engine", [True, False])
def test_weight_gradient_is_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch, has_transformer_engine: bool, accumulate: bool
) -> None:
    if has_transformer_engine:
        pytest.importorskip("transformer_engine.pytorch")
    else:
        monkeypatch.setattr("megatron_rasft.machine.wgrad.transformer_engine_gemm", lambda: None)
    hidden, grad = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, 128).bfloat16()
    into = torch.full((128, HIDDEN), 1000.0)
    write_product(hidden, grad, into, accumulate=accumulate)
    want = grad.double().t() @ hidden.double() + (1000.0 if accumulate else 0.0)
    torch.testing.assert_close(into.double(), want, rtol=1e-6, atol=1e-3)
