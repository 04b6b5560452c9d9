"""The product computes the same losses as examples/minimal, which implements the method in plain transformers."""

import json
import string
from pathlib import Path

import pytest

from examples.quickstart.make_arithmetic import KINDS, write_task
from tests.forking import REPOSITORY
from tests.functional import launching
from tests.tiny_policy import write_model

SETTINGS = [
    *("--data-system-prompt", "You solve arithmetic.", "--data-prompt-suffix", "", "--seq-length", "128"),
    *("--micro-batch-size", "4", "--global-batch-size", "16", "--lr-warmup-iters", "2"),
]
"""The flags of the quickstart. The text filters are off, because examples/minimal does not have them."""
NO_FILTERS = ["too-short", "loop-sentences", "loop-windows"]


def test_losses_are_those_of_the_method_in_one_file(tmp_path: Path) -> None:
    write_task(tmp_path / "data", KINDS, 96, 10, seed=1234)
    data = tmp_path / "data" / "train.jsonl"
    model = write_model(tmp_path / "random", string.printable[:97])
    trained, store = tmp_path / "trained", tmp_path / "rollouts.jsonl"
    flags = ["--train-data", str(data), *SETTINGS]
    learn = ["--hf-model", str(model), "--objective", "sft", "--data-epochs", "20", "--lr", "1e-2"]
    launching.succeed(tmp_path / "sft-logs", [*flags, *learn, "--export-hf", str(trained)])

    minimal = ["--hf-model", str(trained), "--train-data", str(data), "--rollout-store", str(store)]
    minimal += ["--lr", "1e-3"]
    program = REPOSITORY / "examples" / "minimal" / "rasft.py"
    done = launching.run(tmp_path / "minimal-logs", minimal, program=program, has_launcher=False)
    assert done.codes == [0], done.output
    expected = [json.loads(line) for line in done.logs[0].splitlines() if line.startswith("{")]
    assert len(expected) == 6 and sum(step["num_samples"] for step in expected) > 6 * 16, "none was correct"

    replay = ["--hf-model", str(trained), "--lr", "1e-3", "--rasft-refresh-interval", "3"]
    replay += ["--rollout-engine", "replay", "--rollout-replay", str(store), "--save", str(tmp_path / "save")]
    replay += [f"--no-verify-filter-{name}" for name in NO_FILTERS]
    launching.succeed(tmp_path / "replay-logs", [*flags, *replay])
    steps = launching.steps(tmp_path / "save")
    for number, step in enumerate(expected, start=1):
        assert steps[number]["training/num_samples"] == step["num_samples"]
        assert steps[number]["objective/loss"] == pytest.approx(step["loss"], abs=1e-5, rel=0)
