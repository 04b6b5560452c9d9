"""The losses against the method's test vectors, identities between objectives, and independent fp64 formulas."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.objective.families.importance_weighted import IwSft
from megatron_rasft.objective.families.kl_regularised import Asft, SftKl
from megatron_rasft.objective.families.likelihood import Dft, Raft, Sft
from megatron_rasft.objective.families.policy_ratio import Grpo, Psft
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.objective.families.token_selective import Gft, Profit
from megatron_rasft.objective.token_losses import LossSums, PackedTokens, token_loss_sums
from tests.forking import call_on_ranks
from tests.unit.objective.thread_ranks import on_threads

LENGTHS = (7, 1, 12, 4)
"""Number of response tokens of each sequence. Each follows two prompt tokens; three padding tokens follow the last sequence."""

WEIGHTS = (1.0, 0.2779, 1.7, 0.5)


def batch(
    dtype: torch.dtype = torch.float64, weights: tuple[float, ...] = WEIGHTS, seed: int = 0
) -> PackedTokens:
    """Four sequences with every field filled. Values outside the mask are NaN."""
    generator = torch.Generator().manual_seed(seed)
    segment_ids = torch.cat(
        [torch.full((length + 2,), i) for i, length in enumerate(LENGTHS)] + [torch.zeros(3)]
    )
    loss_mask = torch.cat(
        [torch.tensor([0] * 2 + [1] * length) for length in LENGTHS] + [torch.zeros(3)]
    ).bool()
    num_tokens = loss_mask.numel()

    def values(scale: float) -> Tensor:
        drawn = torch.rand(num_tokens, generator=generator, dtype=torch.float64) * scale
        return torch.where(loss_mask, drawn, float("nan")).to(dtype)

    logprobs = -values(3.0)
    return PackedTokens(
        logprobs=logprobs.requires_grad_(),
        loss_mask=loss_mask,
        segment_ids=segment_ids.long(),
        num_segments=len(LENGTHS),
        weights=torch.tensor(weights, dtype=dtype),
        ref_logprobs=-values(4.0),
        old_logprobs=logprobs.detach() + values(0.8) - 0.4,
        kl=values(0.5).requires_grad_(),
        teacher_logprobs=-values(4.0),
    )


def loss_and_gradient(tokens: PackedTokens, objective: Objective) -> tuple[LossSums, Tensor]:
    sums = token_loss_sums(tokens, objective)
    (grad,) = torch.autograd.grad(sums.loss_sum, tokens.logprobs, retain_graph=True)
    return sums, grad


def assert_same_bits(tokens: PackedTokens, one: Objective, other: Objective) -> None:
    (sums, grad), (other_sums, other_grad) = loss_and_gradient(tokens, one), loss_and_gradient(tokens, other)
    assert sums.loss_sum.isfinite() and grad.isfinite().all()
    assert torch.equal(sums.loss_sum, other_sums.loss_sum)
    assert torch.equal(sums.denominator, other_sums.denominator)
    assert torch.equal(grad, other_grad)


def mean(metric: Tensor) -> float:
    return (metric[0] / metric[1]).item()


# the method's vectors and identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_vector_of_the_method(dtype: torch.dtype) -> None:
    tokens = PackedTokens(
        logprobs=torch.tensor([-0.1, -1, -2, -0.5, -0.3], dtype=dtype, requires_grad=True),
        loss_mask=torch.ones(5),
        segment_ids=torch.tensor([0, 0, 0, 1, 1]),
        num_segments=2,
        weights=torch.tensor([1.0, 0.2779], dtype=dtype),
        ref_logprobs=torch.tensor([-0.2, -0.5, -1, -1.5, -2.3], dtype=dtype),
    )
    sums = token_loss_sums(tokens, Rasft())
    loss = sums.loss_sum / sums.denominator
    loss.backward()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-7
    assert loss.item() == pytest.approx(0.1866512559, abs=tolerance)
    weights = torch.tensor([1.085805, 0.441455, 0.162402, 0.067422, 0.082349], dtype=dtype)
    torch.testing.assert_close(tokens.logprobs.grad, -weights / 5, rtol=0, atol=2e-7)
    assert mean(sums.metrics["ratio_mean"]) == pytest.approx((1.2 + 0.4) / 2)
    assert sums.metrics["ratio_clip_frac"].tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["sequence", "token", "off"])
def test_rasft_with_policy_equal_to_reference_is_dft(dtype: torch.dtype, level: Any) -> None:
    tokens = batch(dtype, weights=(1.0,) * 4)
    tokens = replace(tokens, ref_logprobs=tokens.logprobs.detach().clone())
    assert_same_bits(tokens, Rasft(objective_ratio=level), Dft())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bare_rasft_is_sft(dtype: torch.dtype) -> None:
    bare = Rasft(objective_ratio="off", objective_dft_factor=False)
    for weights in ((1.0,) * 4, WEIGHTS):
        assert_same_bits(batch(dtype, weights), bare, Sft())


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_inverted_squared_rasft_is_iw_sft(level: Any) -> None:
    rasft = Rasft(
        objective_ratio=level,
        objective_ratio_direction="policy_over_ref",
        objective_ratio_power=2.0,
        objective_ratio_clip_low=0.0,
        objective_ratio_clip_high=16.0,
        objective_dft_factor=False,
    )
    iw_sft = IwSft(
        objective_iw_level=level,
        objective_iw_power=2.0,
        objective_iw_clip_low=0.0,
        objective_iw_clip_high=16.0,
    )
    assert_same_bits(batch(torch.float32), rasft, iw_sft)
    assert_same_bits(batch(torch.float64), rasft, iw_sft)
    if level == "sequence":
        assert iw_sft.ratio_rule() == IwSft().ratio_rule()


def test_gft_lies_between_dft_and_sft() -> None:
    tokens = batch(torch.float32)
    assert_same_bits(tokens, Gft(objective_gft_threshold=1.0), Dft())
    assert_same_bits(tokens, Gft(objective_gft_threshold=0.0), Sft())


def test_raft_has_the_loss_that_its_flag_names() -> None:
    tokens = batch(torch.float32)
    assert_same_bits(tokens, Raft(objective_raft_loss="dft"), Dft())
    assert_same_bits(tokens, Raft(objective_raft_loss="sft"), Sft())


def test_a_kl_coefficient_of_zero_changes_nothing() -> None:
    tokens = batch(torch.float32)
    assert_same_bits(tokens, Asft(objective_kl_coef=0.0), Dft())
    assert_same_bits(tokens, SftKl(objective_kl_coef=0.0), Sft())


def test_sdft_with_teacher_equal_to_policy_has_no_gradient() -> None:
    tokens = batch()
    tokens = replace(tokens, teacher_logprobs=tokens.logprobs.detach().clone())
    sums, grad = loss_and_gradient(tokens, Sdft())
    assert sums.loss_sum == 0 and not grad.any()


def test_the_mean_gradient_of_sdft_over_the_policys_tokens_is_that_of_the_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, teacher = (torch.randn(6, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    logits.requires_grad_()
    policy, teacher = logits.log_softmax(0), teacher.log_softmax(0)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - teacher)).sum(), logits, retain_graph=True)
    # Each token of the vocabulary is a sequence of its own, weighted by its probability of being sampled.
    tokens = PackedTokens(
        logprobs=policy,
        loss_mask=torch.ones(6),
        segment_ids=torch.arange(6),
        num_segments=6,
        weights=policy.detach().exp(),
        teacher_logprobs=teacher,
    )
    (found,) = torch.autograd.grad(token_loss_sums(tokens, Sdft()).loss_sum, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_profit_with_threshold_zero_is_sft() -> None:
    assert_same_bits(batch(torch.float32), Profit(objective_profit_threshold=0.0), Sft())


# each objective against a formula written token by token

Formula = Callable[[float, float, float, float, float, float], tuple[float, float]]
"""(l, r, old, A, mean l, mean r) -> loss and d loss / d l of one token, without the KL term. For sdft, old is under the teacher."""


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def weighted(weight: Callable[..., float]) -> Formula:
    def formula(*args: float) -> tuple[float, float]:
        return weight(*args) * -args[0], -weight(*args)

    return formula


def surrogate(
    low: float, high: float, beta: float = 0.0, most: float = math.inf, kl_cap: float = math.inf
) -> Formula:
    def formula(lp: float, r: float, old: float, a: float, lm: float, rm: float) -> tuple[float, float]:
        q = math.exp(lp - old)
        acts = clip(q, low, high) * a < q * a or (a < 0 and q > most)
        kl, kl_grad = math.exp(r - lp) - (r - lp) - 1, 1 - math.exp(r - lp)
        if kl > kl_cap:
            kl, kl_grad = kl_cap, 0.0
        value = min(q * a, clip(q, low, high) * a)
        # As in verl: the loss of a negative advantage is at most -most * a.
        loss = min(-value, -most * a) if a < 0 else -value
        return loss + beta * kl, (0.0 if acts else -q * a) + beta * kl_grad

    return formula


def squared(lp: float, r: float, teacher: float, a: float, lm: float, rm: float) -> tuple[float, float]:
    return a * (lp - teacher) ** 2 / 2, a * (lp - teacher)


P = math.exp
FORMULAS: dict[str, tuple[dict[str, Any], Formula]] = {
    "rasft": ({}, weighted(lambda lp, r, o, a, lm, rm: clip(P(rm - lm), 0.4, 1.2) * a * P(lp))),
    "rasft token": (
        {"objective_ratio": "token"},
        weighted(lambda lp, r, o, a, lm, rm: clip(P(r - lp), 0.4, 1.2) * a * P(lp)),
    ),
    "rasft inverted": (
        {
            "objective_ratio_direction": "policy_over_ref",
            "objective_ratio_power": 1.5,
            "objective_dft_factor": False,
        },
        weighted(lambda lp, r, o, a, lm, rm: clip(P(1.5 * (lm - rm)), 0.4, 1.2) * a),
    ),
    "sft": ({}, weighted(lambda lp, r, o, a, lm, rm: a)),
    "sft_kl": ({}, weighted(lambda lp, r, o, a, lm, rm: a)),
    "dft": ({}, weighted(lambda lp, r, o, a, lm, rm: a * P(lp))),
    "asft": ({}, weighted(lambda lp, r, o, a, lm, rm: a * P(lp))),
    "profit": (
        {"objective_profit_threshold": 0.2},
        weighted(lambda lp, r, o, a, lm, rm: a if P(lp) > 0.2 else 0.0),
    ),
    "iw_sft": ({}, weighted(lambda lp, r, o, a, lm, rm: clip(P(2 * (lm - rm)), 0, 16) * a)),
    "iw_sft token": (
        {"objective_iw_level": "token"},
        weighted(lambda lp, r, o, a, lm, rm: clip(P(lp - r), 0.2, 1.8) * a),
    ),
    "psft": ({}, surrogate(0.8, 1.28)),
    "gft": (
        {"objective_gft_threshold": 0.3},
        weighted(lambda lp, r, o, a, lm, rm: a * (1.0 if P(lp) > 0.3 else P(lp))),
    ),
    "raft": ({}, weighted(lambda lp, r, o, a, lm, rm: a * P(lp))),
    "raft sft": ({"objective_raft_loss": "sft"}, weighted(lambda lp, r, o, a, lm, rm: a)),
    "grpo": ({}, surrogate(0.8, 1.2, beta=0.001)),
    "grpo beta": ({"objective_grpo_beta": 0.3}, surrogate(0.8, 1.2, beta=0.3)),
    "grpo dapo": ({"objective_grpo_dapo": True}, surrogate(0.8, 1.28)),
    "grpo limited": (
        {"objective_grpo_dual_clip": 1.1, "objective_grpo_beta": 0.3, "objective_grpo_kl_cap": 0.5},
        surrogate(0.8, 1.2, beta=0.3, most=1.1, kl_cap=0.5),
    ),
    "sdft": ({}, squared),
}
KL_COEF = {"sft_kl": 0.1, "asft": 0.05}


def objective_of(case: str) -> Objective:
    return OBJECTIVES[case.split()[0]](**FORMULAS[case][0])


def test_every_objective_has_a_formula() -> None:
    assert {case.split()[0] for case in FORMULAS} == set(OBJECTIVES)


@pytest.mark.parametrize("weights", [WEIGHTS, (1.2, -0.7, -1.1, 0.4)])
@pytest.mark.parametrize("case", FORMULAS)
def test_loss_and_gradient_equal_the_formula(case: str, weights: tuple[float, ...]) -> None:
    tokens, objective, formula = batch(weights=weights), objective_of(case), FORMULAS[case][1]
    assert tokens.ref_logprobs is not None and tokens.old_logprobs is not None and tokens.kl is not None
    means = []
    for i in range(tokens.num_segments):
        mine = tokens.loss_mask & (tokens.segment_ids == i)
        means.append((tokens.logprobs[mine].mean().item(), tokens.ref_logprobs[mine].mean().item()))
    old = tokens.teacher_logprobs if objective.teacher() else tokens.old_logprobs
    assert old is not None
    total, expected_grad, coef = 0.0, torch.zeros_like(tokens.logprobs), KL_COEF.get(objective.name, 0.0)
    for t in tokens.loss_mask.nonzero().flatten().tolist():
        i = int(tokens.segment_ids[t])
        given = (tokens.logprobs[t].item(), tokens.ref_logprobs[t].item(), old[t].item())
        loss, expected_grad[t] = formula(*given, weights[i], *means[i])
        total += loss + coef * weights[i] * tokens.kl[t].item()

    sums, grad = loss_and_gradient(tokens, objective)
    assert sums.loss_sum.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)
    num_counted = sum(LENGTHS)
    if objective.name == "profit":
        num_counted = int((tokens.logprobs.exp() > 0.2).sum())
        assert 0 < num_counted < sum(LENGTHS)
    assert sums.denominator.item() == num_counted
    assert sums.denominator.dtype == torch.int64
    if coef:
        (kl_grad,) = torch.autograd.grad(sums.loss_sum, tokens.kl)
        mask = tokens.loss_mask.double()
        expected_kl_grad = coef * mask * tokens.weights[tokens.segment_ids]
        torch.testing.assert_close(kl_grad, expected_kl_grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "case", ["sft", "sft_kl", "profit", "psft", "grpo", "grpo beta", "grpo dapo", "sdft"]
)
def test_objectives_without_detached_parts_pass_gradcheck(case: str) -> None:
    tokens = batch(weights=(1.2, -0.7, -1.1, 0.4))
    mask, objective = tokens.loss_mask, objective_of(case)

    def loss(logprobs: Tensor, kl: Tensor) -> Tensor:
        return token_loss_sums(replace(tokens, logprobs=logprobs, kl=kl), objective).loss_sum

    assert tokens.kl is not None
    logprobs = torch.where(mask, tokens.logprobs, -1.0).detach().requires_grad_()
    kl = torch.where(mask, tokens.kl, 0.1).detach().requires_grad_(objective.needs_reference_distribution())
    assert torch.autograd.gradcheck(loss, (logprobs, kl))


# splitting, order, masks


def select(
    tokens: PackedTokens, index: Tensor, leaf: Tensor, sequences: list[int] | None = None
) -> PackedTokens:
    """The tokens of ``index``, with log-probabilities from ``leaf`` and renumbered sequences."""
    sequences = list(range(tokens.num_segments)) if sequences is None else sequences
    number = torch.zeros(tokens.num_segments, dtype=torch.int64)
    number[sequences] = torch.arange(len(sequences))

    def at(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach()[index]

    return PackedTokens(
        logprobs=leaf[index],
        loss_mask=tokens.loss_mask[index],
        segment_ids=number[tokens.segment_ids[index]],
        num_segments=len(sequences),
        weights=tokens.weights[sequences],
        ref_logprobs=at(tokens.ref_logprobs),
        old_logprobs=at(tokens.old_logprobs),
        teacher_logprobs=at(tokens.teacher_logprobs),
        kl=at(tokens.kl),
        cp_group=tokens.cp_group,
    )


@pytest.mark.parametrize("case", FORMULAS)
def test_splitting_into_micro_batches_changes_nothing(case: str) -> None:
    tokens, objective = batch(torch.float32), objective_of(case)
    whole, grad = loss_and_gradient(tokens, objective)
    leaf = tokens.logprobs.detach().clone().requires_grad_()
    parts = []
    for sequences in ([2, 0], [3], [1]):
        index = torch.cat([(tokens.segment_ids == i).nonzero().flatten() for i in sequences])
        parts.append(token_loss_sums(select(tokens, index, leaf, sequences), objective))
    sum(part.loss_sum for part in parts).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None

    assert torch.equal(leaf.grad, grad)
    total = torch.stack([part.loss_sum.detach() for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss_sum.detach(), rtol=1e-6, atol=1e-6)
    assert sum(int(part.denominator) for part in parts) == whole.denominator
    for name, metric in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), metric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FORMULAS)
def test_order_of_the_packed_tokens_changes_nothing(case: str) -> None:
    tokens, objective = batch(torch.float32), objective_of(case)
    whole, grad = loss_and_gradient(tokens, objective)
    leaf = tokens.logprobs.detach().clone().requires_grad_()
    order = torch.randperm(leaf.numel(), generator=torch.Generator().manual_seed(3))
    sums = token_loss_sums(select(tokens, order, leaf, [3, 1, 0, 2]), objective)
    sums.loss_sum.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, grad)
    torch.testing.assert_close(sums.loss_sum, whole.loss_sum, rtol=1e-6, atol=1e-6)
    assert sums.denominator == whole.denominator


@pytest.mark.parametrize("case", FORMULAS)
def test_micro_batch_without_response_tokens_adds_zero(case: str) -> None:
    tokens = batch(torch.float32)
    sums, grad = loss_and_gradient(
        replace(tokens, loss_mask=torch.zeros_like(tokens.loss_mask)), objective_of(case)
    )
    assert sums.loss_sum == 0 and sums.denominator == 0
    assert (grad == 0).all()
    for metric in sums.metrics.values():
        assert metric.tolist() == [0, 0]


@pytest.mark.parametrize("case", FORMULAS)
def test_sequences_that_are_not_counted_keep_their_loss_and_leave_the_denominator(case: str) -> None:
    tokens, objective = batch(), objective_of(case)
    whole, grad = loss_and_gradient(tokens, objective)
    are_counted = torch.tensor([True, False, False, True])
    some, same_grad = loss_and_gradient(replace(tokens, are_counted=are_counted), objective)
    assert torch.equal(some.loss_sum, whole.loss_sum) and torch.equal(same_grad, grad)
    alone = [
        token_loss_sums(
            replace(tokens, loss_mask=tokens.loss_mask & (tokens.segment_ids == i)), objective
        ).denominator
        for i in (0, 3)
    ]
    assert some.denominator == sum(alone) < whole.denominator


def test_token_certain_or_hopeless_stays_finite() -> None:
    tokens = batch(torch.float32)
    extreme = torch.linspace(-200.0, 0.0, tokens.logprobs.numel())
    for case in FORMULAS:
        for logprobs, ref in ((extreme, extreme.flip(0)), (extreme.flip(0), extreme)):
            given = replace(
                tokens, logprobs=logprobs.clone().requires_grad_(), ref_logprobs=ref, old_logprobs=ref
            )
            sums, grad = loss_and_gradient(given, objective_of(case))
            assert sums.loss_sum.isfinite() and grad.isfinite().all(), case


def test_missing_input_is_named() -> None:
    tokens = replace(batch(), ref_logprobs=None, old_logprobs=None, teacher_logprobs=None, kl=None)
    inputs = {"rasft": "ref_logprobs", "psft": "old_logprobs", "asft": "kl", "sdft": "teacher_logprobs"}
    for case, name in inputs.items():
        with pytest.raises(AssertionError, match=f"needs {name}"):
            token_loss_sums(tokens, objective_of(case))
    for case in ("sft", "dft", "profit", "gft", "raft"):
        token_loss_sums(tokens, objective_of(case))


def test_metrics_are_sums_and_counts() -> None:
    tokens = batch()
    mask = tokens.loss_mask
    logprobs = tokens.logprobs.detach()[mask]
    metrics = token_loss_sums(tokens, objective_of("rasft")).metrics
    assert all(metric.shape == (2,) and metric.dtype == torch.float32 for metric in metrics.values())
    assert mean(metrics["ce_nats"]) == pytest.approx(-logprobs.mean().item(), rel=1e-6)
    assert mean(metrics["p_mean"]) == pytest.approx(logprobs.exp().mean().item(), rel=1e-6)
    assert metrics["ratio_mean"][1] == len(LENGTHS)
    names = {case: set(token_loss_sums(tokens, objective_of(case)).metrics) for case in FORMULAS}
    assert "ratio_clip_frac" in names["iw_sft"]
    assert "kept_frac" in names["profit"]
    assert {"clip_frac", "kl_nats"} <= names["grpo"]
    assert "kl_nats" in names["sft_kl"] & names["asft"]


def test_each_objective_has_these_metrics() -> None:
    every, weighted_ce = {"ce_nats", "p_mean"}, {"ce_nats", "p_mean", "weight_mean"}
    ratio = weighted_ce | {"ref_logprob_gap_nats", "ratio_mean", "ratio_clip_frac"}
    surrogates = every | {"policy_ratio_mean", "clip_frac"}
    expected = {
        "rasft": ratio,
        "iw_sft": ratio,
        "sft": weighted_ce,
        "dft": weighted_ce,
        "raft": weighted_ce,
        "sft_kl": weighted_ce | {"kl_nats"},
        "asft": weighted_ce | {"kl_nats"},
        "profit": weighted_ce | {"kept_frac"},
        "gft": weighted_ce | {"full_gradient_frac"},
        "psft": surrogates,
        "grpo": surrogates | {"kl_nats", "ref_logprob_gap_nats"},
        "grpo dapo": surrogates,
        "grpo limited": surrogates | {"kl_nats", "ref_logprob_gap_nats", "dual_clip_frac"},
        "sdft": every | {"teacher_kl_nats"},
    }
    for case, names in expected.items():
        assert set(token_loss_sums(batch(), objective_of(case)).metrics) == names, case


def test_metrics_equal_the_formulas() -> None:
    tokens = batch()
    mask = tokens.loss_mask
    assert tokens.ref_logprobs is not None and tokens.old_logprobs is not None and tokens.kl is not None
    assert tokens.teacher_logprobs is not None
    logprobs, ref, old, teacher = (
        v.detach()[mask]
        for v in (tokens.logprobs, tokens.ref_logprobs, tokens.old_logprobs, tokens.teacher_logprobs)
    )
    expected = {
        ("sft", "weight_mean"): tokens.weights[tokens.segment_ids][mask],
        ("sft_kl", "kl_nats"): tokens.kl.detach()[mask],
        ("profit", "kept_frac"): (logprobs.exp() > 0.2).double(),
        ("gft", "full_gradient_frac"): (logprobs.exp() > 0.3).double(),
        ("psft", "policy_ratio_mean"): (logprobs - old).exp(),
        ("grpo", "kl_nats"): (ref - logprobs).exp() - (ref - logprobs) - 1,
        ("rasft", "ref_logprob_gap_nats"): logprobs - ref,
        ("rasft token", "ratio_mean"): (ref - logprobs).exp().clamp(0.4, 1.2),
        ("sdft", "teacher_kl_nats"): logprobs - teacher,
    }
    for (case, name), values in expected.items():
        total, count = token_loss_sums(tokens, objective_of(case)).metrics[name].tolist()
        assert (total, count) == (pytest.approx(values.sum().item(), rel=1e-5), mask.sum()), (case, name)


def test_a_token_at_the_threshold_is_not_above_it() -> None:
    tokens = batch()
    tokens = replace(tokens, logprobs=torch.full_like(tokens.logprobs, math.log(0.5)).requires_grad_())
    assert math.exp(math.log(0.5)) == 0.5
    for objective, name in (
        (Profit(objective_profit_threshold=0.5), "kept_frac"),
        (Gft(objective_gft_threshold=0.5), "full_gradient_frac"),
    ):
        assert token_loss_sums(tokens, objective).metrics[name].tolist() == [0, sum(LENGTHS)]


# context parallelism


def context_parallel_results(rank: int, group: Any) -> dict[str, tuple]:
    results = {}
    for case in FORMULAS:
        tokens = batch(torch.float32)
        leaf = tokens.logprobs.detach().clone().requires_grad_()
        # The second sequence has a single token, so only one rank has a part of it.
        index = torch.arange(rank, leaf.numel(), 2)
        mine = replace(select(tokens, index, leaf), cp_group=group)
        sums = token_loss_sums(mine, objective_of(case))
        sums.loss_sum.backward()
        results[case] = (sums.loss_sum.detach(), sums.denominator, leaf.grad, sums.metrics)
    return results


def context_parallel_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(context_parallel_results(rank, dist.group.WORLD), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks_are", ["threads", "processes"])
def test_context_parallel_ranks_add_up_to_one_process(ranks_are: str, tmp_path: Path) -> None:
    if ranks_are == "threads":
        ranks = on_threads(context_parallel_results, 2)
    else:
        call_on_ranks(context_parallel_worker, tmp_path, 2)
        ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for case in FORMULAS:
        whole, grad = loss_and_gradient(batch(torch.float32), objective_of(case))
        (loss_0, count_0, grad_0, metrics_0), (loss_1, count_1, grad_1, metrics_1) = (r[case] for r in ranks)
        torch.testing.assert_close(loss_0 + loss_1, whole.loss_sum.detach(), rtol=1e-6, atol=1e-6)
        assert count_0 + count_1 == whole.denominator
        torch.testing.assert_close(grad_0 + grad_1, grad, rtol=1e-6, atol=0)
        for name, metric in whole.metrics.items():
            torch.testing.assert_close(metrics_0[name] + metrics_1[name], metric, rtol=1e-5, atol=1e-5)


# the log-ratio limit, the clipping statistics and one-token responses


def test_log_ratios_are_limited_to_20() -> None:
    """With a negative advantage the loss uses the unclipped ratio, so the limit changes the loss."""
    tokens = one_token_each(
        logprobs=[-1.0, -60.0], old=[-60.0, -1.0], ref=[-60.0, -1.0], weights=[-1.0, -1.0]
    )
    sums = token_loss_sums(tokens, Psft(objective_psft_clip_low=0.0))
    assert sums.loss_sum.item() == pytest.approx(math.exp(20) + math.exp(-20), rel=1e-12)
    wide = Rasft(objective_ratio_clip_low=0.0, objective_ratio_clip_high=1e30, objective_dft_factor=False)
    for level in ("sequence", "token"):
        ratio, _ = tokens.masked().reference_ratio(replace(wide, objective_ratio=level).ratio_rule())
        assert ratio.tolist() == pytest.approx([math.exp(-20), math.exp(20)], rel=1e-12)
    kl = (
        Grpo(objective_grpo_beta=1.0).token_terms(tokens).loss
        - Grpo(objective_grpo_beta=0.0).token_terms(tokens).loss
    )
    assert kl.tolist() == pytest.approx([math.exp(-20) + 20 - 1, math.exp(20) - 20 - 1], rel=1e-9)


def test_clip_frac_counts_the_tokens_whose_gradient_is_cut() -> None:
    """The ratios are 2, 2, 0.5, 0.5 and 1. Only 2 with A > 0 and 0.5 with A < 0 are clipped."""
    ratios, weights = [2.0, 2.0, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    logprobs = [math.log(q) - 1.0 for q in ratios]
    tokens = one_token_each(logprobs=logprobs, old=[-1.0] * 5, ref=[-1.0] * 5, weights=weights)
    for objective in (Psft(), Grpo(objective_grpo_beta=0.0)):
        sums, grad = loss_and_gradient(tokens, objective)
        assert sums.metrics["clip_frac"].tolist() == [2, 5]
        assert sums.metrics["policy_ratio_mean"].tolist() == pytest.approx([6, 5])
        assert (grad == 0).tolist() == [True, False, False, True, False]


def test_ratio_clip_frac_counts_the_clipped_ratios() -> None:
    ratios = (0.3, 0.5, 1.1, 2.0, 1.0)
    ref = [-1.0 + math.log(q) for q in ratios]
    tokens = one_token_each(logprobs=[-1.0] * 5, old=[-1.0] * 5, ref=ref, weights=[1.0] * 5)
    for level in ("sequence", "token"):
        metrics = token_loss_sums(tokens, Rasft(objective_ratio=level)).metrics
        assert metrics["ratio_clip_frac"].tolist() == [2, 5]
        assert mean(metrics["ratio_mean"]) == pytest.approx((0.4 + 0.5 + 1.1 + 1.2 + 1.0) / 5)


def test_the_mean_over_a_one_token_response_is_that_token() -> None:
    tokens = one_token_each(logprobs=[-1.0, -0.5], old=[-1.0, -0.5], ref=[-1.2, -0.4], weights=[1.0, 1.0])
    sequence, token = (Rasft(objective_ratio=level) for level in ("sequence", "token"))
    assert_same_bits(tokens, sequence, token)
    _, grad = loss_and_gradient(tokens, sequence)
    assert (-grad).tolist() == pytest.approx([math.exp(-0.2 - 1.0), math.exp(0.1 - 0.5)], rel=1e-12)


def one_token_each(
    *, logprobs: list[float], old: list[float], ref: list[float], weights: list[float]
) -> PackedTokens:
    """Sequences with a single response token."""

    def row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    num = len(logprobs)
    return PackedTokens(
        logprobs=row(logprobs).requires_grad_(),
        loss_mask=torch.ones(num).bool(),
        segment_ids=torch.arange(num),
        num_segments=num,
        weights=row(weights),
        ref_logprobs=row(ref),
        old_logprobs=row(old),
    )


# the declarations


@pytest.mark.parametrize(
    ("objective", "flag"),
    [
        (lambda: Rasft(objective_ratio_clip_low=1.3), "--objective-ratio-clip-low"),
        (lambda: IwSft(objective_iw_clip_low=17.0), "--objective-iw-clip-low"),
        (lambda: IwSft(objective_iw_level="token", objective_iw_clip_low=1.9), "--objective-iw-clip-low"),
    ],
)
def test_a_lower_clip_above_the_upper_clip_is_refused(objective: Callable[[], Objective], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        objective()


def test_with_equal_clips_every_ratio_is_the_clip() -> None:
    cases: list[tuple[Objective, Objective, float]] = [
        (Rasft(objective_ratio_clip_low=1.2, objective_ratio_clip_high=1.2), Dft(), 1.2),
        (IwSft(objective_iw_clip_low=1.5, objective_iw_clip_high=1.5), Sft(), 1.5),
        (IwSft(objective_iw_level="token", objective_iw_clip_low=1.8), Sft(), 1.8),
    ]
    for weighted_by_ratio, plain, clip_at in cases:
        _, grad = loss_and_gradient(batch(), weighted_by_ratio)
        torch.testing.assert_close(grad, clip_at * loss_and_gradient(batch(), plain)[1])


def test_objectives_declare_what_they_need() -> None:
    def needs(objective: Objective) -> str:
        answers = {
            "r": objective.needs_reference_logprobs(),
            "o": objective.needs_old_logprobs(),
            "d": objective.needs_reference_distribution(),
            "f": objective.needs_reference(),
            "s": objective.uses_rollouts(),
            "t": objective.teacher() is not None,
            "v": objective.needs_verdicts and objective.uses_rollouts(),
        }
        return "".join(letter for letter, answer in answers.items() if answer)

    table = {
        "rasft": "rfsv",
        "iw_sft": "rf",
        "sft_kl": "df",
        "asft": "df",
        "psft": "o",
        "gft": "sv",
        "raft": "sv",
    }
    table |= {"sft": "", "dft": "", "profit": "", "grpo": "rofsv", "sdft": "fst"}
    assert {name: needs(kind()) for name, kind in OBJECTIVES.items()} == table
    assert needs(Rasft(objective_ratio="off")) == "sv"
    assert needs(Grpo(objective_grpo_dapo=True)) == "osv"
    assert needs(Sdft(objective_sdft_teacher="refresh")) == "st"
    assert Asft().kl_term() == (0.05, "reverse")
    assert SftKl(objective_kl_direction="reverse").kl_term() == (0.1, "reverse")
