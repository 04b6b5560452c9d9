"""A job array of examples/benchmark_reproduction at toy size: the shipped script and setting, with fewer processes and a tiny model."""

import json
import tomllib
from pathlib import Path
from typing import Any

from tests.forking import REPOSITORY
from tests.functional.launching import steps
from tests.slurm.runs import PAUSE, Runs

NAME = "qwen2.5-math-7b"
SHIPPED = REPOSITORY / "examples" / "benchmark_reproduction"
TASK = "rasft-seed1"
TOY: dict[str, dict[str, Any]] = {
    "train": {
        "--data-prompt-suffix": "",
        "--seq-length": 64,
        "--global-batch-size": 8,
        "--rollout-num-samples": 2,
        "--rollout-max-new-tokens": 12,
        "--rollout-batch-size": 16,
        "--verify-num-workers": 1,
        "--no-verify-filter-too-short": True,
        "--train-iters": 6,
        "--exit-before-end-s": 420,
    },
    "evaluate": {"--prompt-suffix": "", "--num-samples": 1, "--max-new-tokens": 12},
}
"""Table of the setting -> flags in addition to the shipped ones."""


def toy_setting(runs: Runs) -> Path:
    """Writes the shipped setting with the toy's numbers. Its only task is a training with RASFT and the evaluation."""
    content = tomllib.loads((SHIPPED / "settings" / f"{NAME}.toml").read_text(encoding="utf-8"))
    train, evaluate = content.pop("train"), content.pop("evaluate")
    content |= {"methods": ["rasft"], "seeds": [1], "num_processes": 2, "save_interval": 3}
    evaluate["--benchmarks"] = ["sums=${HELDOUT_DATA}"]
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items()]
    for name, flags in (("train", train | TOY["train"]), ("evaluate", evaluate | TOY["evaluate"])):
        lines += [f"[{name}]", *(f"{flag} = {json.dumps(value)}" for flag, value in flags.items())]
    path = runs.root / f"{NAME}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def submit(runs: Runs, name: str, limit_min: int, **variables: str) -> str:
    """Submits the array with its only task; returns the job's number."""
    data = dict.fromkeys(("TRAIN_DATA", "HELDOUT_DATA"), str(runs.data))
    folders = {"MODEL": str(runs.model), "EVALUATION_DATA": str(runs.root), "OUTPUT": str(runs.folder(name))}
    return runs.submit_script(
        name,
        SHIPPED / "slurm" / f"{NAME}.sbatch",
        ["--setting", str(toy_setting(runs))],
        ["--array=0", f"--time={limit_min}"],
        **data,
        **folders,
        **variables,
    )


def array(runs: Runs) -> None:
    """Ends inside its time limit, is submitted again, and equals an array without the stop."""
    runs.succeed(submit(runs, "array", 10, **PAUSE, PAUSE_BEFORE_END_S="410"))
    assert not (runs.folder("array") / TASK / "done").exists()
    runs.succeed(submit(runs, "array", 120))
    runs.succeed(submit(runs, "undisturbed_array", 120))
    ours, reference = (runs.folder(name) / TASK for name in ("array", "undisturbed_array"))
    assert steps(ours) == steps(reference) and len(steps(ours)) == 6
    for file in ("rollouts.jsonl", "evaluation/samples/sums.jsonl"):
        assert (ours / file).read_bytes() == (reference / file).read_bytes()
