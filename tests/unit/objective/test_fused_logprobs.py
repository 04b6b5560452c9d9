"""The Triton kernels in Triton's interpreter on the CPU, with a complete and a sharded vocabulary, against fp64 formulas.

Triton chooses its interpreter when a kernel is defined. The cases therefore run in processes forked from tests/preloaded.py, which
sets TRITON_INTERPRET=1, and the tests compare their results.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.types import KLDirection
from tests.forking import call_on_ranks

TP = 2
KINDS: tuple[KLDirection | None, ...] = (None, "forward", "reverse")
VOCAB_SIZES = (16, 13, 9, 8, 5)
"""Vocabulary sizes, padded to 16 logits on two ranks. With a size of at most 8 the second shard is padding only."""
CHUNKS = (0, 4, 16)
WIDE = 5000
"""A vocabulary of more than one tile."""


def values(*shape: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels_of(num: int, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (num,), generator=torch.Generator().manual_seed(1))


def expected(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, vocab_size: int, kind: KLDirection | None
) -> tuple[Tensor, Tensor]:
    """The formulas of log-probabilities and KL (0 without a KL) in fp64."""
    log_p = logits.double()[:, :vocab_size].log_softmax(-1)
    log_q = ref_logits.double()[:, :vocab_size].log_softmax(-1)
    kl = {
        None: torch.zeros(len(labels), dtype=torch.float64),
        "forward": (log_q.exp() * (log_q - log_p)).sum(-1),
        "reverse": (log_p.exp() * (log_p - log_q)).sum(-1),
    }[kind]
    return log_p.gather(-1, labels[:, None])[:, 0], kl


def loss_of(logprobs: Tensor, kl: Tensor | None) -> Tensor:
    """A loss whose gradient differs between tokens."""
    weights = torch.linspace(-1.0, 2.0, len(logprobs), dtype=logprobs.dtype)
    loss = (weights * logprobs).sum()
    return loss if kl is None else loss + 0.3 * (weights.flip(0) * kl).sum()


# ---- in the interpreting processes


class Output:
    """An output projection that adds up the gradient of its weight in place and counts the calls."""

    def __init__(self, weight: Tensor, group: Any) -> None:
        self.weight, self.tp_group, self.sums_hidden_grad = weight, group, group is not None
        self.gradient = torch.zeros_like(weight, requires_grad=False)

    def add_gradient(self, logits_grad: Tensor, hidden: Tensor, *, is_whole: bool) -> None:
        self.gradient += logits_grad.t() @ hidden

    def finish_gradient(self) -> Tensor:
        return self.gradient


def sharded_cases(rank: int) -> Iterator[tuple[str, Tensor]]:
    from megatron_rasft.objective.fused_logprobs import ReferenceLogits, fused_logprobs

    columns = slice(rank * 8, rank * 8 + 8)
    for vocab_size in VOCAB_SIZES:
        for kind in KINDS:
            for chunk_tokens in CHUNKS if vocab_size == 13 else (4,):
                hidden = values(11, 6, scale=1.0).float().requires_grad_()
                weight = values(16, 6, seed=2).float()[columns].clone().requires_grad_()
                reference = None
                if kind is not None:
                    ref_weight = values(16, 5, seed=4).float()[columns]
                    ref_hidden = values(11, 5, seed=3, scale=1.0).float()
                    reference = ReferenceLogits(hidden=ref_hidden, weight=ref_weight, direction=kind)
                output = Output(weight, dist.group.WORLD)
                labels = labels_of(11, vocab_size)
                logprobs, kl = fused_logprobs(hidden, output, labels, vocab_size, chunk_tokens, reference)
                assert (kl is None) == (kind is None)
                loss_of(logprobs, kl).backward()
                case = f"{vocab_size} {kind} {chunk_tokens}"
                yield f"{case} logprobs", logprobs.detach()
                yield f"{case} kl", torch.zeros(11) if kl is None else kl.detach()
                assert hidden.grad is not None and weight.grad is not None
                yield f"{case} hidden", hidden.grad
                yield f"{case} weight", weight.grad


def kernel_cases() -> Iterator[tuple[str, Tensor]]:
    """Log-probabilities, KL and the logits' gradient for a vocabulary that is not split."""
    from megatron_rasft.objective import fused_logprobs as fused
    from megatron_rasft.objective.logit_kernels import KL_KINDS, logit_statistics, logits_to_gradient_

    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            for width, vocab_size in ((16, 13), (WIDE, WIDE - 9), (WIDE, 4000)):
                logits, ref = values(9, width).to(dtype), values(9, width, seed=3).to(dtype)
                ref_logits = None if kind is None else ref
                labels, number = labels_of(9, vocab_size), KL_KINDS[kind]
                statistics = logit_statistics(logits, labels, ref_logits, 0, vocab_size, number)
                logprobs, kl, log_normaliser, kl_term = fused._combine(statistics, number, None)
                weights = torch.linspace(-1.0, 2.0, 9)
                terms = [weights, log_normaliser]
                if kind is not None:
                    assert kl_term is not None
                    terms += [0.3 * weights.flip(0), kl_term]
                logits_to_gradient_(logits, labels, ref_logits, torch.stack(terms), 0, vocab_size, number)
                case = f"kernel {dtype} {kind} {vocab_size}"
                yield f"{case} logprobs", logprobs
                yield f"{case} kl", torch.zeros(9) if kl is None else kl
                yield f"{case} logits", logits


def edge_cases() -> Iterator[tuple[str, Tensor]]:
    from megatron_rasft.objective.fused_logprobs import ReferenceLogits, fused_logprobs

    weight = values(16, 6, seed=2).float().requires_grad_()
    for label in (-100, -1, 13, 15, 400):
        hidden = values(3, 6, scale=1.0).float().requires_grad_()
        logprobs, _ = fused_logprobs(hidden, Output(weight, None), torch.tensor([2, label, 12]), 13, 0)
        torch.where(logprobs.isnan(), 0.0, logprobs).sum().backward()
        assert hidden.grad is not None
        yield f"label {label}", logprobs.detach()
        yield f"label {label} grad", hidden.grad
    for kind in ("forward", "reverse"):
        hidden = values(5, 6).float().requires_grad_()
        same = ReferenceLogits(hidden=hidden.detach(), weight=weight.detach(), direction=kind)  # type: ignore[arg-type]
        _, kl = fused_logprobs(hidden, Output(weight, None), labels_of(5, 13), 13, 0, same)
        assert kl is not None
        kl.sum().backward()
        assert hidden.grad is not None
        yield f"itself {kind}", kl.detach()
        yield f"itself {kind} grad", hidden.grad
    hidden = (values(6, 6) * 1e4).float().requires_grad_()
    logprobs, _ = fused_logprobs(hidden, Output(weight, None), labels_of(6, 16), 16, 0)
    logprobs.sum().backward()
    assert hidden.grad is not None
    yield "huge", logprobs.detach()
    yield "huge grad", hidden.grad
    logprobs, _ = fused_logprobs(hidden[:0], Output(weight, None), labels_of(0, 16), 16, 4)
    logprobs.sum().backward()
    yield "no tokens", logprobs.detach()


def backward_twice() -> Iterator[tuple[str, Tensor]]:
    """1 if the second backward pass of a graph raised an error, 2 if it gave the same gradient."""
    from megatron_rasft.objective.fused_logprobs import fused_logprobs

    for chunk_tokens in (0, 2):
        hidden, weight = values(5, 6, scale=1.0).float().requires_grad_(), values(16, 6, seed=2).float()
        logprobs, _ = fused_logprobs(hidden, Output(weight, None), labels_of(5, 16), 16, chunk_tokens)
        (first,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
        try:
            (second,) = torch.autograd.grad(logprobs.sum(), hidden)
        except AssertionError:
            yield f"twice {chunk_tokens}", torch.tensor(1)
        else:
            yield f"twice {chunk_tokens}", torch.tensor(2 if torch.equal(first, second) else 0)


def far_row() -> Iterator[tuple[str, Tensor]]:
    """A row that begins beyond 2**31 elements. Only the pages of the rows in use take memory."""
    from megatron_rasft.objective.logit_kernels import logit_statistics, logits_to_gradient_

    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 16), (2**30, 1))
    logits.copy_(values(3, 16))
    statistics = logit_statistics(logits, labels_of(3, 16), None, 0, 16, 0)
    yield "far statistics", statistics[0] + statistics[1].log()
    terms = torch.stack([torch.ones(3), statistics[0] + statistics[1].log()])
    logits_to_gradient_(logits, labels_of(3, 16), None, terms, 0, 16, 0)
    yield "far gradient", logits.clone()


@contextmanager
def interpreted_traffic() -> Iterator[list[int]]:
    """Bytes of every element that an interpreted kernel loads or stores."""
    from triton.runtime.interpreter import interpreter_builder as builder

    moved: list[int] = []
    load, store = builder.create_masked_load, builder.create_masked_store

    def element_size(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        moved.append(int(mask.data.sum()) * element_size(ptrs))
        return load(ptrs, mask, *rest)

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.append(int(mask.data.sum()) * element_size(ptrs))
        return store(ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        yield moved


def traffic_cases() -> Iterator[tuple[str, Tensor]]:
    """Bytes that each kernel loads and stores, and those that benchmarks/logprobs.py counts from its arguments."""
    from benchmarks.traffic import Traffic
    from megatron_rasft.objective.logit_kernels import KL_KINDS, logit_statistics, logits_to_gradient_

    for kind, number in KL_KINDS.items():
        logits, labels = values(7, WIDE).bfloat16(), labels_of(7, WIDE)
        ref_logits = None if kind is None else logits.clone()
        terms = torch.zeros(2 if kind is None else 4, 7)
        with interpreted_traffic() as moved, Traffic() as counted:
            logit_statistics(logits, labels, ref_logits, 0, WIDE, number)
        yield f"traffic statistics {kind}", torch.tensor([sum(moved), counted.num_bytes])
        with interpreted_traffic() as moved, Traffic() as counted:
            logits_to_gradient_(logits, labels, ref_logits, terms, 0, WIDE, number)
        yield f"traffic gradient {kind}", torch.tensor([sum(moved), counted.num_bytes])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=TP)
    results = dict(sharded_cases(rank))
    for cases in ((kernel_cases, far_row), (edge_cases, backward_twice, traffic_cases))[rank]:
        results |= dict(cases())
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


# ---- in this process


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Tensor]]]:
    """The results of the two ranks."""
    folder: Path = tmp_path_factory.mktemp("fused")
    call_on_ranks(worker, folder, TP)
    yield [torch.load(folder / f"rank{rank}.pt") for rank in range(TP)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("vocab_size", "chunk_tokens"), [(size, 4) for size in VOCAB_SIZES] + [(13, 0), (13, 16)]
)
def test_two_ranks_equal_the_formula(
    ranks: list[dict[str, Tensor]], kind: KLDirection | None, vocab_size: int, chunk_tokens: int
) -> None:
    hidden, weight = values(11, 6, scale=1.0), values(16, 6, seed=2)
    hidden, weight = (x.float().double().requires_grad_() for x in (hidden, weight))
    ref_logits = values(11, 5, seed=3, scale=1.0).float() @ values(16, 5, seed=4).float().t()
    logprobs, kl = expected(hidden @ weight.t(), ref_logits, labels_of(11, vocab_size), vocab_size, kind)
    loss_of(logprobs, None if kind is None else kl).backward()

    case = f"{vocab_size} {kind} {chunk_tokens}"
    for name, want in (("logprobs", logprobs), ("kl", kl), ("hidden", hidden.grad)):
        first, second = (rank[f"{case} {name}"] for rank in ranks)
        assert torch.equal(first, second) and first.dtype == torch.float32
        torch.testing.assert_close(first.double(), want.detach(), rtol=2e-5, atol=2e-5)
    got = torch.cat([rank[f"{case} weight"] for rank in ranks])
    torch.testing.assert_close(got.double(), weight.grad, rtol=2e-5, atol=2e-5)
    assert (got[vocab_size:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "vocab_size"), [(16, 13), (WIDE, WIDE - 9), (WIDE, 4000)])
def test_kernels_equal_the_formula(
    ranks: list[dict[str, Tensor]],
    dtype: torch.dtype,
    kind: KLDirection | None,
    width: int,
    vocab_size: int,
) -> None:
    logits, ref = values(9, width).to(dtype).double(), values(9, width, seed=3).to(dtype)
    logits.requires_grad_()
    logprobs, kl = expected(logits, ref, labels_of(9, vocab_size), vocab_size, kind)
    loss_of(logprobs, None if kind is None else kl).backward()

    case = f"kernel {dtype} {kind} {vocab_size}"
    got = {name: ranks[0][f"{case} {name}"] for name in ("logprobs", "kl", "logits")}
    torch.testing.assert_close(got["logprobs"].double(), logprobs.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got["kl"].double(), kl.detach(), rtol=1e-5, atol=1e-5)
    assert got["logits"].dtype == dtype
    # The interpreter truncates fp32 to BF16, a GPU rounds: an error of up to one unit in the last place instead of half a unit.
    rtol, atol = (2**-7, 1e-7) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    torch.testing.assert_close(got["logits"].double(), logits.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("label", [-100, -1, 13, 15, 400])
def test_label_outside_the_vocabulary_is_nan_and_harmless_if_left_out(
    ranks: list[dict[str, Tensor]], label: int
) -> None:
    assert ranks[1][f"label {label}"].isnan().tolist() == [False, True, False]
    grad = ranks[1][f"label {label} grad"]
    assert grad.isfinite().all() and (grad[1] == 0).all() and (grad[0] != 0).any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_of_a_distribution_with_itself_is_exactly_zero(
    ranks: list[dict[str, Tensor]], direction: str
) -> None:
    assert (ranks[1][f"itself {direction}"] == 0).all()
    assert (ranks[1][f"itself {direction} grad"] == 0).all()


def test_huge_logits_stay_finite(ranks: list[dict[str, Tensor]]) -> None:
    assert ranks[1]["huge"].isfinite().all() and ranks[1]["huge grad"].isfinite().all()


def test_no_tokens_give_no_logprobs(ranks: list[dict[str, Tensor]]) -> None:
    assert ranks[1]["no tokens"].shape == (0,)


def test_logits_that_were_overwritten_are_not_used_again(ranks: list[dict[str, Tensor]]) -> None:
    assert ranks[1]["twice 0"] == 1, "one chunk is kept: a second backward pass must raise"
    assert ranks[1]["twice 2"] == 2, "several chunks are computed again: it must give the same"


def test_rows_beyond_two_to_the_31_elements_are_reached(ranks: list[dict[str, Tensor]]) -> None:
    logits = values(3, 16).bfloat16().double()
    torch.testing.assert_close(
        ranks[0]["far statistics"].double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    want = -logits.softmax(-1)
    want[torch.arange(3), labels_of(3, 16)] += 1
    torch.testing.assert_close(ranks[0]["far gradient"].double(), want, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_counted_from_arguments_is_that_of_the_kernels(
    ranks: list[dict[str, Tensor]], kind: KLDirection | None
) -> None:
    per_logit = {"statistics": 2, "gradient": 4} if kind is None else {"statistics": 4, "gradient": 6}
    for name, num_bytes in per_logit.items():
        moved, counted = ranks[1][f"traffic {name} {kind}"].tolist()
        # The label's logit is loaded a second time, for each of 7 tokens; the count has one load per row.
        label_logits = 7 * 2 if name == "statistics" else 0
        assert moved == counted + label_logits
        assert 0 < moved - num_bytes * 7 * WIDE < 7 * 64  # the remaining bytes: a few numbers per token
