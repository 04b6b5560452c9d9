"""Cached rows equal tokenized rows, and are found only if all inputs are unchanged."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data import row_cache
from megatron_rasft.data.reading import read_rows
from megatron_rasft.data.row_cache import tokenized
from megatron_rasft.data.row_report import DataReport, RowFault
from megatron_rasft.data.tokenized_rows import ByProblem, TokenizedRows, fingerprint_of, write_rows
from megatron_rasft.data.tokenizing import collect_demonstrations
from megatron_rasft.errors import DataError, RasftError
from megatron_rasft.types import CodeTests, Demonstration, ProgramCase
from tests.unit.data.conftest import save_to_disk

ROWS: list[dict[str, Any]] = [
    {"id": "a", "problem": "1+1?", "response": "It is \\boxed{2}.", "answer": "2"},
    {"problem": "Grüße ÿ𝄞 " * 3, "response": "\\boxed{3}", "answer": 3},
    {"id": "new\nline", "problem": "add", "response": "def f(): pass", "tests": ["assert f() is None"], "entry_point": "f"},
    {"id": "long", "problem": "1", "response": "2 " * 500, "answer": "2"},
    {"id": "no answer", "problem": "1", "response": "2"},
    {"id": "a", "problem": "again", "response": "2", "answer": "2"},
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder whose files are placeholders."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataConfig(train_data=[str(path)], data_bad_rows="skip")


class Counted:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.num_calls += 1
        return self._tokenizer(*args, **options)


def plain(d: Demonstration) -> Demonstration:
    names = ("prompt_ids", "response_ids", "teacher_prompt_ids")
    return replace(d, **{name: list(getattr(d, name)) for name in names})


def read(
    tokenizer: Any, config: DataConfig, model: Path, cache: Path | None, max_tokens: int = 400
) -> TokenizedRows:
    return tokenized(config, tokenizer, model, max_tokens, True, "--train-data", cache)


@pytest.mark.parametrize("is_cached", [True, False])
def test_rows_equal_the_output_of_tokenizing(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path, is_cached: bool
) -> None:
    expected, report = collect_demonstrations(read_rows(config), tokenizer, config, 400)
    assert len(expected) == 3 and len(report.faults) == 2 and len(report.overlong) == 1
    for _ in range(2):
        rows = read(tokenizer, config, model, tmp_path / "cache" if is_cached else None)
        assert [plain(d) for d in rows] == expected
        assert rows.report == report
        assert rows.ids == [d.problem_id for d in expected]
        assert rows.end_ids == {d.response_ids[-1] for d in expected}
        assert rows.num_programs == 1
        assert plain(rows[-1]) == expected[-1] and [plain(d) for d in rows[1:]] == expected[1:]
        with pytest.raises(IndexError):
            rows[3]


def test_a_second_start_tokenizes_nothing(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path
) -> None:
    counted = Counted(tokenizer)
    first = read(counted, config, model, tmp_path / "cache")
    assert counted.num_calls
    counted.num_calls = 0
    again = read(counted, config, model, tmp_path / "cache")
    assert counted.num_calls == 0
    assert [plain(d) for d in again] == [plain(d) for d in first]
    # Flags that only affect the report or the order change no row.
    others = replace(config, data_bad_rows="refuse", data_overlong="refuse", data_seed=5, data_epochs=3)
    read(counted, others, model, tmp_path / "cache")
    (model / "model.safetensors").write_text("other weights")
    read(counted, config, model, tmp_path / "cache")
    assert counted.num_calls == 0


def test_changed_file_of_a_saved_data_set_is_tokenized_again(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path
) -> None:
    counted = Counted(tokenizer)
    for answer, is_read in (("2", True), ("2", False), ("3", True)):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        folder = save_to_disk(tmp_path / "set", [{**ROWS[0], "answer": answer}])
        counted.num_calls = 0
        assert (
            read(counted, replace(config, train_data=[folder]), model, tmp_path / "cache")[0].answer == answer
        )
        assert bool(counted.num_calls) == is_read


def change_data(config: DataConfig, model: Path) -> DataConfig:
    path = Path(config.train_data[0])
    stat = path.stat()
    path.write_text(path.read_text().replace("1+1", "1+2"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time of the file do not change
    return config


def change_tokenizer(config: DataConfig, model: Path) -> DataConfig:
    (model / "tokenizer.json").write_text("{ }")
    return config


def change_template(config: DataConfig, model: Path) -> DataConfig:
    path = model.parent / "template.jinja"
    text = "{% for m in messages %}{{ m.content }}{{ '<|endoftext|>' if m.role == 'assistant' else 'A' }}{% endfor %}"
    path.write_text(text if not path.exists() else text.replace("'A'", "'B'"))
    return replace(config, data_chat_template=str(path))


def change_suffix(config: DataConfig, model: Path) -> DataConfig:
    return replace(config, data_prompt_suffix=" Think.")


@pytest.mark.parametrize("change", [change_data, change_tokenizer, change_template, change_suffix])
def test_rows_are_tokenized_again_after_any_change_of_their_sources(
    tokenizer: Any,
    config: DataConfig,
    model: Path,
    tmp_path: Path,
    change: Callable[[DataConfig, Path], DataConfig],
) -> None:
    counted = Counted(tokenizer)
    if change is change_template:
        config = change(config, model)
    read(counted, config, model, tmp_path / "cache")
    counted.num_calls = 0
    config = change(config, model)
    rows = read(counted, config, model, tmp_path / "cache")
    assert counted.num_calls
    assert [plain(d) for d in rows] == collect_demonstrations(read_rows(config), tokenizer, config, 400)[0]
    counted.num_calls = 0
    read(counted, config, model, tmp_path / "cache", max_tokens=399)
    assert counted.num_calls


@pytest.mark.parametrize("damage", ["cut", "missing", "index cut", "other format", "empty folder"])
def test_damaged_rows_are_replaced(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path, damage: str
) -> None:
    expected = [plain(d) for d in read(tokenizer, config, model, tmp_path / "cache")]
    (folder,) = (tmp_path / "cache").iterdir()
    index = folder / "rows.json"
    if damage == "cut":
        os.truncate(folder / "tokens", 8)
    elif damage == "missing":
        (folder / "text").unlink()
    elif damage == "index cut":
        os.truncate(index, 20)
    elif damage == "other format":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    for _ in range(2):
        assert [plain(d) for d in read(tokenizer, config, model, tmp_path / "cache")] == expected
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_two_runs_that_start_together_both_get_the_rows(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2)

    def write_together(*args: Any) -> None:
        write_rows(*args)
        together.wait(600)  # both runs have written their rows before either renames its folder

    monkeypatch.setattr(row_cache, "write_rows", write_together)
    found: list[list[Demonstration]] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                [plain(d) for d in read(tokenizer, config, model, tmp_path / "cache")]
            )
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and len(found[0]) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_slower_run_keeps_the_files_that_a_faster_one_has_mapped(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    inodes: list[set[int]] = []

    def slowly(*args: Any) -> None:
        write_rows(*args)
        monkeypatch.setattr(row_cache, "write_rows", write_rows)
        read(tokenizer, config, model, cache)  # the faster run does all of its work here
        inodes.append({path.stat().st_ino for path in cache.glob("[!.]*/*")})

    monkeypatch.setattr(row_cache, "write_rows", slowly)
    rows = read(tokenizer, config, model, cache)
    assert {path.stat().st_ino for path in cache.glob("*/*")} == inodes[0] and len(inodes[0]) == 7
    assert [plain(d) for d in rows] == [plain(d) for d in read(tokenizer, config, model, cache)]


def test_no_folder_remains_if_rows_cannot_be_read_or_written(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = Path(config.train_data[0])

    def spoilt(*args: Any) -> None:
        with path.open("a") as file:
            file.write("\n")
        write_rows(*args)

    monkeypatch.setattr(row_cache, "write_rows", spoilt)
    with pytest.raises(DataError, match=r"--train-data changed"):
        read(tokenizer, config, model, cache)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_cache, "write_rows", full)
    with pytest.raises(RasftError, match=r"No space left on device.*--data-cache"):
        read(tokenizer, config, model, cache)
    with pytest.raises(RasftError, match=r"No space left on device.*TMPDIR"):
        read(tokenizer, config, model, None)
    path.write_text("\n")
    monkeypatch.setattr(row_cache, "write_rows", write_rows)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read(tokenizer, config, model, cache)
    assert list(cache.iterdir()) == []


def test_unfinished_folders_of_killed_runs_are_removed_after_an_hour(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for name, age_s in (("old", 7200), ("new", 60)):
        folder = cache / f".building-{name}"
        folder.mkdir(parents=True)
        (folder / "tokens").touch()
        for path in (folder / "tokens", folder):
            then = path.stat().st_mtime - age_s
            os.utime(path, (then, then))
    read(tokenizer, config, model, cache)
    assert [path.name for path in cache.glob(".building-*")] == [".building-new"]


def test_empty_files_tests_and_odd_ids_are_read_back(tmp_path: Path) -> None:
    report = DataReport(num_rows=2, faults=[RowFault(source="f:1", reason="not JSON", detail="why")])
    write_rows(tmp_path, [], report)
    rows = TokenizedRows(tmp_path)
    assert list(rows) == [] and rows.ids == [] and rows.report == report
    case = CodeTests(
        style="stdin", cases=(ProgramCase(input="1", output="2"),), prompt="def", setup="import x"
    )
    values: dict[str, Any] = {
        "problem": "",
        "response": "r",
        "prompt_ids": [2**31 - 1],
        "response_ids": [0, 7],
    }
    given = [
        Demonstration(problem_id="a\udcff", answer=None, tests=case, source="s", **values),
        Demonstration(problem_id="b", answer="", **values),
    ]
    write_rows(tmp_path, given, report)
    assert [plain(d) for d in TokenizedRows(tmp_path)] == given


def test_values_are_computed_only_for_the_problems_that_are_accessed(
    tokenizer: Any, config: DataConfig, model: Path, tmp_path: Path
) -> None:
    rows = read(tokenizer, config, model, tmp_path / "cache")
    made: list[str] = []

    def answer(d: Demonstration) -> str | None:
        made.append(d.problem_id)
        return d.answer

    answers = ByProblem(rows, answer)
    assert list(answers) == rows.ids and len(answers) == 3 and made == []
    assert answers["rows.jsonl:2"] == "3" and made == ["rows.jsonl:2"]
    assert answers.get("unknown") is None
    assert dict(ByProblem(list(rows), lambda d: d.answer)) == dict(answers)


@pytest.mark.parametrize(
    "change",
    [
        {"problem": "2+1?"},
        {"response": "It is \\boxed{3}."},
        {"answer": "3"},
        {"answer": None, "tests": CodeTests(style="asserts", tests=("assert 1",))},
        {"prompt_ids": [1, 2]},
        {"response_ids": [2, 9]},
        {"problem_id": "b"},
    ],
)
def test_the_fingerprint_changes_with_every_part_of_a_row_but_its_place(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    row = Demonstration(
        problem_id="a", problem="1+1?", response="It is \\boxed{2}.", answer="2", prompt_ids=[1], response_ids=[2, 3]
    )  # fmt: skip
    made = fingerprint_of([row, row])
    assert made == fingerprint_of([row, replace(row, source="other.jsonl:7")])
    assert (
        len(
            {
                made,
                fingerprint_of([row, replace(row, **change)]),
                fingerprint_of([replace(row, **change), row]),
            }
        )
        == 3
    )
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows", [row, row], DataReport())
    assert fingerprint_of(TokenizedRows(tmp_path / "rows")) == made


def test_fields_for_an_own_function_are_stored_and_part_of_the_fingerprint(
    tokenizer: Any, model: Path, tmp_path: Path
) -> None:
    def stored(wanted: Any, keep_fields: bool = True) -> TokenizedRows:
        row = {"problem": "p", "response": "It is 2.", "answer": "2", "wanted": wanted}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        config = DataConfig(train_data=[str(tmp_path / "rows.jsonl")])
        flag = "--train-data"
        return tokenized(config, tokenizer, model, 400, True, flag, tmp_path / "cache", keep_fields)

    rows = stored({"a": 1})
    assert rows[0].check == {"problem": "p", "response": "It is 2.", "answer": "2", "wanted": {"a": 1}}
    assert rows.fingerprint != stored({"a": 2}).fingerprint
    assert stored({"a": 1}, keep_fields=False)[0].check == "2"
    assert stored({"a": 1}, False).fingerprint == stored({"a": 2}, False).fingerprint
