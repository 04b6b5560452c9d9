"""tools/prepare_data.py, called with the arguments of a command line."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig
from tools import prepare_data

TOOL = Path(__file__).resolve().parents[4] / "tools" / "prepare_data.py"
GOOD = {"problem": "1+1?", "response": "It is \\boxed{2}.", "answer": "2"}


@pytest.fixture
def tokenizer_folder(tokenizer: Any, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_validate_accepts_good_rows(write_rows: Callable, capsys: pytest.CaptureFixture) -> None:
    assert prepare_data.main(["validate", "--train-data", write_rows(GOOD, GOOD)]) == 0
    printed = capsys.readouterr().out
    assert "rows            2" in printed and "graded          2 of 2" in printed


def test_validate_names_faults_and_fails(
    write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, *["{"] * 12, *[{**GOOD, "response": "long " * 500}] * 12)
    plain = ["validate", "--no-grade", "--train-data", path]
    assert prepare_data.main(plain) == 1
    assert prepare_data.main([*plain, "--tokenizer", tokenizer_folder, "--max-tokens", "200"]) == 1
    printed = capsys.readouterr().out
    for line in range(2, 14):
        assert printed.count(f"{path}:{line}: not JSON") == 2
        assert f"{path}:{line + 12}: longer than 200 tokens" in printed


def test_validate_names_the_flag_of_a_field_that_no_row_has(
    write_rows: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows({"problem": "p", "response": "r", "mark": "2"}, "{")
    assert prepare_data.main(["validate", "--no-grade", "--train-data", path]) == 1
    assert "--data-answer-field NAME" in capsys.readouterr().out


def test_overlong_rows_fail_only_where_they_are_refused(write_rows: Callable, tokenizer_folder: str) -> None:
    path = write_rows(GOOD, {**GOOD, "response": "long " * 500})
    command = ["validate", "--no-grade", "--train-data", path, "--tokenizer", tokenizer_folder]
    command += ["--max-tokens", "200"]
    assert prepare_data.main(command) == 0
    assert prepare_data.main([*command, "--data-overlong", "refuse"]) == 1


def test_inspect_prints_one_row_plainly_when_not_on_a_terminal(
    write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, "{", {**GOOD, "problem": "the [bold]second[/bold]", "id": "x"})
    command = ["inspect", "--train-data", path, "--tokenizer", tokenizer_folder]
    for place in (["--index", "2"], ["--line", "3"]):
        assert prepare_data.main([*command, *place]) == 0
        printed = capsys.readouterr().out
        assert "the [bold]second[/bold]" in printed and "It is \\boxed{2}.<|im_end|>" in printed
        assert "\x1b" not in printed and f"{path}:3" in printed


def test_inspect_says_why_a_row_cannot_be_used(
    write_rows: Callable, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(GOOD, "{", {**GOOD, "response": "long " * 500})
    command = ["inspect", "--train-data", path, "--tokenizer", tokenizer_folder, "--max-tokens", "200"]
    for place, named in (
        (["--index", "1"], f"{path}:2: not JSON"),
        (["--line", "2"], f"{path}:2: not JSON"),
        (["--index", "2"], f"{path}:3: longer than 200 tokens"),
        (["--line", "4"], "3 rows"),
    ):
        assert prepare_data.main([*command, *place]) == 1
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cause", "exit_code"),
    [
        (["validate"], "--train-data", 2),
        (["validat"], "Did you mean validate?", 2),
        (["validate", "--train_data", "rows.jsonl"], "Did you mean --train-data?", 2),
        (["convert", "--train-data", "ROWS", "--out", "new.jsonl"], "--output", 2),
        (["validate", "--train-data", "gone.jsonl"], "gone.jsonl", 1),
        (["validate", "--train-data", "rows.csv"], "--train-data", 2),
        (["validate", "--train-data", "gone.jsonl", "--data-epochs", "0"], "--data-epochs", 2),
        (["validate", "--train-data", "gone.jsonl", "--max-tokens", "5"], "--tokenizer", 2),
        (["inspect", "--train-data", "gone.jsonl"], "--tokenizer", 2),
        (["inspect", "--train-data", "ROWS", "--tokenizer", "MODEL", "--index", "5"], "--index 5", 1),
        (["inspect", "--train-data", "ROWS", "--tokenizer", "MODEL", "--index", "-1"], "--index", 2),
        (["validate", "--train-data", "ROWS", "--tokenizer", "gone"], "--tokenizer", 2),
        (["validate", "--train-data", "ROWS", "--tokenizer", "EMPTY"], "--tokenizer", 2),
        (["validate", "--train-data", "ROWS", "--grade-max-s", "0"], "--grade-max-s", 2),
        (["validate", "--train-data", "ROWS", "--rename", "question=prompt"], "--rename question=prompt", 2),
        (["validate", "--train-data", "ROWS", "--rename", "problem"], "--rename problem", 2),
        (["inspect", "--train-data", "ROWS", "--rename", "a=id", "b=id"], "--rename b=id", 2),
        (["convert", "--train-data", "ROWS", "--output", "rows.parquet"], "--output", 2),
        (["convert", "--train-data", "ROWS", "--output", "ROWS"], "exists already", 2),
        (
            ["convert", "--train-data", "ROWS", "--output", "new.jsonl", "--rename", "q=problem"],
            "--data-problem-field problem",
            1,
        ),
    ],
)
def test_error_is_one_line(
    write_rows: Callable,
    tokenizer_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    cause: str,
    exit_code: int,
) -> None:
    (tmp_path / "empty").mkdir()
    stand_ins = {"ROWS": write_rows(GOOD), "MODEL": tokenizer_folder, "EMPTY": str(tmp_path / "empty")}
    assert prepare_data.main([stand_ins.get(argument, argument) for argument in arguments]) == exit_code
    error = capsys.readouterr().err.strip()
    assert cause in error and len(error.splitlines()) == 1


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["inspect", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in fields(DataConfig):
        assert f"--{field.name.replace('_', '-')} " in printed


def test_runs_as_a_script_from_any_folder(write_rows: Callable, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "validate", "--train-data", write_rows(GOOD, "{")]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and "not JSON" in done.stdout and "Traceback" not in done.stderr


def program_row(source: str, *tests: str) -> dict[str, Any]:
    """A row with tests for a program."""
    return {
        "problem": "Write f.",
        "response": f"```python\n{source}\n```",
        "tests": list(tests),
        "entry_point": "f",
    }


ADDS = "def f(x):\n    return x + 1"
VERIFIED = [
    # Row, part of the reason that names it; "" for rows that fit
    (GOOD, ""),
    ({**GOOD, "answer": "4", "response": "It is \\boxed{5}."}, "fails its own answer '4'"),
    (program_row(ADDS, "assert f(1) == 2"), ""),
    (program_row(ADDS, "assert f(1) == 3"), "fails its own tests"),
    (
        program_row("def f(x):\n    raise ValueError", "import pytest\nwith pytest.raises(ValueError): f(1)"),
        "",
    ),
    (program_row("class A:\n    def f(self): return 3", "assert A().f() == 3"), ""),
    (program_row(ADDS, "f(1) == 2"), "cannot fail"),
    (program_row(ADDS, "assert f(1) == f(1)"), "cannot fail"),
    (program_row(ADDS, "assert f(1) = 2"), "not valid Python"),
    (program_row(ADDS, "import no_such_package", "assert f(1) == 2"), "no_such_package"),
]


def test_validate_names_rows_that_fail_their_own_answer_or_tests(
    write_rows: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(*({**row, "problem": f"Write f. {n}"} for n, (row, _) in enumerate(VERIFIED)))
    command = ["validate", "--train-data", path, "--verify-code-timeout-s", "600"]
    assert prepare_data.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"graded          {len(VERIFIED)} of {len(VERIFIED)} demonstrations" in lines
    for number, (_, reason) in enumerate(VERIFIED, 1):
        named = [line for line in lines if line.startswith(f"  {path}:{number}: ")]
        assert len(named) == bool(reason), number
        assert all(reason in line for line in named)
    assert "unfit checks    6" in lines
    assert prepare_data.main([*command, "--no-grade"]) == 0
    assert "graded" not in capsys.readouterr().out


def test_program_that_does_not_end_fails_its_own_tests(
    write_rows: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(program_row("def f(x):\n    while True: pass", "assert f(1) == 2"))
    assert prepare_data.main(["validate", "--train-data", path, "--verify-code-timeout-s", "1"]) == 1
    assert "deadline" in capsys.readouterr().out


def test_verification_ends_at_its_time_limit(write_rows: Callable, capsys: pytest.CaptureFixture) -> None:
    path = write_rows(*({**GOOD, "id": f"row {n}"} for n in range(300)))
    assert prepare_data.main(["validate", "--train-data", path, "--grade-max-s", "0.001"]) == 0
    assert "of 300 demonstrations in 0.001 s. Raise --grade-max-s" in capsys.readouterr().out


def test_convert_renames_fields_and_leaves_out_rows_that_fail_their_answer(
    write_rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    chat += [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "\\boxed{4}"}]
    path = write_rows(
        {"question": "1+1?", "solution": "It is \\boxed{2}.", "final": 2, "source": "web"},
        {"question": "3+3?", "solution": "It is \\boxed{5}.", "final": "6"},
        {"conversations": chat, "final": "4", "id": "chat"},
        {"question": "Write f.", "solution": f"```python\n{ADDS}\n```", "tests": "assert f(1) == 2", "entry_point": "f"},
        {"question": " 1+1? ", "solution": "So \\boxed{2}.", "final": "2"},
    )  # fmt: skip
    output = tmp_path / "train.jsonl"
    command = ["convert", "--train-data", path, "--output", str(output), "--grade", "--drop-duplicates"]
    assert (
        prepare_data.main([*command, "--rename", "question=problem", "solution=response", "final=answer"])
        == 0
    )
    printed = capsys.readouterr().out
    assert f"{path}:2: the demonstration fails its own answer" in printed
    assert f"{path}:5: has the problem of {path}:1, but another response" in printed
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    messages = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "\\boxed{4}")]
    assert rows == [
        {"id": "rows.jsonl:1", "problem": "1+1?", "response": "It is \\boxed{2}.", "answer": "2"},
        {
            "id": "chat",
            "messages": [{"role": role, "content": content} for role, content in messages],
            "answer": "4",
        },
        {
            "id": "rows.jsonl:4",
            "problem": "Write f.",
            "response": f"```python\n{ADDS}\n```",
            "tests": ["assert f(1) == 2"],
            "test_style": "asserts",
            "entry_point": "f",
        },
    ]
    assert prepare_data.main(["validate", "--train-data", str(output)]) == 0


def test_answers_are_taken_from_responses(
    write_rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In GSM8K the field "answer" holds the solution, so problem and response have other names, and no row has an answer."""
    path = write_rows(
        {"question": "1+1?", "answer": "1+1=2\n#### 2"},
        {"question": "1+2?", "answer": "So \\boxed{3}."},
        {"question": "1+3?", "answer": "So it is 4."},
    )
    output = tmp_path / "train.jsonl"
    command = ["convert", "--train-data", path, "--output", str(output), "--rename", "question=problem"]
    command += ["answer=response", "--answers-from-responses"]
    assert prepare_data.main(command) == 1
    assert f"{path}:3" in capsys.readouterr().err
    assert prepare_data.main([*command, "--data-bad-rows", "skip"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["response"], row["answer"]) for row in rows] == [
        ("1+1=2\n#### 2", "2"),
        ("So \\boxed{3}.", "3"),
    ]


def test_convert_writes_nothing_if_a_row_cannot_be_used(write_rows: Callable, tmp_path: Path) -> None:
    output = tmp_path / "train.jsonl"
    command = ["convert", "--train-data", write_rows(GOOD, "{"), "--output", str(output)]
    assert prepare_data.main(command) == 1 and not output.exists()
    assert prepare_data.main([*command, "--data-bad-rows", "skip"]) == 0
    assert len(output.read_text().splitlines()) == 1


def test_validate_lists_rows_with_the_problem_of_an_earlier_row(
    write_rows: Callable, capsys: pytest.CaptureFixture
) -> None:
    rows = [GOOD, {**GOOD, "problem": "1+1? "}, {**GOOD, "answer": "3"}, {**GOOD, "response": "2"}]
    path = write_rows(*rows, {**GOOD, "problem": "1-1?", "answer": "0"})
    assert prepare_data.main(["validate", "--no-grade", "--train-data", path]) == 0
    printed = capsys.readouterr().out
    assert "duplicates      3" in printed
    assert f"{path}:2: repeats {path}:1" in printed
    assert f"{path}:3: has the problem of {path}:1, but another answer" in printed
    assert f"{path}:4: has the problem of {path}:1, but another response" in printed


def test_own_function_grades_the_rows_which_keep_all_their_fields(
    write_rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    function, output = tmp_path / "own.py", tmp_path / "clean.jsonl"
    function.write_text("def grade(row, response): return response == row['wanted']['text']")
    good = {"problem": "p", "response": "r", "wanted": {"text": "r"}, "answer": ["no", "gold", "answer"]}
    flags = [
        "--train-data",
        write_rows(good, {**good, "response": "s"}),
        "--verify-function",
        f"{function}:grade",
    ]
    assert prepare_data.main(["validate", *flags]) == 1
    printed = capsys.readouterr().out
    assert "1 correct" in printed and "rows.jsonl:2" in printed and "--verify-function" in printed
    assert prepare_data.main(["convert", *flags, "--grade", "--output", str(output)]) == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert {name: row[name] for name in good} == good
    assert prepare_data.main(["validate", *flags[:2], "--verify-function", "absent.py:grade"]) == 2


def test_a_broken_function_is_reported_once_and_not_called_for_every_row(
    write_rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    function, calls = tmp_path / "own.py", tmp_path / "calls"
    function.write_text(
        f"def grade(row, response):\n    open({str(calls)!r}, 'a').write('.')\n    return row['absent'] > 1\n"
    )
    flags = ["--train-data", write_rows(*[GOOD] * 300), "--verify-function", f"{function}:grade"]
    assert prepare_data.main(["validate", *flags]) == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("KeyError") == 1
    assert "own.py:3" in printed.err and "rows.jsonl:1" in printed.err and "--verify-function" in printed.err
    assert 0 < len(calls.read_text()) < 300
    output = tmp_path / "out.jsonl"
    assert prepare_data.main(["convert", *flags, "--grade", "--output", str(output)]) == 2
    assert not output.exists()


def test_a_function_that_fails_on_some_rows_is_reported_with_their_number(
    write_rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    function = tmp_path / "own.py"
    function.write_text("def grade(row, response):\n    return row['mark'] / 2\n")
    rows = [{**GOOD, "problem": f"p{i}", "mark": mark} for i, mark in enumerate((2, "x", 0, None, 2))]
    flags = ["--train-data", write_rows(*rows), "--verify-function", f"{function}:grade"]
    assert prepare_data.main(["validate", *flags]) == 1
    printed = capsys.readouterr().out
    assert printed.count("TypeError") == 1 and "own.py:2), rows: 2, first: " in printed
    assert "rows.jsonl:2" in printed and "rows.jsonl:4" not in printed
    assert "rows.jsonl:3: the demonstration fails" in printed
    output = tmp_path / "out.jsonl"
    assert prepare_data.main(["convert", *flags, "--grade", "--output", str(output)]) == 0
    assert len(output.read_text().splitlines()) == 2


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder with a short path, because paths of sockets are limited."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_killed_check_leaves_one_folder_which_the_next_removes(
    write_rows: Callable, tmp_path: Path, place: Path
) -> None:
    function, seen = tmp_path / "own.py", tmp_path / "seen"
    function.write_text(
        "import tempfile, time\n"
        f"def grade(row, response):\n    open({str(seen)!r}, 'w').write(tempfile.gettempdir())\n    time.sleep(600)\n"
    )
    flags = ["--train-data", write_rows(GOOD), "--verify-function", f"{function}:grade"]
    command = [sys.executable, str(TOOL), "validate", *flags, "--verify-timeout-s", "600"]
    environment = os.environ | {"TMPDIR": str(place)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        while not (seen.exists() and seen.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    (left,) = place.glob("rasft-run-*")
    assert seen.read_text() == str(left) and not list(place.glob("pymp-*"))
    subprocess.run([*command, "--no-grade"], env=environment, check=True)
    assert not list(place.glob("rasft-run-*"))
