"""Whole runs on the GPU path: refreshes with the reference in place, sampling, saves, resumes and exports."""

from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from tests.emulated_gpu.conftest import Bench, assert_gpu_path
from tests.functional import launching

STEPS = 4
"""Refreshes come before steps 1 and 3. The second scores with the reference swapped in: the weights have moved by then."""

KERNELS = {"gemm", "rmsnorm_fwd", "rmsnorm_bwd", "rope_thd", "attention_thd", "adam"}
LAYOUTS = {
    "one_gpu": ("", 1),
    "tp2_sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pp2_overlap": ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_is_the_unbroken_one(bench: Bench, tmp_path: Path, layout: str) -> None:
    """Bit for bit: the emulated kernels are deterministic, as those of a GPU are not by default."""
    words, ranks = LAYOUTS[layout]
    flags = bench.flags("policy", "--bf16", *words.split())
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = ["--train-iters", str(STEPS), "--export-hf"]
    assert_gpu_path(bench.train(unbroken, [*flags, *whole, str(tmp_path / "hf")], ranks), kernels=KERNELS)
    # Decay of the learning rate is constant, so the shorter run's first steps are those of the longer one.
    bench.train(broken, [*flags, "--train-iters", "3"], ranks)
    bench.train(
        broken, [*flags, "--override-opt_param-scheduler", *whole, str(tmp_path / "hf-resumed")], ranks
    )
    assert len(launching.losses(unbroken)) == STEPS
    assert launching.steps(broken) == launching.steps(unbroken)
    assert (broken / "rollouts.jsonl").read_bytes() == (unbroken / "rollouts.jsonl").read_bytes()
    exported, resumed = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "hf-resumed"))
    assert exported.keys() == resumed.keys()
    assert all((exported[name] == resumed[name]).all() for name in exported)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_policy_is_its_reference_at_the_first_step(bench: Bench, tmp_path: Path) -> None:
    """With next to no learning rate policy and reference stay one model, through the swap of the second refresh too."""
    flags = bench.flags("policy", "--bf16", "--lr", "1e-12", "--train-iters", str(STEPS))
    bench.train(tmp_path / "save", flags)
    ratios = [step["objective/ratio_mean"] for step in launching.steps(tmp_path / "save").values()]
    assert ratios == pytest.approx([1.0] * STEPS, abs=1e-3)
