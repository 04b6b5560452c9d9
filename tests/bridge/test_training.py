"""--model-source bridge with the real Megatron-Bridge: models without a table train, are exported, and are sent to servers.

`make bridge` makes the environment; `.venv-bridge/bin/python -m pytest -m bridge` runs the tests of this file. Megatron-Bridge's layers are Transformer
Engine's, so the runs use the emulated GPUs of tests/emulated_gpu.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.types import Rollout
from tests import forking
from tests.bridge import observing
from tests.emulated_gpu import running
from tests.functional import launching
from tests.tiny_policy import write_model, write_sums

pytestmark = pytest.mark.bridge

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FLAGS = (
    "--model-source bridge --seq-length 64 --global-batch-size 8 --micro-batch-size 4 --rasft-refresh-interval 2 --train-iters 2 "
    "--lr 1e-3 --lr-decay-style constant --lr-warmup-iters 0 --no-verify-filter-too-short --verify-num-workers 1 --rasft-batch-layout padded"
).split()
LAYOUTS = {
    "tp2_fp32": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2_bf16": "--pipeline-model-parallel-size 2 --bf16",
}


def write_exaone(path: Path, like: Path, **changes: Any) -> Path:
    """Writes a random EXAONE 4, whose norms stand after attention and MLP, and the tokenizer of another model."""
    shutil.copytree(like, path, ignore=shutil.ignore_patterns("*.safetensors"))
    own = {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "sliding_window": None}
    config = transformers.Exaone4Config(**SHAPE | own | {"layer_types": ["full_attention"] * 2} | changes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # also those that begin as zeros or ones
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def write_rollouts(path: Path, data: Path, tokenizer: Path) -> Path:
    """Writes four rollouts of each sum, of which the first is correct."""
    encode = transformers.AutoTokenizer.from_pretrained(tokenizer).encode
    rollouts = []
    for row in map(json.loads, data.read_text().splitlines()):
        for index in range(4):
            text = f"\\boxed{{{row['answer'] if index == 0 else '?'}}}"
            ids = [*encode(text), SHAPE["eos_token_id"]]
            rollouts.append(
                Rollout(
                    problem_id=row["id"],
                    sample_index=index,
                    weight_version=0,
                    prompt_ids=encode(row["problem"] + "\n"),
                    response_ids=ids,
                    response_logprobs=[-3.0] * len(ids),
                    finish_reason="stop",
                    text=text,
                )
            )
    RolloutStore(path).append(rollouts)
    return path


class Bench:
    """Data, stored rollouts and models of the runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        policy = write_model(root / "policy")
        self.data = write_sums(root / "sums.jsonl", 40)
        self.exaone = write_exaone(root / "exaone", policy)
        self.rollouts = write_rollouts(root / "rollouts.jsonl", self.data, policy)

    def run(
        self, name: str, model: Path, flags: list[str], num_ranks: int = 1, **options: Any
    ) -> forking.Outcome:
        given = ["--hf-model", str(model), "--train-data", str(self.data), "--data-prompt-suffix", "", *flags]
        return running.run(self.root / f"{name}-logs", given, num_ranks, **options)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bridge"))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == "tp2_fp32" else pytest.mark.nightly) for name in LAYOUTS],
)
def trained(request: pytest.FixtureRequest, bench: Bench) -> Path:
    """The folder of a run that has trained two steps with rasft on two ranks, with what ``observing`` has recorded."""
    folder = bench.root / request.param
    folder.mkdir()
    flags = [*FLAGS, *LAYOUTS[request.param].split(), "--rollout-engine", "replay"]
    flags += ["--rollout-replay", str(bench.rollouts), "--save", str(folder / "save")]
    outcome = bench.run(
        request.param,
        bench.exaone,
        [*flags, "--export-hf", str(folder / "hf")],
        2,
        prepare_rank=lambda rank: [partial(observing.record, folder)],
    )
    assert outcome.codes == [0, 0], outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    return folder


def test_two_steps_train_on_demonstrations_and_rollouts(trained: Path) -> None:
    steps = launching.steps(trained / "save")
    assert len(steps) == 2
    assert all(
        step["training/num_samples"] > 8 for step in steps.values()
    )  # more than the eight demonstrations
    assert steps[2]["objective/loss"] < steps[1]["objective/loss"]


def test_transformers_loads_the_export_with_the_trainers_logits(trained: Path, bench: Bench) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf", attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([observing.TOKENS])).logits.float()
    found = torch.load(trained / "logits.pt")
    allowed = 1e-5 if model.dtype == torch.float32 else 2e-2
    assert (found - expected).abs().max() <= allowed * expected.abs().max()
    before = weights(bench.exaone)
    assert weights(trained / "hf").keys() == before.keys()
    changed = [name for name, tensor in weights(trained / "hf").items() if not tensor.equal(before[name])]
    assert len(changed) == len(before)


def test_a_sync_sends_what_is_exported(trained: Path) -> None:
    exported, sent = weights(trained / "hf"), torch.load(trained / "sync.pt")
    assert exported.keys() == sent.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == sent[name].dtype and torch.equal(tensor, sent[name]), name


REFUSED = {
    "embedded": ("exaone", ["--rollout-engine", "embedded"], ("--rollout-engine", "--model-source")),
    "query_groups": ("exaone", ["--rasft-query-groups", "4"], ("--rasft-query-groups", "--model-source")),
    "architecture": ("exaone", ["--num-layers", "3"], ("--num-layers 3", "--model-source bridge", "2")),
    "vocabulary": ("odd", ["--tensor-model-parallel-size", "2"], ("--tensor-model-parallel-size", "33")),
    "table": ("policy", [], ("--model-source", "LlamaForCausalLM")),
    "packing": ("exaone", ["--rasft-batch-layout", "packed"], ("Exaone4ForCausalLM", "--rasft-batch-layout")),
    "soft_caps": ("gemma2", [], ("gemma2", "final_logit_softcapping")),
}


def write_gemma2(path: Path, like: Path) -> Path:
    shutil.copytree(like, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = transformers.Gemma2Config(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_bridge_cannot_do_is_refused_by_name(bench: Bench, case: str) -> None:
    model, flags, named = REFUSED[case]
    path = bench.root / model
    if not path.exists() and model == "odd":
        write_exaone(path, bench.root / "policy", vocab_size=33)
    if not path.exists() and model == "gemma2":
        write_gemma2(path, bench.root / "policy")
    given = [*FLAGS, "--objective", "sft", "--curriculum-mode", "off"]
    if case == "embedded":
        given = list(FLAGS)
    outcome = bench.run(f"refused-{case}", path, [*given, *flags], 2 if case == "vocabulary" else 1)
    assert set(outcome.codes) == {2} or set(outcome.codes) == {1}, outcome.output
    (line,) = {line for line in outcome.logs[0].splitlines() if line.startswith("error: ")}
    assert all(word in line for word in named), line
