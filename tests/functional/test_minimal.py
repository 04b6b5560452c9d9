"""The product computes the same losses as examples/minimal, which implements the method in plain transformers."""

import json
import string
from pathlib import Path

import pytest

from tests.forking import REPOSITORY
from tests.functional import launching
from tests.tiny_policy import write_model

SETTINGS = [
    *("--data-system-prompt", "You solve arithmetic.", "--data-prompt-suffix", "", "--seq-length", "128"),
    *("--micro-batch-size", "4", "--global-batch-size", "16", "--lr-warmup-iters", "2"),
]
"""The flags of the quickstart. The text filters are off, because examples/minimal does not have them."""
NO_FILTERS = ["too-short", "loop-sentences", "loop-windows"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that solves most of the problems of ``write_rows``."""
    folder = tmp_path_factory.mktemp("trained")
    model = write_model(folder / "random", string.printable[:97])
    learn = [*"--objective sft --data-epochs 20 --lr 1e-2 --export-hf".split(), str(folder / "model")]
    flags = ["--hf-model", str(model), "--train-data", str(write_rows(folder / "rows.jsonl")), *SETTINGS]
    launching.succeed(folder / "logs", [*flags, *learn])
    return folder / "model"


def write_rows(path: Path) -> Path:
    """Writes 64 problems with the answer 7, whose demonstrations differ in length."""
    rows = [
        {"id": str(i), "problem": f"{i}?", "response": f"{'. ' * (1 + i % 5)}7", "answer": "7"}
        for i in range(64)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("threshold", "kind"), [("0.05", "demonstration"), ("0.999999", "rollout")])
def test_losses_are_those_of_the_method_in_one_file(
    trained: Path, tmp_path: Path, threshold: str, kind: str
) -> None:
    """A guide neither helps nor harms this model, so the threshold decides whether it learns from demonstrations or from itself."""
    data, store = write_rows(tmp_path / "rows.jsonl"), tmp_path / "rollouts.jsonl"
    given = ["--hf-model", str(trained), "--train-data", str(data), "--lr", "1e-3"]

    program, text = tmp_path / "rasft.py", (REPOSITORY / "examples" / "minimal" / "rasft.py").read_text()
    assert "THRESHOLD = 0.3, 0.25, 0.05\n" in text
    program.write_text(text.replace("0.3, 0.25, 0.05\n", f"0.3, 0.25, {threshold}\n"))
    minimal = [*given, "--rollout-store", str(store), "--refresh-interval", "2"]
    done = launching.run(tmp_path / "minimal-logs", minimal, program=program, has_launcher=False)
    assert done.codes == [0], done.output
    expected = [json.loads(line) for line in done.logs[0].splitlines() if line.startswith("{")]
    assert len(expected) == 4 and min(step["num_samples"] for step in expected) > 8, "too few were correct"

    replay = [*given, *SETTINGS, "--rasft-refresh-interval", "2", "--save", str(tmp_path / "save")]
    replay += ["--weighting-guidance-threshold", threshold]
    replay += ["--rollout-engine", "replay", "--rollout-replay", str(store)]
    replay += [f"--no-verify-filter-{name}" for name in NO_FILTERS]
    launching.succeed(tmp_path / "replay-logs", replay)
    steps = launching.steps(tmp_path / "save")
    for number, step in enumerate(expected, start=1):
        assert f"objective/{kind}_weight_mean" in steps[number]
        assert steps[number]["training/num_samples"] == step["num_samples"]
        assert steps[number]["objective/loss"] == pytest.approx(step["loss"], abs=1e-5, rel=0)
