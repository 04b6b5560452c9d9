"""Questions contain the texts that a set provides for them, but never the tests that decide."""

import json
from pathlib import Path

import pytest

from megatron_rasft.tools.evaluation.benchmarks import chosen, find_file, read_benchmark
from megatron_rasft.tools.evaluation.known_sets import KNOWN_SETS
from megatron_rasft.tools.evaluation.questions import ask

DATA = Path(__file__).parents[5] / "shared" / "data" / "evaluation"
SHOWN = {
    "humaneval": "def has_close_elements",
    "mbpp": "assert ",
    "mbpp_plus": "assert ",
    "livecodebench_v1_public": "standard input",
}


@pytest.mark.parametrize(("name", "shown"), SHOWN.items())
def test_question_of_a_code_set_shows_base_tests_only(name: str, shown: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the benchmarks are not part of the repository, and {DATA} does not exist")
    benchmark = read_benchmark(KNOWN_SETS[name], find_file(KNOWN_SETS[name], DATA))
    write = ask(benchmark, "\nPut the answer in a box.", "\nWrite Python.")
    question = write(benchmark.problems[0])
    assert shown in question and "```python" in question and "box" not in question
    assert not any("def check(" in write(p) or "assertion(" in write(p) for p in benchmark.problems)


@pytest.mark.parametrize(
    ("problem", "suffix", "question"),
    [
        ("Add one.", "\nWrite Python.", "Add one.\nWrite Python. Name the function `inc`."),
        ("Write inc.", "\nWrite Python.", "Write inc.\nWrite Python."),
        ("Add one.", "", "Add one."),
    ],
)
def test_own_code_set_is_asked_as_in_training(
    tmp_path: Path, problem: str, suffix: str, question: str
) -> None:
    row = {"id": "a", "problem": problem, "tests": ["assert inc(1) == 2"], "entry_point": "inc"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    [(known, path)] = chosen([f"mine={tmp_path / 'own.jsonl'}"], None)
    benchmark = read_benchmark(known, path)
    assert benchmark.kind == "code"
    assert ask(benchmark, "\nPut the answer in a box.", suffix)(benchmark.problems[0]) == question


def test_own_set_with_answers_is_mathematical(tmp_path: Path) -> None:
    row = {"problem": "1+1", "answer": "2", "tests": []}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    [(known, path)] = chosen([f"mine={tmp_path / 'own.jsonl'}"], None)
    assert read_benchmark(known, path).kind == "math"
