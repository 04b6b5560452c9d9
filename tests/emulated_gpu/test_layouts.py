"""Every layout, model family and flag on the GPU path gives the losses of one process on the CPU path.

A case may combine a layout, a model and an objective, because a fault in any of them changes the losses.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.emulated_gpu.conftest import DEMONSTRATIONS_ONLY, STEPS, Bench, assert_gpu_path
from tests.functional import launching

PACKED = {"gemm", "rmsnorm_fwd", "rmsnorm_bwd", "rope_thd", "attention_thd", "adam"}
PADDED = {"gemm", "rmsnorm_fwd", "rmsnorm_bwd", "rope_sbhd", "attention_sbhd", "adam"}

BF16_GAP = 2e-3
"""Absolute and relative tolerance of losses in BF16: both paths round to 8 bits, but at different places."""


@dataclass(frozen=True, kw_only=True)
class Case:
    flags: str
    model: str = "policy"
    ranks: int = 1
    objective: str = ""
    """Flags that change the loss, and are therefore passed to the run on the CPU too."""
    kernels: set[str] = field(default_factory=lambda: PACKED)
    own: frozenset[str] = frozenset()
    """Classes of this project in the layers, for parts that Megatron lacks."""


CASES = {
    "packed": Case(flags=""),
    "asft_padded": Case(flags="--rasft-batch-layout padded", objective="--objective asft", kernels=PADDED),
    "qwen2_recompute_full": Case(
        flags="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        model="qwen2_tied",
    ),
    "qwen3_recompute_selective": Case(
        flags="--recompute-granularity selective --recompute-modules core_attn mlp", model="qwen3"
    ),
    "overlap": Case(flags="--overlap-grad-reduce --overlap-param-gather", ranks=2),
    "tp2_sp": Case(flags="--tensor-model-parallel-size 2 --sequence-parallel", ranks=2),
    "tp2_sp_padded": Case(
        flags="--tensor-model-parallel-size 2 --sequence-parallel --rasft-batch-layout padded",
        ranks=2,
        kernels=PADDED,
    ),
    "pp2": Case(flags="--pipeline-model-parallel-size 2", ranks=2),
    "pp2_interleaved": Case(
        flags="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", ranks=2
    ),
    "cp2_padded": Case(
        flags="--context-parallel-size 2 --rasft-batch-layout padded", ranks=2, kernels=PADDED
    ),
    "cp2": Case(flags="--context-parallel-size 2", ranks=2),
    "ep2": Case(
        flags="--expert-model-parallel-size 2", objective="--objective iw_sft", model="mixtral", ranks=2
    ),
    "cp2_windows": Case(  # half of the layers have a window
        flags="--context-parallel-size 2 --cp-comm-type a2a --rasft-batch-layout padded",
        model="qwen3_tied",
        ranks=2,
        kernels=PADDED,
    ),
    "gemma3": Case(
        flags="--tensor-model-parallel-size 2 --sequence-parallel",
        model="gemma3",
        ranks=2,
        own=frozenset({"RMSNorm", "NormedLinear"}),
    ),
    "mixture": Case(flags="", model="qwen3_moe"),
    "sft_kl_tp2": Case(flags="--tensor-model-parallel-size 2", objective="--objective sft_kl", ranks=2),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_those_of_the_cpu_path(bench: Bench, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    computed = ["--bf16", *case.objective.split()]
    flags = bench.flags(case.model, *DEMONSTRATIONS_ONLY, *computed, *case.flags.split())
    assert_gpu_path(bench.train(tmp_path / "save", flags, case.ranks), kernels=case.kernels, own=case.own)
    losses = launching.losses(tmp_path / "save")
    assert len(losses) == STEPS
    assert losses == pytest.approx(bench.losses_on_cpu(case.model, *computed), rel=BF16_GAP, abs=BF16_GAP)
