"""Complete runs on the GPU path: refreshes with reference scores, sampling, saving, resuming and exporting."""

from pathlib import Path
from signal import SIGTERM

import pytest
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.emulated_gpu.conftest import Bench, assert_gpu_path
from tests.functional import launching
from tests.functional.launching import Interruption

STEPS = 4
"""Refreshes come before steps 1 and 3. The second one swaps the reference's weights in, because the policy has changed."""

KERNELS = {"gemm", "rmsnorm_fwd", "rmsnorm_bwd", "rope_thd", "attention_thd", "adam"}
LAYOUTS = {
    "tp2_sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pp2_interleaved": ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2),
}


def weights(folder: Path) -> dict[str, Tensor]:
    """Reads every tensor of an exported folder, in which each pipeline stage has written a file."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_equals_the_unbroken_one(bench: Bench, tmp_path: Path, layout: str) -> None:
    """The runs are bit-equal, because the emulated kernels are deterministic, unlike those of a GPU by default."""
    words, ranks = LAYOUTS[layout]
    flags = bench.flags("policy", "--bf16", *words.split())
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = ["--train-iters", str(STEPS), "--export-hf"]
    assert_gpu_path(bench.train(unbroken, [*flags, *whole, str(tmp_path / "hf")], ranks), kernels=KERNELS)
    resumed = [*flags, *whole, str(tmp_path / "hf-resumed")]
    bench.train(broken, resumed, ranks, interruption=Interruption(step=3, number=SIGTERM))
    assert len(launching.losses(broken)) == 3
    bench.train(broken, resumed, ranks)
    assert len(launching.losses(unbroken)) == STEPS
    assert launching.steps(broken) == launching.steps(unbroken)
    assert (broken / "rollouts.jsonl").read_bytes() == (unbroken / "rollouts.jsonl").read_bytes()
    exported, again = weights(tmp_path / "hf"), weights(tmp_path / "hf-resumed")
    assert exported and exported.keys() == again.keys()
    assert all((exported[name] == again[name]).all() for name in exported)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_the_policy_equals_its_reference_without_training(bench: Bench, tmp_path: Path) -> None:
    """With a learning rate of almost 0 policy and reference stay equal, even after the second refresh has swapped weights."""
    flags = bench.flags("policy", "--bf16", "--lr", "1e-12", "--train-iters", str(STEPS))
    bench.train(tmp_path / "save", flags)
    ratios = [step["objective/ratio_mean"] for step in launching.steps(tmp_path / "save").values()]
    assert ratios == pytest.approx([1.0] * STEPS, abs=1e-3)
