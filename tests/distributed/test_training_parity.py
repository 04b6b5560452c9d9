"""Every division of a batch gives the same loss, gradients and weights. On one process these equal transformers' in fp64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_rasft.types import TrainingSample
from tests.distributed.parity_cases import (
    BETAS,
    CLIP,
    EPSILON,
    LAYOUTS,
    LEARNING_RATE,
    MODELS,
    WEIGHT_DECAY,
    Case,
    batches,
    cases,
)
from tests.distributed.ranks_harness import run_ranks
from tests.tiny_models import hf_model, write_folder

WEIGHT_TOLERANCE = 1e-6
"""Absolute tolerance of weights. They reach 1, where fp32 has steps of 1e-7, and training moves them by 1e-2."""

LOSS_TOLERANCE = 1e-5
"""Relative tolerance of losses and gradient norms."""

KL_COEF = 0.1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    for name in MODELS.values():
        write_folder(name, path / name)
    return path


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, dict[str, Any]]:
    """Case -> losses, gradient norms, metrics and weights, for all world sizes."""
    worker = Path(__file__).with_name("parity_worker.py")
    found: dict[str, dict[str, Any]] = {}
    for world_size in LAYOUTS:
        run_ranks(worker, world_size, root)
        found |= torch.load(root / f"results{world_size}.pt")
    return found


ALL_CASES = [case for world_size in LAYOUTS for case in cases(world_size)]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.key)
def test_every_layout_trains_the_same(results: dict[str, dict[str, Any]], case: Case) -> None:
    expected = results[Case(1, "packed", case.objective, case.model).key]
    found = results[case.key]
    assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=LOSS_TOLERANCE)
    for step, metrics in enumerate(found["metrics"]):
        assert metrics == pytest.approx(expected["metrics"][step], rel=1e-4, abs=1e-6)
    assert_same_weights(found["weights"], expected["weights"])
    for mine, theirs in zip(found["scores"], expected["scores"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("case", [c for c in cases(1) if c.layout == "packed"], ids=lambda case: case.key)
def test_one_process_trains_like_transformers_and_torch(
    results: dict[str, dict[str, Any]], case: Case
) -> None:
    found = results[case.key]
    losses, norms, weights = independent_training(case.objective, MODELS[case.model])
    assert min(norms) > CLIP[case.objective], "gradients must be clipped in every step"
    assert found["loss"] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert found["grad_norm"] == pytest.approx(norms, rel=LOSS_TOLERANCE)
    initial = hf_model(MODELS[case.model]).state_dict()
    moved = [max(float((now[n] - initial[n]).abs().max()) for n in now) for now in weights]
    assert min(moved) > 4000 * WEIGHT_TOLERANCE, (
        f"weights moved by {moved}, too little to detect wrong gradients"
    )
    assert_same_weights(found["weights"], weights)


def assert_same_weights(
    found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]
) -> None:
    """Compares the weights after each step. ``expected`` may contain tied tensors under both names."""
    assert len(found) == len(expected)
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() <= theirs.keys()
        assert theirs.keys() - mine.keys() <= {"lm_head.weight"}
        gaps = {name: float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine}
        worst = max(gaps, key=lambda name: gaps[name])
        assert gaps[worst] <= WEIGHT_TOLERANCE, f"exported weights {step}: {worst} differs by {gaps[worst]}"


def independent_training(
    objective: str, name: str
) -> tuple[list[float], list[float], list[dict[str, torch.Tensor]]]:
    """Trains transformers' model in fp64 with torch's AdamW. Returns losses, gradient norms and weights."""
    model, reference = hf_model(name).double(), hf_model(name).double()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON[objective],
    )
    losses, norms, weights, shares = [], [], [], []
    for batch in batches(objective):
        optimizer.zero_grad()
        total = sum(len(s.response_ids) for s in batch if s.is_counted)
        computed = [s for s in batch if s.is_computed]
        if objective == "rasft":  # --weighting-lr-by-mass
            shares.append(min(1.0, sum(abs(s.weight) * len(s.response_ids) for s in computed) / total))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * shares[-1]
        loss = (
            sum((sequence_loss(objective, model, reference, s) for s in computed), torch.tensor(0.0)) / total
        )
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP[objective])))
        optimizer.step()
        weights.append({n: t.detach().clone() for n, t in model.state_dict().items()})
    assert not shares or min(shares) < 1 == max(shares), "steps with a share of the rate, and steps without"
    return losses, norms, [weights[0], weights[-1]]


def sequence_loss(
    objective: str,
    model: transformers.PreTrainedModel,
    reference: transformers.PreTrainedModel,
    sample: TrainingSample,
) -> torch.Tensor:
    """The sum of the token losses of one sample, computed by the formulas of method.md."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    start = len(sample.prompt_ids)
    full = torch.log_softmax(model(ids).logits[0, start - 1 : -1], -1)
    logprobs = full[torch.arange(len(sample.response_ids)), ids[0, start:]]
    if objective == "sft_kl":
        with torch.no_grad():
            ref = torch.log_softmax(reference(ids).logits[0, start - 1 : -1], -1)
        return sample.weight * (-logprobs.sum() + KL_COEF * (ref.exp() * (ref - full)).sum())
    if objective == "sdft":
        gap = torch.tensor(sample.teacher_logprobs, dtype=torch.float64) - logprobs.detach()
        # The gap is detached, so the gradient is the gap times the gradient of log p. The value is half of the squared gap.
        return sample.weight * (-(gap * logprobs) + (gap * (gap / 2 + logprobs)).detach()).sum()
    weight = sample.weight * logprobs.detach().exp()
    if objective == "rasft":
        assert sample.ref_logprobs is not None
        gap = sum(sample.ref_logprobs) / len(logprobs) - float(logprobs.detach().mean())
        weight = weight * min(1.2, max(0.4, math.exp(gap)))
    return -(weight * logprobs).sum()
