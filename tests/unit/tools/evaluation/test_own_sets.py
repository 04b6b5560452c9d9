"""The user's own benchmarks have the fields of training data."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.reading import Row, read_rows
from megatron_rasft.errors import DataError
from megatron_rasft.tools.evaluation.benchmarks import Benchmark, chosen, read_benchmark
from tests.unit.data.conftest import save_to_disk
from tools import evaluate

CHECK = "def check(candidate):\n    assert candidate(1) == 2"
PYTEST = "from solution import f\n\ndef test_f():\n    assert f(1) == 2"


def read(path: str | Path, **fields: Any) -> Benchmark:
    config = DataConfig(**fields)
    [(known, found)] = chosen([f"own={path}"], None, config)
    return read_benchmark(known, found, fields=config)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "check",
    [
        {"answer": "2"},
        {"answer": 0.5},
        {"tests": CHECK, "entry_point": "f"},
        {"tests": PYTEST},
        {"tests": ["assert f(1) == 2"], "entry_point": "f", "test_setup_code": "import math"},
        {"tests": "def test(): pass\ntest()", "test_style": "asserts"},
    ],
)
def test_problem_is_checked_as_in_training(tmp_path: Path, check: dict[str, Any]) -> None:
    row = {"problem": "Write f.", "response": "r", "id": "a", **check}
    path = write(tmp_path / "rows.jsonl", row, {**row, "id": "b"})
    (first, _) = read(path).problems
    trained = next(iter(read_rows(DataConfig(train_data=[path]))))
    assert isinstance(trained, Row)
    assert (first.problem_id, first.text) == (trained.problem_id, trained.problem)
    assert first.check == (trained.tests or trained.answer)


def test_the_flags_of_training_name_the_fields(tmp_path: Path) -> None:
    fields = {"data_problem_field": "Task", "data_answer_field": "gold", "data_id_field": "key"}
    rows = [
        {"Task": f"{n}+1?", "question": "other", "gold": n + 1, "answer": "no", "key": f"k{n}"}
        for n in (1, 2)
    ]
    for source in (write(tmp_path / "rows.jsonl", *rows), save_to_disk(tmp_path / "set", rows)):
        problems = read(source, **fields).problems
        assert [(p.problem_id, p.text, p.answer) for p in problems] == [
            ("k1", "1+1?", "2"),
            ("k2", "2+1?", "3"),
        ]
    programs = write(
        tmp_path / "code.jsonl", {"text": "other", "task": "Write f.", "suite": PYTEST, "test": "no"}
    )
    own = read(programs, data_problem_field="task", data_tests_field="suite")
    assert own.kind == "code" and own.problems[0].text == "Write f."
    assert own.problems[0].check.style == "pytest"  # type: ignore[union-attr]


def test_answers_of_another_field_are_another_set(tmp_path: Path) -> None:
    """Stored verdicts belong to the answers with which they were graded."""
    path = write(tmp_path / "rows.jsonl", {"problem": "p", "answer": "1", "second": "2"})
    assert read(path).sha256 != read(path, data_answer_field="second").sha256


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"task_text": "p", "answer": "1"}, "--data-problem-field NAME"),
        ({"query": "p", "target": "1"}, "--data-problem-field query --data-answer-field target"),
        ({"problem": "p", "unit_tests": ["assert f()"]}, "--data-tests-field unit_tests"),
    ],
)
def test_wrong_field_names_are_one_error_with_the_flags_that_correct_them(
    tmp_path: Path, row: dict[str, Any], flags: str
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=rf"{flags}\.$") as error:
        read(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_question_of_a_chat_is_asked(tmp_path: Path) -> None:
    human = {"from": "human", "value": [{"type": "text", "text": "1+1?"}]}
    answered = [human, {"from": "gpt", "value": "2"}]
    rows = [{"conversations": chat, "answer": "2"} for chat in ([human], answered)]
    assert [problem.text for problem in read(write(tmp_path / "a.jsonl", *rows)).problems] == ["1+1?", "1+1?"]
    with pytest.raises(DataError, match=r"b\.jsonl:1 .*not one question"):
        read(write(tmp_path / "b.jsonl", {"conversations": [*answered, human], "answer": "2"}))


def test_evaluate_has_the_flags_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--help"])
    printed = capsys.readouterr().out
    for kind in ("problem", "answer", "tests", "messages", "id"):
        assert f"--data-{kind}-field" in printed
