"""Rows with tests train like rows with answers; their rollouts are verified by running them."""

import gzip
import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from tests.functional import launching
from tests.tiny_policy import write_model, write_sums

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CHARACTERS = string.printable[:97]
FLAGS = [
    *("--data-prompt-suffix", "", "--data-code-prompt-suffix", "", "--no-verify-filter-too-short"),
    *("--verify-num-workers", "1", "--verify-code-timeout-s", "600", "--rasft-refresh-interval", "3"),
    *("--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--verify-sandbox-level", "limits"),
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def additions(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Problems whose solution is a program of one line, with tests that call it."""
    draw = random.Random(seed)
    rows = []
    for index in range(num_rows):
        n = draw.randrange(10)
        rows.append(
            {
                "id": f"add{index}",
                "problem": f"add {n}",
                "response": f"def f(x): return x+{n}",
                "tests": [f"assert f(1) == {n + 1}", f"assert f(10) == {n + 10}"],
                "entry_point": "f",
            }
        )
    return rows


def rollouts_of(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("code")


def test_mathematics_and_code_train_in_one_run(root: Path) -> None:
    random_model = write_model(root / "random", CHARACTERS)
    lessons = write_rows(root / "lessons.jsonl", additions(192, seed=1))
    sums = write_sums(root / "sums.jsonl", 192, seed=2)
    flags = ["--seq-length", "64", *FLAGS]
    launching.succeed(
        root / "policy-logs",
        [
            *("--hf-model", str(random_model), "--train-data", str(lessons), str(sums), *flags),
            *("--objective", "sft", "--data-epochs", "4", "--lr", "1e-2", "--global-batch-size", "16"),
            *("--export-hf", str(root / "policy")),
        ],
    )
    code = write_rows(root / "code.jsonl", additions(12, seed=3))
    mathematics = write_sums(root / "mathematics.jsonl", 12, seed=4)
    save = root / "save"
    outcome = launching.succeed(
        root / "mixed-logs",
        [
            *("--hf-model", str(root / "policy"), "--train-data", str(code), str(mathematics), *flags),
            *("--global-batch-size", "8", "--curriculum-mode", "all", "--rollout-max-new-tokens", "32"),
            *("--lr", "1e-3", "--save", str(save)),
        ],
    )
    assert "with tests      12 (run in a sandbox of level" in outcome.output
    rollouts = rollouts_of(save)
    programs = [r for r in rollouts if r["problem_id"].startswith("add")]
    answers = [r for r in rollouts if not r["problem_id"].startswith("add")]
    assert len(programs) == len(answers) == 12 * 4
    # The policy solves some problems of each kind, and each kind is verified by its own check
    passed = [r for r in programs if r["verdict"] == "correct"]
    assert passed
    assert {r["verdict_reason"] for r in passed} == {"2 tests passed"}
    assert {r["verdict"] for r in rollouts} <= {"correct", "wrong"}
    solutions = {row["id"]: row["response"] for row in additions(12, seed=3)}
    for rollout in programs:
        if rollout["text"] == solutions[rollout["problem_id"]] and rollout["finish_reason"] == "stop":
            assert rollout["verdict"] == "correct"
        if rollout["verdict"] == "correct":
            assert rollout["text"].startswith("def f(x)")
    assert {r["verdict_reason"] for r in answers if r["verdict"] == "correct"} <= {"same text", "equal"}
    assert len(launching.losses(save)) == 3


def test_real_tasks_are_verified_by_execution(root: Path) -> None:
    path = DATA / "train" / "mbpp_train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the data sets are not part of the repository, and {path} does not exist")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    rows = [{**row, "response": row["response"].replace("\r", "").replace("\t", "    ")} for row in rows]
    short = sorted(rows, key=lambda row: len(row["response"]) + len(row["problem"]))[:8]
    save = root / "mbpp"
    launching.succeed(
        root / "mbpp-logs",
        [
            *("--hf-model", str(write_model(root / "long", CHARACTERS, max_position_embeddings=512))),
            *("--train-data", str(write_rows(root / "mbpp.jsonl", short)), "--seq-length", "256", *FLAGS),
            *("--global-batch-size", "8", "--curriculum-mode", "all", "--rollout-max-new-tokens", "8"),
            *("--lr", "1e-3", "--save", str(save), "--verify-grade-truncated"),
        ],
    )
    rollouts = rollouts_of(save)
    assert len(rollouts) == 8 * 4
    # Responses of eight random characters are run as programs, and fail
    assert {r["verdict"] for r in rollouts} == {"wrong"}
    reasons = {r["verdict_reason"].partition(":")[0] for r in rollouts}
    assert "the program raised SyntaxError" in reasons
    assert "truncated" not in reasons


def test_unknown_sandbox_level_is_refused(root: Path) -> None:
    rows = write_rows(root / "refused.jsonl", additions(8, seed=5))
    flags = ["--seq-length", "64", *FLAGS, "--global-batch-size", "8", "--lr", "1e-3"]
    model = write_model(root / "refusing", CHARACTERS)
    outcome = launching.run(
        root / "refused-logs",
        ["--hf-model", str(model), "--train-data", str(rows), *flags, "--verify-sandbox-level", "most"],
    )
    assert outcome.codes != [0]
    assert "--verify-sandbox-level" in outcome.output
