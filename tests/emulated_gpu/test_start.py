"""Starts programs on emulated GPUs by the commands that a user types."""

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import transformers

from tests.emulated_gpu import running
from tests.emulated_gpu.conftest import DEMONSTRATIONS_ONLY, Bench, assert_gpu_path
from tests.forking import REPOSITORY
from tests.functional import launching
from tests.functional.test_documented_commands import FIRST_RUN, commands
from tools import plan

LAYERS = {"gemm", "rmsnorm_fwd", "rmsnorm_bwd", "rope_thd", "attention_thd", "adam"}
SHORT = "--max-new-tokens 12 --demonstration-tokens 16 --prompt-tokens 8"
SMALL = (
    "--train-iters 1 --seq-length 64 --global-batch-size 8 --rollout-max-new-tokens 12 --verify-num-workers 1"
)


def first_run(bench: Bench, save: Path) -> list[str]:
    """The flags of README's command for one node, with smaller sizes appended, because the last value of a flag counts."""
    line = next(c for c in commands(REPOSITORY / "README.md") if c.startswith(FIRST_RUN))
    names = {"DIR": str(bench.model("policy")), "train.jsonl": str(bench.data)}
    flags = [names.get(word, word) for word in shlex.split(line)[4:]]
    return [
        *flags,
        *SMALL.split(),
        "--data-prompt-suffix",
        "",
        "--save",
        f"{save}/save",
        "--export-hf",
        f"{save}/hf",
    ]


def test_first_command_of_the_readme_runs_on_two_gpus(bench: Bench, tmp_path: Path) -> None:
    """Runs the command in new interpreters under torchrun instead of forked processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(launching.PROGRAM)
    done = running.command([*torchrun, program, *first_run(bench, tmp_path)], "transformer_engine")
    assert done.returncode == 0, done.stdout
    assert "2 GPU processes, tp 2" in done.stdout and "step 1/1" in done.stdout
    assert "Transformer Engine is not installed" not in done.stdout
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("packages", [("transformer_engine",), ("transformer_engine", "apex")], ids="-".join)
def test_first_command_runs_on_one_gpu_without_torchrun(
    bench: Bench, tmp_path: Path, packages: tuple[str, ...]
) -> None:
    flags = [*first_run(bench, tmp_path), "--tensor-model-parallel-size", "1"]
    found = bench.train(tmp_path / "save", flags, packages=packages, has_launcher=False)
    assert_gpu_path(found, kernels=LAYERS)


def test_evaluation_runs_on_one_gpu_without_torchrun(bench: Bench, tmp_path: Path) -> None:
    flags = ["run", "--model", str(bench.model("policy")), "--output", str(tmp_path / "out")]
    flags += ["--benchmarks", f"sums={bench.data}", "--prompt-suffix", "", "--num-samples", "1"]
    flags += ["--max-new-tokens", "8", "--verify-num-workers", "1"]
    program = REPOSITORY / "tools" / "evaluate.py"
    outcome = running.run(tmp_path / "logs", flags, program=program, has_launcher=False)
    assert outcome.codes == [0], outcome.output
    assert "sums: 40 of 40 samples" in outcome.output


@pytest.mark.parametrize(
    "case,given",
    [
        ("policy", "--num-gpus 2 --tensor-model-parallel-size 2 --recompute selective"),
        ("policy", "--num-gpus 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
        (
            "policy",
            "--num-gpus 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --recompute full",
        ),
        ("policy", "--num-gpus 1 --objective sft_kl"),
    ],
)
def test_planned_run_starts(bench: Bench, tmp_path: Path, case: str, given: str) -> None:
    """Runs the command that tools/plan.py prints, with its layout and a small batch."""
    planned = [
        "--hf-model",
        str(bench.model(case)),
        "--rollout-gpus",
        "0",
        "--seq-length",
        "64",
        *given.split(),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert plan.main([*planned, *SHORT.split(), "--json"]) == 0
    words = shlex.split(json.loads(printed.getvalue())["commands"][-1])
    at = words.index("pretrain_rasft.py")
    assert words[: at - 1] == ["torchrun", "--nproc-per-node"]
    flags = [str(bench.data) if word == "train.jsonl" else word for word in words[at + 1 :]]
    flags += [*SMALL.split(), "--data-prompt-suffix", "", "--export-hf", str(tmp_path / "hf")]
    found = bench.train(tmp_path / "save", flags, int(words[at - 1]))
    assert_gpu_path(found, kernels=LAYERS)


def test_transformer_engine_for_another_torch_is_one_line(bench: Bench, tmp_path: Path) -> None:
    flags = bench.flags("policy", *DEMONSTRATIONS_ONLY)
    evaluation = ["run", "--model", str(bench.model("policy")), "--output", str(tmp_path / "out")]
    evaluation += ["--benchmarks", f"sums={bench.data}"]
    for program, arguments in (("pretrain_rasft.py", flags), ("tools/evaluate.py", evaluation)):
        done = running.command([sys.executable, program, *arguments], "transformer_engine_of_another_torch")
        assert done.returncode == 1, done.stdout
        (line,) = done.stdout.splitlines()
        assert line.startswith("error: Transformer Engine 2.20.2 ") and " torch 2." in line, line
        assert "undefined symbol" in line and "--no-build-isolation" in line


def test_run_without_transformer_engine_says_so(bench: Bench, tmp_path: Path) -> None:
    flags = bench.flags("policy", *DEMONSTRATIONS_ONLY, "--bf16", "--save", str(tmp_path / "save"))
    done = running.command([sys.executable, "pretrain_rasft.py", *flags])
    assert done.returncode == 0, done.stdout
    assert "1 GPU process," in done.stdout
    assert done.stdout.count("Transformer Engine is not installed") == 1
    assert launching.losses(tmp_path / "save") == pytest.approx(
        bench.losses_on_cpu("policy", "--bf16"), abs=2e-3
    )
