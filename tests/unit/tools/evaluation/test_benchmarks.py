"""Published sets are recognised in this project's layout and in Hugging Face's. Other files are refused or marked."""

import base64
import gzip
import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.data.fields import FieldError
from megatron_rasft.errors import DataError
from megatron_rasft.tools.evaluation.benchmark_rows import parse_row
from megatron_rasft.tools.evaluation.benchmarks import chosen, find_file, read_benchmark
from megatron_rasft.tools.evaluation.known_sets import KNOWN_SETS
from megatron_rasft.tools.evaluation.questions import ask

DATA = Path(__file__).parents[5] / "shared" / "data" / "evaluation"


@pytest.fixture
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the benchmarks are not part of the repository, and {DATA} does not exist")
    return DATA


def rows_of(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [name for name, known in KNOWN_SETS.items() if known.num_rows])
def test_known_set_is_found_counted_and_verified(name: str, data_folder: Path) -> None:
    known = KNOWN_SETS[name]
    benchmark = read_benchmark(known, find_file(known, data_folder))
    assert benchmark.is_verified and len(benchmark.problems) == known.num_rows
    assert benchmark.sha256 == known.text_sha256
    readme = (data_folder.parent / "README.md").read_text(encoding="utf-8")
    assert f"| evaluation/{name}.jsonl.gz | {known.text_sha256} |" in readme
    assert all(p.answer if benchmark.kind == "math" else p.tests for p in benchmark.problems)


def math500(row: dict[str, Any]) -> dict[str, Any]:
    return {**{k: row["source"][k] for k in ("solution", "subject", "level", "unique_id") if k in row["source"]},
            "problem": row["problem"], "answer": row["answer"]}  # fmt: skip


HUGGING_FACE: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "math500": ("MATH-500/test.jsonl", math500),
    "aime24": (
        "aime_2024/data/test-00000-of-00001.parquet",
        lambda row: {"ID": row["id"], "Problem": row["problem"], "Answer": int(row["answer"])},
    ),
    "aime25": (
        "aime25/test.jsonl",
        lambda row: {
            "id": row["id"],
            "problem": row["problem"],
            "solution": f"... \\boxed{{{row['answer']}}}",
        },
    ),
    "amc23": (
        "amc23/data/test-00000-of-00001.parquet",
        lambda row: {"id": row["source"]["id"], "question": row["problem"], "answer": float(row["answer"])},
    ),
    "gsm8k": (
        "gsm8k/main/test-00000-of-00001.parquet",
        lambda row: {"question": row["problem"], "answer": row["source"]["answer"]},
    ),
    "olympiadbench": (
        "OlympiadBench/test.jsonl",
        lambda row: {
            "id": row["source"]["id"],
            "question": row["problem"],
            "final_answer": row["answers"][:1],
        },
    ),
    "minerva_math": (
        "minervamath/test.jsonl",
        lambda row: {"question": row["problem"], "answer": row["answer"]},
    ),
    "humaneval": (
        "openai_humaneval/openai_humaneval/test-00000-of-00001.parquet",
        lambda row: {"task_id": row["id"], **{k: row[k] for k in ("prompt", "test", "entry_point")}},
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_layout_has_the_same_content(name: str, data_folder: Path, tmp_path: Path) -> None:
    file, convert = HUGGING_FACE[name]
    path, rows = tmp_path / file, list(map(convert, rows_of(name)))
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_lines(path, rows)
    (tmp_path / file.partition("/")[0] / "README.md").write_text("a card")
    assert find_file(KNOWN_SETS[name], tmp_path) == path
    benchmark = read_benchmark(KNOWN_SETS[name], path)
    assert benchmark.is_verified and benchmark.sha256 != KNOWN_SETS[name].text_sha256


@pytest.mark.parametrize("file", ["data/train-00000-of-00001.parquet", "aime_2024_problems.parquet"])
def test_only_file_of_a_clone_is_found_and_another_split_is_not_taken(file: str, tmp_path: Path) -> None:
    clone = tmp_path / "AIME_2024"
    path = write_lines(clone / file, [])
    (clone / "README.md").touch()
    assert find_file(KNOWN_SETS["aime24"], tmp_path) == path
    other = write_lines(path.with_name("validation-00000-of-00001.parquet"), [])
    with pytest.raises(DataError, match=r"aime24\.jsonl\.gz"):
        find_file(KNOWN_SETS["aime24"], tmp_path)
    test = other.rename(path.with_name("test.parquet"))
    assert find_file(KNOWN_SETS["aime24"], tmp_path) == test


def test_changed_answer_or_missing_row_is_refused_unless_accepted(data_folder: Path, tmp_path: Path) -> None:
    known, rows = KNOWN_SETS["aime25"], rows_of("aime25")
    path = write_lines(tmp_path / "aime25.jsonl", [{**rows[0], "answer": "469"}, *rows[1:]])
    with pytest.raises(DataError, match=r"aime25\.jsonl .* sha256 .*--unknown-data"):
        read_benchmark(known, path)
    assert not read_benchmark(known, path, accept_unknown=True).is_verified
    write_lines(path, rows[:-1])
    with pytest.raises(DataError, match=r"aime25\.jsonl has 29 rows.* 30"):
        read_benchmark(known, path)
    write_lines(path, rows[::-1])
    assert read_benchmark(known, path).is_verified, "the order of rows is irrelevant"


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"answer": "1"}, 'no "problem"'),
        ({"problem": "1+1?"}, 'no "answer"'),
        ({"problem": " ", "answer": "1"}, '"problem" is empty'),
        ({"problem": 3, "answer": "1"}, '"problem" is not text'),
        ({"problem": "1+1?", "answer": " "}, '"answer" is empty'),
        ({"problem": "1+1?", "answer": "so #### "}, '"answer" is empty'),
        ({"problem": "1+1?", "answer": True}, '"answer" is not text'),
        ({"problem": "1+1?", "answer": float("nan")}, '"answer" is not a finite number'),
        ({"problem": "1+1?", "answer": {"value": 1}}, '"answer" is not text'),
        ({"problem": "1+1?", "final_answer": [None]}, '"final_answer" is not text'),
        ({"problem": "1+1?", "final_answer": ["1", "2"]}, "2 final answers"),
    ],
)
def test_row_that_cannot_be_used_is_named(row: dict[str, Any], cause: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", [{"problem": "2+2?", "answer": "4"}, row])
    ((known, _),) = chosen([f"own={path}"], None)
    with pytest.raises(DataError, match=rf"own\.jsonl:2 .*{cause}"):
        read_benchmark(known, path)


def test_own_set_is_read_and_marked(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "own.jsonl", [{"question": "2+2?", "answer": 4}, {"problem": "1/2?", "answer": 0.5}]
    )
    ((known, found),) = chosen([f"own={path}"], None)
    benchmark = read_benchmark(known, found)
    assert [(p.problem_id, p.answer) for p in benchmark.problems] == [("own/1", "4"), ("own/2", "0.5")]
    assert not benchmark.is_verified
    assert ask(benchmark, " Box it.", "")(benchmark.problems[0]) == "2+2? Box it."


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--benchmarks: 'maths' .*math500"):
        list(chosen(["maths"], tmp_path))
    with pytest.raises(ValueError, match="--data-folder"):
        list(chosen(["aime24"], None))
    with pytest.raises(DataError, match=r"aime24\.jsonl\.gz"):
        list(chosen(["aime24"], tmp_path))
    with pytest.raises(DataError, match=f"--benchmarks aime24={tmp_path / 'x'}"):
        list(chosen([f"aime24={tmp_path / 'x'}"], None))
    for name in ("aime24.jsonl", "AIME-24.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"several files of aime24: AIME-24\.parquet and aime24\.jsonl"):
        list(chosen(["aime24"], tmp_path))


def contest_row(private: str) -> dict[str, Any]:
    return {
        "question_id": "q1", "question_content": "Add.", "starter_code": "class Solution: ...",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "functional"}]),
        "private_test_cases": private, "metadata": json.dumps({"func_name": "add"}),
    }  # fmt: skip


def pack(content: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def test_hidden_tests_of_livecodebench_are_read(tmp_path: Path) -> None:
    hidden = json.dumps([{"input": "3 4", "output": "7", "testtype": "functional"}])
    path = write_lines(tmp_path / "lcb.jsonl", [contest_row(pack(hidden))])
    ((known, found),) = chosen([f"livecodebench={path}"], None)
    benchmark = read_benchmark(known, found)
    assert benchmark.kind == "code" and "own file" in benchmark.title and not benchmark.is_verified
    (problem,) = benchmark.problems
    assert [t["output"] for t in problem.tests["tests"]] == ["3", "7"]
    assert problem.tests["entry_point"] == "add"


@pytest.mark.parametrize(
    "private", ["no base 64", "eJw", base64.b64encode(b"no zlib").decode(), base64.b64encode(zlib.compress(b"no")).decode(),
                pack("no JSON"), pack(3), pack("[3]"), "[]]", '{"input": 1}']
)  # fmt: skip
def test_damaged_hidden_tests_are_named(private: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lcb.jsonl", [contest_row(private)])
    with pytest.raises(DataError, match=r'lcb\.jsonl:1 .*"private_test_cases" is n'):
        read_benchmark(KNOWN_SETS["livecodebench_v1_public"], path, accept_unknown=True)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So it is $\boxed{4}$.", "4"),
        (r"First $\boxed{3}$. Part two: $\boxed{4}$.", "4"),
        (r"The roots are $\boxed{3}$ and $\boxed{4}$.", "3, 4"),
        (r"Empty: $\boxed{}$, full: $\boxed{4}$.", "4"),
    ],
)
def test_gold_answer_of_a_solution_is_what_a_response_would_commit_to(solution: str, answer: str) -> None:
    assert parse_row({"problem": "?", "solution": solution}, "math", "p").answer == answer


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["input", "output", "testtype", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = [
    "id", "problem", "question", "answer", "final_answer", "solution", "text", "prompt", "test", "tests", "test_list",
    "entry_point", "test_setup_code", "test_imports", "public_test_cases", "private_test_cases", "metadata", "starter_code",
]  # fmt: skip


@given(
    record=st.dictionaries(st.sampled_from(FIELDS), VALUES | VALUES.map(json.dumps)),
    kind=st.sampled_from(["math", "code"]),
)
@settings(deadline=None, derandomize=True)
def test_any_json_object_is_a_problem_or_a_fault(record: dict[str, Any], kind: Any) -> None:
    try:
        problem = parse_row(record, kind, "own/1")
    except FieldError as error:
        assert error.reason
    else:
        assert problem.text.strip() and (problem.answer.strip() or problem.check)


class Hostile:
    """An object that deletes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return shutil.rmtree, ("/nowhere",)


def test_hidden_tests_that_would_call_something_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lcb.jsonl", [contest_row(pack(Hostile()))])
    with pytest.raises(DataError, match=r"lcb\.jsonl:1 .*shutil\.rmtree"):
        read_benchmark(KNOWN_SETS["livecodebench_v1_public"], path, accept_unknown=True)
