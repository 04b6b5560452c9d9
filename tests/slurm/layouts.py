"""The shipped settings of examples/slurm at toy size: the same script, recipe and kind of layout, with fewer processes and a tiny model."""

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.emulated_gpu.conftest import name_symbols_as_bytes
from tests.forking import REPOSITORY
from tests.functional.launching import steps
from tests.slurm.runs import PAUSE, PAUSED, Runs, Scenario
from tests.tiny_models import hf_model

SHIPPED = REPOSITORY / "examples" / "slurm" / "rasft.sbatch"
TOY = """
    --seq-length 64 --global-batch-size 4 --micro-batch-size 2 --rasft-refresh-interval 4 --rollout-max-new-tokens 12
    --rollout-num-samples 2 --save-interval 3 --train-iters 6 --sync-bucket-mib 1 --rollout-lag 0
"""
"""Further flags of pretrain_rasft.py. A refresh comes before steps 1 and 5. With a lag, rollouts that are being sampled when a run is
killed are sampled again with later weights, and the resumed run is another one."""

Records = dict[int, dict[str, float]]
"""Step -> its metrics."""


@dataclass(frozen=True)
class Layout:
    """A toy of the setting of the same name.

    Args:
        model: "llama", or a case of tests.tiny_models.
        processes: on each node.
        flags: replace those of the recipe.
        on_emulated_gpus: run on the emulated GPUs of tests/emulated_gpu, because a CPU has no FP8. Their NCCL is gloo under another
            name, which reaches no server, so the trainer samples itself.
    """

    model: str
    nodes: int = 1
    processes: int = 2
    servers: int = 0
    flags: str = ""
    on_emulated_gpus: bool = False


_INTERLEAVED = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --rollout-max-new-tokens 4"
LAYOUTS = {
    "qwen2.5-math-1.5b": Layout("qwen2_one_group"),
    "llama-3.2-3b": Layout("llama"),
    "qwen2.5-math-7b": Layout("qwen2_one_group", servers=1),
    "qwen3-8b": Layout("qwen3", servers=1),
    "qwen3-32b": Layout(
        "qwen3",
        nodes=2,
        servers=2,
        flags="--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
    "qwen3-30b-a3b": Layout(
        "qwen3_moe", nodes=2, processes=4, servers=2, flags="--expert-model-parallel-size 4"
    ),
    "llama-3.3-70b": Layout("llama", nodes=2, flags=_INTERLEAVED, on_emulated_gpus=True),
    "qwen2.5-72b": Layout("qwen2_one_group", nodes=2, flags=_INTERLEAVED, on_emulated_gpus=True),
}
"""Name of a setting -> its toy."""


_MAKING = threading.Lock()
"""Held while a model is made: several layouts share one."""


def toy_model(runs: Runs, case: str) -> Path:
    """Returns the folder of a random model with the tokenizer of the other runs' model."""
    if case == "llama":
        return runs.model
    path = runs.root / case
    with _MAKING:
        if path.exists():
            return path
        shutil.copytree(runs.model, path, ignore=shutil.ignore_patterns("*.safetensors"))
        sizes = {"vocab_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0}
        more = {"bos_token_id": None, "max_position_embeddings": 128}
        more |= {"hidden_size": 64, "intermediate_size": 128}
        more |= {"num_experts": 4, "num_experts_per_tok": 2} if "moe" in case else {}
        hf_model(case, sizes | more).save_pretrained(path)
        if case.startswith("qwen2"):
            name_symbols_as_bytes(path / "tokenizer.json")
    return path


def toy_settings(runs: Runs, name: str, layout: Layout) -> Path:
    """Writes the settings file: the shipped one, with the toy's numbers and flags in addition."""
    lines = [
        f"source {REPOSITORY}/examples/slurm/settings/{name}.sh",
        f"TRAINER_NODES={layout.nodes} NUM_GPUS={layout.processes}",
        f"SERVER_NODES={layout.servers} SERVERS_PER_NODE={min(layout.servers, 1)} SERVER_TP=1",
        f"FLAGS+=({' '.join(TOY.split())} {layout.flags})",
    ]
    path = runs.root / f"{name}.sh"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def differences(before: Records, after: Records) -> list[tuple[int, str, float, float | None]]:
    """Returns step, metric and both values for each metric of ``before`` that is another one in ``after``."""
    return [
        (number, name, value, after[number].get(name))
        for number, record in before.items()
        for name, value in record.items()
        if after[number].get(name) != value
    ]


def killed_and_resumed(name: str) -> Scenario:
    """Returns a function that runs a layout, kills a rank after step ``PAUSED``, and compares the steps that the resumed run repeats."""

    def scenario(runs: Runs) -> None:
        layout, save = LAYOUTS[name], runs.folder(name) / "checkpoints"
        job = runs.submit(
            name,
            f"--nodes={layout.nodes + layout.servers}",
            script=SHIPPED,
            settings=toy_settings(runs, name, layout),
            **PAUSE,
            **(runs.on_emulated_gpus if layout.on_emulated_gpus else {}),
            **runs.shared_files(toy_model(runs, layout.model)),
        )
        runs.wait_for_pause(name)
        before, rollouts = steps(save), (save / "rollouts.jsonl").read_bytes()
        runs.processes(name, "pretrain_rasft.py", RANK="1")[0].kill()
        runs.finish_after_requeue(job)
        after = steps(save)
        assert list(before) == list(range(1, PAUSED + 1)) and list(after) == list(range(1, 7))
        assert differences(before, after) == []
        assert (save / "rollouts.jsonl").read_bytes() == rollouts

    return scenario
