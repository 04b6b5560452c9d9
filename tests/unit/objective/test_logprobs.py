"""Log-probabilities and KL with a complete and a sharded vocabulary, against fp64 formulas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.objective.logprobs import (
    chunked_logprobs,
    chunked_logprobs_and_kl,
    vocab_parallel_kl,
    vocab_parallel_logprobs,
)
from megatron_rasft.types import KLDirection
from tests.forking import call_on_ranks
from tests.unit.objective.thread_ranks import on_threads

DIRECTIONS: tuple[KLDirection, ...] = ("forward", "reverse")
TP = 2


def logits_of(*shape: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels_of(*shape: int, vocab_size: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def expected_logprobs(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    log_softmax = logits.double()[..., :vocab_size].log_softmax(-1)
    return log_softmax.gather(-1, labels[..., None])[..., 0]


def expected_kl(policy: Tensor, ref: Tensor, vocab_size: int, direction: KLDirection) -> Tensor:
    log_p = policy.double()[..., :vocab_size].log_softmax(-1)
    log_q = ref.double()[..., :vocab_size].log_softmax(-1)
    if direction == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def gradient(output: Tensor, wrt: Tensor) -> Tensor:
    """The gradient, with an upstream gradient that differs between positions."""
    upstream = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).reshape(output.shape)
    (result,) = torch.autograd.grad(output, wrt, upstream)
    return result


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("vocab_size", [16, 13, 1])
def test_logprobs_and_gradient_equal_the_formula(shape: tuple[int, ...], vocab_size: int) -> None:
    labels = labels_of(*shape, vocab_size=vocab_size)
    logits = logits_of(*shape, 16).float().requires_grad_()
    reference = logits.detach().double().requires_grad_()

    logprobs = vocab_parallel_logprobs(logits, labels, None, vocab_size)
    expected = expected_logprobs(reference, labels, vocab_size)

    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gradient(logprobs, logits).double(), gradient(expected, reference), rtol=1e-5, atol=1e-6
    )
    assert (
        gradient(vocab_parallel_logprobs(logits, labels, None, vocab_size), logits)[..., vocab_size:] == 0
    ).all()


def test_bf16_logits_are_computed_in_fp32_and_get_bf16_gradients() -> None:
    labels = labels_of(9, vocab_size=30)
    logits = logits_of(9, 32).bfloat16().requires_grad_()
    reference = logits.detach().double().requires_grad_()

    logprobs = vocab_parallel_logprobs(logits, labels, None, 30)
    expected = expected_logprobs(reference, labels, 30)

    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    grad = gradient(logprobs, logits)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), gradient(expected, reference), rtol=2**-8, atol=1e-6)


def test_the_logits_are_left_as_they_were() -> None:
    logits, labels = logits_of(4, 8).float().requires_grad_(), labels_of(4, vocab_size=7)
    before = logits.detach().clone()
    gradient(vocab_parallel_logprobs(logits, labels, None, 7), logits)
    for direction in DIRECTIONS:
        gradient(vocab_parallel_kl(logits, before, None, 7, direction), logits)
    assert torch.equal(logits, before)
    assert torch.equal(before, logits_of(4, 8).float())


def test_huge_logits_stay_finite() -> None:
    logits = (logits_of(6, 8) * 1e4).float().requires_grad_()
    logprobs = vocab_parallel_logprobs(logits, labels_of(6, vocab_size=8), None, 8)
    assert logprobs.isfinite().all() and gradient(logprobs, logits).isfinite().all()


@pytest.mark.parametrize("label", [-100, -1, 13, 15, 400])
def test_label_outside_the_vocabulary_is_nan_and_harmless_if_left_out(label: int) -> None:
    logits = logits_of(3, 16).float().requires_grad_()
    logprobs = vocab_parallel_logprobs(logits, torch.tensor([2, label, 12]), None, 13)
    assert logprobs.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(torch.where(logprobs.isnan(), 0.0, logprobs).sum(), logits)
    assert grad.isfinite().all() and (grad[1] == 0).all()


@pytest.mark.parametrize("vocab_size", [8, 6])
def test_logprobs_and_kl_pass_gradcheck(vocab_size: int) -> None:
    policy, ref = logits_of(3, 8, scale=1.0).requires_grad_(), logits_of(3, 8, seed=5, scale=1.0)
    labels = labels_of(3, vocab_size=vocab_size)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_logprobs(x, labels, None, vocab_size), policy)
    for direction in DIRECTIONS:
        assert torch.autograd.gradcheck(
            lambda x, d=direction: vocab_parallel_kl(x, ref, None, vocab_size, d), policy
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("vocab_size", [16, 13])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_and_gradient_equal_the_formula(
    direction: KLDirection, vocab_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ref = logits_of(*shape, 16, seed=3).to(dtype).requires_grad_()
    policy = logits_of(*shape, 16).to(dtype).requires_grad_()
    reference = policy.detach().double().requires_grad_()

    kl = vocab_parallel_kl(policy, ref, None, vocab_size, direction)
    expected = expected_kl(reference, ref.detach(), vocab_size, direction)

    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    grad = gradient(kl, policy)
    assert grad.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grad.double(), gradient(expected, reference), rtol=rtol, atol=1e-5)
    assert ref.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_of_a_distribution_with_itself_is_exactly_zero(direction: KLDirection) -> None:
    logits = logits_of(5, 12).float().requires_grad_()
    kl = vocab_parallel_kl(logits, logits.detach(), None, 11, direction)
    assert (kl == 0).all()
    assert (gradient(kl, logits) == 0).all()


class Head:
    """A projection that records the largest number of tokens of one call."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.calls: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.calls.append(hidden.shape[0])
        return hidden @ self.weight.t()


@pytest.mark.parametrize("chunk_tokens", [0, 1, 4, 10, 11, 64])
def test_chunked_logprobs_equal_whole_ones(chunk_tokens: int) -> None:
    hidden, weight = logits_of(11, 6, scale=1.0).requires_grad_(), logits_of(16, 6, seed=2).requires_grad_()
    labels = labels_of(11, vocab_size=13)
    head = Head(weight)

    logprobs = chunked_logprobs(hidden, head, labels, None, 13, chunk_tokens)
    expected = expected_logprobs(hidden @ weight.t(), labels, 13)

    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    for leaf in (hidden, weight):
        upstream = torch.linspace(-1.0, 2.0, 11, dtype=torch.float64)
        (got,) = torch.autograd.grad(logprobs, leaf, upstream, retain_graph=True)
        (want,) = torch.autograd.grad(expected, leaf, upstream, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert max(head.calls) == (min(chunk_tokens, 11) or 11)


def test_a_vocabulary_larger_than_its_logits_is_refused() -> None:
    logits, labels = logits_of(3, 8), labels_of(3, vocab_size=8)
    with pytest.raises(AssertionError, match="vocabulary of 9"):
        vocab_parallel_logprobs(logits, labels, None, 9)
    with pytest.raises(AssertionError, match="vocabulary of 9"):
        vocab_parallel_kl(logits, logits, None, 9, "forward")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_no_tokens_have_no_logprobs(shape: tuple[int, int]) -> None:
    logits = logits_of(*shape, 8).requires_grad_()
    logprobs = vocab_parallel_logprobs(logits, labels_of(*shape, vocab_size=8), None, 8)
    assert logprobs.shape == shape and gradient(logprobs, logits).shape == logits.shape
    assert vocab_parallel_kl(logits, logits, None, 8, "reverse").shape == shape


def test_labels_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        chunked_logprobs(logits_of(7, 6), Head(logits_of(16, 6)), labels_of(6, vocab_size=16), None, 16, 3)


def test_projection_is_recomputed_only_if_this_saves_memory() -> None:
    hidden, labels = logits_of(8, 6).requires_grad_(), labels_of(8, vocab_size=16)
    weight = logits_of(16, 6, seed=2)
    for chunk_tokens, with_grad, num_calls in [(4, True, 4), (4, False, 2), (0, True, 1), (8, True, 1)]:
        head = Head(weight)
        with torch.set_grad_enabled(with_grad):
            logprobs = chunked_logprobs(hidden, head, labels, None, 16, chunk_tokens)
        if with_grad:
            logprobs.sum().backward()
        assert len(head.calls) == num_calls


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk_tokens", [0, 3])
def test_chunked_kl_equals_whole_one_and_spares_the_reference(
    direction: KLDirection, chunk_tokens: int
) -> None:
    hidden, ref_hidden = logits_of(7, 6).requires_grad_(), logits_of(7, 5, seed=9).requires_grad_()
    head, ref_head = Head(logits_of(16, 6, seed=2, scale=0.3)), Head(logits_of(16, 5, seed=4, scale=0.3))
    ref_head.weight.requires_grad_()
    labels = labels_of(7, vocab_size=13)

    logprobs, kl = chunked_logprobs_and_kl(
        hidden, head, ref_hidden, ref_head, labels, None, 13, chunk_tokens, direction
    )
    (logprobs.sum() + 0.3 * kl.sum()).backward()

    # 3 chunks of 7 tokens, each projected again in the backward pass; one chunk is not.
    assert len(head.calls) == len(ref_head.calls) == (6 if chunk_tokens else 1)
    leaf = hidden.detach().requires_grad_()
    policy, ref = leaf @ head.weight.t(), (ref_hidden @ ref_head.weight.t()).detach()
    want_logprobs = expected_logprobs(policy, labels, 13)
    want_kl = expected_kl(policy, ref, 13, direction)
    (want_logprobs.sum() + 0.3 * want_kl.sum()).backward()

    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(kl, want_kl, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(hidden.grad, leaf.grad, rtol=1e-10, atol=1e-10)
    assert ref_hidden.grad is None and ref_head.weight.grad is None


# two ranks

SHARDED_VOCAB_SIZES = (16, 15, 9, 8, 5)
"""Vocabulary sizes, padded to 16 logits on two ranks. With a size of at most 8 the second shard is padding only."""


def sharded_results(rank: int, group: Any) -> Iterator[tuple[str, Tensor]]:
    """Each case, computed on this rank's half of the vocabulary."""
    labels = {size: labels_of(6, vocab_size=size) for size in SHARDED_VOCAB_SIZES}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        columns = slice(rank * 8, (rank + 1) * 8)
        ref = logits_of(6, 16, seed=3).to(dtype)[:, columns]
        for size in SHARDED_VOCAB_SIZES:
            logits = logits_of(6, 16).to(dtype)[:, columns].clone().requires_grad_()
            outputs = {"logprobs": vocab_parallel_logprobs(logits, labels[size], group, size)}
            for direction in DIRECTIONS:
                outputs[direction] = vocab_parallel_kl(logits, ref, group, size, direction)
            for name, output in outputs.items():
                yield f"{name}-{dtype}-{size}", output.detach()
                yield f"{name}-{dtype}-{size}-grad", gradient(output, logits)

    hidden, weight = logits_of(6, 4).requires_grad_(), logits_of(16, 4, seed=2, scale=0.3)[rank * 8 :][:8]
    logprobs, kl = chunked_logprobs_and_kl(
        hidden,
        lambda chunk: chunk @ weight.t(),
        hidden.detach() * 0.5,
        lambda chunk: chunk @ weight.t(),
        labels[9],
        group,
        9,
        4,
        "reverse",
    )
    plain = chunked_logprobs(
        hidden.detach(), lambda chunk: chunk @ weight.t(), labels[9], group, 9, chunk_tokens=4
    )
    assert torch.equal(plain, logprobs)
    (logprobs.sum() + kl.sum()).backward()
    assert hidden.grad is not None
    dist.all_reduce(hidden.grad, group=group)  # a column-parallel projection does this in its backward pass
    yield "chunked-logprobs", logprobs.detach()
    yield "chunked-kl", kl.detach()
    yield "chunked-grad", hidden.grad


def sharded_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=TP)
    torch.save(dict(sharded_results(rank, dist.group.WORLD)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The results of two ranks that are processes."""
    folder: Path = tmp_path_factory.mktemp("tp")
    call_on_ranks(sharded_worker, folder, TP)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(TP)]


@pytest.mark.parametrize("vocab_size", SHARDED_VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["logprobs", *DIRECTIONS])
def test_two_processes_equal_the_formula(
    shards: list[dict[str, Tensor]], name: Any, dtype: torch.dtype, vocab_size: int
) -> None:
    check_shards(shards, name, dtype, vocab_size)


def test_two_threads_equal_the_formula() -> None:
    shards = on_threads(lambda rank, group: dict(sharded_results(rank, group)), TP)
    for name in ("logprobs", *DIRECTIONS):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for vocab_size in SHARDED_VOCAB_SIZES:
                check_shards(shards, name, dtype, vocab_size)
    check_chunks(shards)


def check_shards(shards: list[dict[str, Tensor]], name: Any, dtype: torch.dtype, vocab_size: int) -> None:
    logits = logits_of(6, 16).to(dtype).double().requires_grad_()
    if name == "logprobs":
        expected = expected_logprobs(logits, labels_of(6, vocab_size=vocab_size), vocab_size)
    else:
        expected = expected_kl(logits, logits_of(6, 16, seed=3).to(dtype), vocab_size, name)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5

    key = f"{name}-{dtype}-{vocab_size}"
    assert torch.equal(shards[0][key], shards[1][key])
    torch.testing.assert_close(shards[0][key].double(), expected.detach(), rtol=tolerance, atol=tolerance)
    got = torch.cat([shard[f"{key}-grad"] for shard in shards], dim=-1)
    assert got.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(got.double(), gradient(expected, logits), rtol=rtol, atol=tolerance)


def test_two_processes_equal_the_formula_in_chunks(shards: list[dict[str, Tensor]]) -> None:
    check_chunks(shards)


def check_chunks(shards: list[dict[str, Tensor]]) -> None:
    hidden, weight = logits_of(6, 4).requires_grad_(), logits_of(16, 4, seed=2, scale=0.3)
    logprobs = expected_logprobs(hidden @ weight.t(), labels_of(6, vocab_size=9), 9)
    kl = expected_kl(hidden @ weight.t(), (hidden.detach() * 0.5) @ weight.t(), 9, "reverse")
    (logprobs.sum() + kl.sum()).backward()
    for shard in shards:
        torch.testing.assert_close(shard["chunked-logprobs"], logprobs.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(shard["chunked-kl"], kl.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(shard["chunked-grad"], hidden.grad, rtol=1e-10, atol=1e-10)
