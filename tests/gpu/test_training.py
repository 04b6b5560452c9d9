"""Complete runs with Transformer Engine and NCCL: the assertions of tests/functional, with tolerances for BF16 and FP8.

The policy was trained on the CPU in fp32 before, so that all runs start from the same weights.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.functional import launching
from tests.functional.conftest import Workshop, workshop
from tests.tiny_policy import write_mixture

__all__ = ["workshop"]  # a fixture

pytestmark = pytest.mark.gpu

BF16_LOSS_GAP = 0.03
"""Tolerance of losses from 0.1 to 2 after three steps with BF16 weights."""

RATIO_GAP = 1e-3
"""Tolerance of ratios at step 0, when policy and reference have the same weights but different packed batches."""

FP8_RECIPES = ["delayed", "tensorwise", "blockwise"]
"""The recipes that Hopper supports. mxfp8 needs a later GPU."""


def train(
    workshop: Workshop, save: Path, *more: str, num_processes: int = 1, hides_gpu: bool = False
) -> launching.Outcome:
    flags = workshop.flags("--save", str(save), "--train-iters", "3", "--save-interval", "2", *more)
    outcome = launching.torchrun(flags, num_processes, hides_gpu=hides_gpu)
    assert outcome.codes == [0], outcome.output
    assert ("CPU process" if hides_gpu else "GPU process") in outcome.output
    return outcome


@pytest.fixture(scope="module")
def on_cpu(workshop: Workshop) -> list[float]:
    """The losses of the run in fp32 on the CPU."""
    train(workshop, workshop.root / "on_cpu", "--curriculum-mode", "off", hides_gpu=True)
    return launching.losses(workshop.root / "on_cpu")


@pytest.fixture(scope="module")
def in_bf16(workshop: Workshop) -> list[float]:
    """The losses of the same run in BF16 on the GPU, with packed batches."""
    train(workshop, workshop.root / "in_bf16", "--bf16", "--curriculum-mode", "off")
    return launching.losses(workshop.root / "in_bf16")


def test_bf16_trains_as_the_cpu_does(on_cpu: list[float], in_bf16: list[float]) -> None:
    assert in_bf16 == pytest.approx(on_cpu, abs=BF16_LOSS_GAP)


def test_padded_bf16_trains_as_the_cpu_does(workshop: Workshop, on_cpu: list[float], tmp_path: Path) -> None:
    train(workshop, tmp_path, "--bf16", "--curriculum-mode", "off", "--rasft-batch-layout", "padded")
    assert launching.losses(tmp_path) == pytest.approx(on_cpu, abs=BF16_LOSS_GAP)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one rank per GPU: needs two")
@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        ["--pipeline-model-parallel-size", "2"],
        ["--context-parallel-size", "2"],
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    ],
    ids=["tensor", "pipeline", "context", "data"],
)
def test_two_gpus_train_as_the_cpu_does(
    workshop: Workshop, on_cpu: list[float], tmp_path: Path, layout: list[str]
) -> None:
    train(workshop, tmp_path, "--bf16", "--curriculum-mode", "off", *layout, num_processes=2)
    assert launching.losses(tmp_path) == pytest.approx(on_cpu, abs=BF16_LOSS_GAP)


def test_precision_aware_optimizer_trains_and_resumes(
    workshop: Workshop, on_cpu: list[float], tmp_path: Path
) -> None:
    flags = ["--bf16", "--use-distributed-optimizer", "--use-precision-aware-optimizer"]
    flags += ["--curriculum-mode", "off", "--override-opt_param-scheduler"]
    train(workshop, tmp_path, *flags, "--train-iters", "2")
    assert "going on after step 2" in train(workshop, tmp_path, *flags).output
    assert launching.losses(tmp_path) == pytest.approx(on_cpu, abs=BF16_LOSS_GAP)


def test_losses_are_the_same_with_blocking_launches(
    workshop: Workshop, in_bf16: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detects tensors that are read before their kernel has run."""
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    train(workshop, tmp_path, "--bf16", "--curriculum-mode", "off")
    # cuDNN's backward pass sums in varying order, and BF16 weights amplify the differences.
    assert launching.losses(tmp_path) == pytest.approx(in_bf16, abs=5e-3)


def test_mixture_with_grouped_gemm_trains_as_the_cpu_does(workshop: Workshop, tmp_path: Path) -> None:
    flags = [
        "--hf-model",
        str(write_mixture(tmp_path / "mixture", workshop.policy)),
        "--curriculum-mode",
        "off",
    ]
    train(workshop, tmp_path / "cpu", *flags, hides_gpu=True)
    train(workshop, tmp_path / "gpu", *flags, "--bf16", "--moe-grouped-gemm")
    expected = launching.losses(tmp_path / "cpu")
    # The random weights give losses above 3, where BF16 has steps twice as large.
    assert launching.losses(tmp_path / "gpu") == pytest.approx(expected, abs=3 * BF16_LOSS_GAP)


def test_run_with_rollouts_starts_at_ratio_one_and_exports(workshop: Workshop, tmp_path: Path) -> None:
    train(workshop, tmp_path / "save", "--bf16", "--export-hf", str(tmp_path / "hf"))
    first = launching.steps(tmp_path / "save")[1]
    assert first["objective/ratio_mean"] == pytest.approx(1.0, abs=RATIO_GAP)
    assert first["verify/solve_rate"] > 0, "the policy solves some sums on the CPU"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_trains_with_every_recipe(
    workshop: Workshop, on_cpu: list[float], tmp_path: Path, recipe: str
) -> None:
    flags = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe, "--curriculum-mode", "off"]
    train(workshop, tmp_path, *flags)
    assert launching.losses(tmp_path) == pytest.approx(on_cpu, abs=5 * BF16_LOSS_GAP)
    ratio = launching.steps(tmp_path)[1]["objective/ratio_mean"]
    assert ratio == pytest.approx(1.0, abs=0.05), "delayed scales depend on earlier batches"


def test_sampled_logprobs_equal_those_of_training(workshop: Workshop, tmp_path: Path) -> None:
    """In grpo's first step the ratio compares the log-probabilities of sampling with those of the training forward pass."""
    train(workshop, tmp_path, "--bf16", "--objective", "grpo", "--rasft-refresh-interval", "1")
    assert launching.steps(tmp_path)[1]["objective/policy_ratio_mean"] == pytest.approx(1.0, abs=RATIO_GAP)


@pytest.mark.parametrize(("more", "loss_gap"), [([], BF16_LOSS_GAP), (["--deterministic-mode"], 0.0)])
def test_a_resumed_run_equals_the_unbroken_one(
    workshop: Workshop, tmp_path: Path, more: list[str], loss_gap: float
) -> None:
    """A resumed run is bit-equal only with deterministic kernels. By default cuDNN's attention sums gradients in varying order."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(workshop, unbroken, "--bf16", *more)
    flags = ["--bf16", "--override-opt_param-scheduler", *more]
    train(workshop, broken, *flags, "--train-iters", "2")
    assert "going on after step 2" in train(workshop, broken, *flags).output
    assert launching.losses(broken) == pytest.approx(launching.losses(unbroken), abs=loss_gap, rel=0)
    rollouts = [
        [json.loads(line)["response_ids"] for line in (save / "rollouts.jsonl").read_text().splitlines()]
        for save in (unbroken, broken)
    ]
    assert rollouts[0] == rollouts[1], "rollouts are sampled before the first step"
