"""A small policy that solves some problems and ends its responses, and the flags that its runs share."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forking import REPOSITORY
from tests.functional import launching
from tests.tiny_policy import write_model, write_sums

SHORT_ANSWERS = ["--data-prompt-suffix", "", "--no-verify-filter-too-short", "--verify-num-workers", "1"]


@dataclass(frozen=True)
class Workshop:
    """The model folders and data files of all runs."""

    root: Path
    random: Path
    """The model before any training."""
    policy: Path
    """The model after a little supervised fine-tuning."""
    sums: Path
    """File of 40 problems."""

    def flags(self, *more: str, data: Path | None = None, model: Path | None = None) -> list[str]:
        """The flags of a run of the policy on the sums: 8 problems a step, 3 steps a refresh, a constant learning rate."""
        return [
            *("--hf-model", str(model or self.policy), "--train-data", str(data or self.sums)),
            *(
                "--seq-length",
                "64",
                "--global-batch-size",
                "8",
                "--micro-batch-size",
                "4",
                "--rasft-refresh-interval",
                "3",
            ),
            *("--lr", "1e-3", "--lr-decay-style", "constant", "--lr-warmup-iters", "0"),
            *("--rollout-max-new-tokens", "12", *SHORT_ANSWERS, *more),
        ]

    def train(self, save: Path, more: Sequence[str] = (), world_size: int = 1) -> launching.Outcome:
        """Runs the program with --save; fails if the run does not succeed on every rank."""
        return launching.succeed(
            save.with_name(f"{save.name}-logs"), self.flags("--save", str(save), *more), world_size
        )


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return build_workshop(tmp_path_factory.mktemp("runs"))


def build_workshop(root: Path) -> Workshop:
    """Writes the data and the random model, and trains the policy, which takes half a minute."""
    shop = Workshop(root, write_model(root / "random"), root / "policy", write_sums(root / "sums.jsonl", 40))
    lessons = write_sums(root / "lessons.jsonl", 256, seed=1)
    flags = shop.flags("--objective", "sft", "--data-epochs", "4", model=shop.random, data=lessons)
    launching.succeed(
        root / "policy-logs",
        [
            *flags,
            "--lr",
            "1e-2",
            "--global-batch-size",
            "16",
            "--micro-batch-size",
            "16",
            "--export-hf",
            str(shop.policy),
        ],
    )
    return shop


@pytest.fixture(scope="session")
def tiny_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with the tokenizer of SmolLM2-135M, and two narrow layers, which saves most of the computing."""
    import transformers

    source, target = REPOSITORY / ".cache" / "smollm2-135m-instruct", tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "tools/fetch_smollm2.py", "--output", str(source)]
    subprocess.run(fetch, cwd=REPOSITORY, check=True)
    config = transformers.AutoConfig.from_pretrained(source)
    config.update({"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192, "head_dim": 32})
    config.update({"num_attention_heads": 3, "num_key_value_heads": 3})
    transformers.set_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target
