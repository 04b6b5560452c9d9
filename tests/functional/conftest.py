"""A small policy that is right now and then and ends its responses, and the flags its runs share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.functional import launching
from tests.tiny_policy import write_model, write_sums

SHORT_ANSWERS = ["--data-prompt-suffix", "", "--no-verify-filter-too-short", "--verify-num-workers", "1"]


@dataclass(frozen=True)
class Workshop:
    """Files that every run starts from."""

    root: Path
    random: Path
    """The model before any training."""
    policy: Path
    """The model after a little supervised fine-tuning."""
    sums: Path
    """40 problems."""

    def flags(self, *more: str, data: Path | None = None, model: Path | None = None) -> list[str]:
        """A run of the policy on the sums: 8 problems a step, 3 steps a refresh, constant learning rate."""
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
        """A run that must end well, with its checkpoints and records in ``save``."""
        return launching.succeed(
            save.with_name(f"{save.name}-logs"), self.flags("--save", str(save), *more), world_size
        )


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return build_workshop(tmp_path_factory.mktemp("runs"))


def build_workshop(root: Path) -> Workshop:
    """Write the data and the random model, and train the policy; half a minute."""
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
