"""Models, data and assertions for runs on the emulated machine."""

import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.emulated_gpu import facts, running
from tests.functional import launching
from tests.tiny_models import hf_model
from tests.tiny_policy import write_model, write_sums

FLAGS = [
    *(
        "--seq-length",
        "64",
        "--global-batch-size",
        "8",
        "--micro-batch-size",
        "4",
        "--rasft-refresh-interval",
        "2",
    ),
    *("--lr", "1e-3", "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--data-prompt-suffix", ""),
    *("--rollout-max-new-tokens", "12", "--no-verify-filter-too-short", "--verify-num-workers", "1"),
]
STEPS = 2
DEMONSTRATIONS_ONLY = ["--curriculum-mode", "off", "--train-iters", str(STEPS)]


@dataclass(frozen=True)
class Bench:
    """Models and training data of the runs, and a cache of their losses on the CPU."""

    root: Path
    data: Path
    """File with 40 problems."""
    _losses: dict[tuple[str, ...], list[float]] = field(default_factory=dict)

    def model(self, case: str) -> Path:
        """Returns the folder of a random model of tests.tiny_models, with the tokenizer of the tiny policy."""
        path = self.root / case
        if case == "policy":
            return path
        if not path.exists():
            shutil.copytree(self.root / "policy", path, ignore=shutil.ignore_patterns("*.safetensors"))
            sizes = {
                "vocab_size": 32,
                "eos_token_id": 0,
                "bos_token_id": None,
                "max_position_embeddings": 128,
            }
            hf_model(case, sizes).save_pretrained(path)
            if case.startswith("qwen2"):
                name_symbols_as_bytes(path / "tokenizer.json")
        return path

    def flags(self, case: str, *more: str) -> list[str]:
        return ["--hf-model", str(self.model(case)), "--train-data", str(self.data), *FLAGS, *more]

    def train(
        self, save: Path, flags: list[str], world_size: int = 1, **options: object
    ) -> list[facts.Facts]:
        """Runs a training on the emulated machine that must succeed, and returns the facts of each rank."""
        paths = [save.with_name(f"{save.name}-facts{rank}.json") for rank in range(world_size)]
        outcome = running.run(
            save.with_name(f"{save.name}-logs"),
            [*flags, "--save", str(save)],
            world_size,
            prepare_rank=lambda rank: [partial(facts.record, paths[rank])],
            **options,
        )
        assert outcome.codes == [0] * world_size, outcome.output
        assert "Traceback" not in outcome.output, outcome.output
        return facts.read(paths)

    def losses_on_cpu(self, case: str, *more: str) -> list[float]:
        """The losses of the same training in one process on the CPU."""
        key = (case, *more)
        if key not in self._losses:
            save = self.root / f"cpu-{len(self._losses)}"
            launching.succeed(
                save.with_name(f"{save.name}-logs"),
                self.flags(case, *DEMONSTRATIONS_ONLY, *more, "--save", str(save)),
            )
            self._losses[key] = launching.losses(save)
        return self._losses[key]


def name_symbols_as_bytes(tokenizer: Path) -> None:
    """Renames the space and the newline to GPT-2's names of their bytes.

    For a Qwen2, transformers loads the vocabulary into its own tokenizer of bytes, whatever class the folder names.
    """
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    names = {" ": "Ġ", "\n": "Ċ"}
    content["model"]["vocab"] = {names.get(k, k): index for k, index in content["model"]["vocab"].items()}
    tokenizer.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("emulated")
    write_model(root / "policy")
    return Bench(root, write_sums(root / "sums.jsonl", 40))


def assert_gpu_path(
    found: list[facts.Facts], *, kernels: set[str], own: frozenset[str] = frozenset()
) -> None:
    """Checks that every rank used only the modules for GPUs, and this project's classes ``own``, and called these kernels."""
    for rank in found:
        assert (rank.backend, rank.distributed_backend) == ("nccl", "nccl")
        assert rank.transformer_impl == "transformer_engine"
        assert rank.optimizer.startswith("transformer_engine.")
        assert not rank.cpu_backend_is_on
        assert rank.gradient_accumulation_fusion
        assert rank.core_attention == ["megatron.core.extensions.transformer_engine.TEDotProductAttention"]
        assert own == {
            layer.rpartition(".")[2] for layer in rank.layers if layer.startswith("megatron_rasft.")
        }
        assert kernels <= rank.kernels.keys(), rank.kernels
    assert sum(rank.kernels.get("fused_logprobs", 0) for rank in found) > 0
