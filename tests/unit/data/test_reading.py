import datetime
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.fields import FieldError
from megatron_rasft.data.reading import Row, _parse_record, read_rows
from megatron_rasft.data.row_report import DataReport, RowFault
from megatron_rasft.errors import DataError
from tests.unit.data.conftest import save_to_disk

GOOD: dict[str, Any] = {"problem": "1+1?", "response": "It is \\boxed{2}.", "answer": "2"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]


def read(*paths: str, require_answer: bool = True, **values: Any) -> list[Any]:
    return list(read_rows(DataConfig(train_data=list(paths), **values), require_answer))


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], "answer": "2"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"id": ' + "1" * 10_000 + "}", "not JSON"),
        ("\udcff", "not UTF-8"),
        ("[1, 2]", "not a JSON object"),
        ({"response": "r", "answer": "2"}, 'no "problem"'),
        ({"problem": "p", "answer": "2"}, 'no "response"'),
        ({"problem": "p", "response": "r"}, 'no "answer"'),
        ({**GOOD, "problem": None}, 'no "problem"'),
        ({**GOOD, "response": " \n"}, '"response" is empty'),
        ({**GOOD, "answer": ""}, '"answer" is empty'),
        ({**GOOD, "answer": ["2"]}, '"answer" is not text'),
        ({**GOOD, "answer": True}, '"answer" is not text'),
        ({**GOOD, "answer": {"value": 2}}, '"answer" is not text'),
        ({**GOOD, "answer": float("nan")}, '"answer" is not a finite number'),
        ({**GOOD, "answer": float("-inf")}, '"answer" is not a finite number'),
        ({**GOOD, "problem": 3}, '"problem" is not text'),
        ({**GOOD, "response": "\ud800"}, '"response" is not valid Unicode'),
        ({**GOOD, "id": ""}, '"id" is empty'),
        ({**GOOD, "id": [1]}, '"id" is not text'),
        ({**GOOD, "id": "first"}, "duplicate id"),
        ({"messages": "hello", "answer": "2"}, '"messages" is not a list'),
        ({"messages": [], "answer": "2"}, '"messages" does not end'),
        (chat(("user", "p"), ("assistant", "r"), ("user", "q")), '"messages" does not end'),
        (chat(("assistant", "r")), '"messages" has no user'),
        (chat(("tool", "p"), ("assistant", "r")), "chat role"),
        (chat((["user"], "p"), ("assistant", "r")), "chat role"),
        ({"conversations": [{"from": "human", "value": 3}], "answer": "2"}, '"conversations" is not text'),
        (chat(("user", "p"), ("assistant", "")), '"messages" is empty'),
        (chat(("user", [{"type": "text"}]), ("assistant", "r")), "part that is not text"),
        (chat(("user", [{"type": "image", "text": "p"}]), ("assistant", "r")), "part that is not text"),
        (chat(("user", [3]), ("assistant", "r")), "part that is not text"),
        ({"messages": CHAT}, 'no "answer"'),
    ],
)
def test_a_faulty_row_is_reported_and_the_others_are_kept(
    write_rows: Callable, bad: Any, reason: str
) -> None:
    path = write_rows({**GOOD, "id": "first"}, bad, GOOD)
    rows = read(path)
    assert [type(row) for row in rows] == [Row, RowFault, Row]
    assert rows[1].source == f"{path}:2"
    assert reason in rows[1].reason
    assert rows[2].problem_id == "rows.jsonl:3", "a faulty row must not shift the line numbers of others"


def test_texts_are_not_changed(write_rows: Callable) -> None:
    odd = {"problem": " a\u2028b\n", "response": "\tc\r\n", "answer": " 2 ", "id": 7}
    (row,) = read(write_rows(odd))
    assert (row.problem, row.response, row.answer, row.problem_id) == (" a\u2028b\n", "\tc\r\n", " 2 ", "7")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (2, "2"),
        (2.5, "2.5"),
        (2.0, "2"),
        (-1e-7, "-0.0000001"),
        (1.5e30, "1500000000000000000000000000000"),
        ("2/3", "2/3"),
        ("nan", "nan"),
    ],
)
def test_an_answer_may_be_a_number(write_rows: Callable, answer: Any, text: str) -> None:
    assert read(write_rows({**GOOD, "answer": answer}))[0].answer == text


def test_answer_may_be_missing_only_without_rollouts(write_rows: Callable) -> None:
    path = write_rows(
        {"problem": "p", "response": "r"}, {**GOOD, "answer": ""}, GOOD, {**GOOD, "answer": [2]}
    )
    rows = read(path, require_answer=False)
    assert [row.answer for row in rows[:3]] == [None, None, "2"]
    assert isinstance(rows[3], RowFault), "an answer that is given must be usable in every run"


def test_last_assistant_message_is_the_response(write_rows: Callable) -> None:
    (row,) = read(write_rows({"messages": CHAT, "answer": "2"}))
    assert (row.problem, row.response, row.messages) == ("1+1?", "2", CHAT[:-1])


def test_problem_and_response_take_precedence_over_messages_if_both_are_present(write_rows: Callable) -> None:
    both, only_problem = read(
        write_rows({**GOOD, "messages": CHAT}, {"problem": "p", "messages": CHAT, "answer": "2"})
    )
    assert both.response == GOOD["response"]
    assert only_problem.response == "2"


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_sharegpt_chats_are_read_without_a_flag(write_rows: Callable, name: str) -> None:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in CHAT]
    (row,) = read(write_rows({name: turns, "answer": "2"}))
    assert (row.problem, row.response, row.messages) == ("1+1?", "2", CHAT[:-1])


def test_parts_of_a_message_are_joined(write_rows: Callable) -> None:
    parts = [{"type": "text", "text": "1+"}, "1", {"text": "?", "image": None}]
    (row,) = read(write_rows(chat(("user", parts), ("assistant", [{"type": "text", "text": "2"}]))))
    assert (row.problem, row.response) == ("1+1?", "2")


@pytest.mark.parametrize(
    ("record", "flags"),
    [
        ({"question": "p", "solution": "r", "answer": "2"}, "--data-problem-field question --data-response-field solution"),
        ({"Problem": "p", "respones": "r", "answer": "2"}, "--data-problem-field Problem --data-response-field respones"),
        ({"problem": "p", "output": "r", "target": "2"}, "--data-response-field output --data-answer-field target"),
        ({"problem": "p", "response": "r", "test_list": ["assert f()"]}, "--data-tests-field test_list"),
        ({"question": "p", "answer": "the way #### 2"}, "--rename answer=response --answers-from-responses"),
        ({"dialog": CHAT, "answer": "2"}, "--data-messages-field dialog"),
        ({"messages": CHAT, "final_answer": "2"}, "--data-answer-field final_answer"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_wrong_field_names_are_one_error_with_the_flags_that_correct_them(
    write_rows: Callable, record: dict[str, Any], flags: str, bad_rows: str
) -> None:
    path = write_rows("not JSON", record, record)
    with pytest.raises(DataError, match=rf"{flags}\.$") as error:
        read(path, data_bad_rows=bad_rows)
    message = str(error.value)
    assert path in message and "\n" not in message
    named = flags.split()
    if "--rename" not in named:
        fields = dict(zip(named[::2], named[1::2], strict=True))
        config = {flag[2:].replace("-", "_"): name for flag, name in fields.items()}
        assert isinstance(read(path, **config)[1], Row)


def test_an_answer_of_unknown_name_is_asked_for_with_the_other_fields(write_rows: Callable) -> None:
    record = {"question": "p", "solution": "r", "final": "2"}
    flags = "--data-problem-field question --data-response-field solution"
    with pytest.raises(DataError, match=rf'"answer".* {flags} --data-answer-field NAME\.$'):
        read(write_rows(record, record))
    without = read(write_rows(record), data_problem_field="question", data_response_field="solution")
    assert isinstance(without[0], RowFault)


def test_names_are_not_checked_where_no_other_field_is_likely(write_rows: Callable) -> None:
    (fault,) = read(write_rows({"problem": "p", "response": "r", "source": "web"}))
    assert isinstance(fault, RowFault) and fault.reason == 'no "answer"'
    (row,) = read(write_rows({"problem": "p", "response": "r", "target": "t"}), require_answer=False)
    assert isinstance(row, Row)


def test_saved_data_set_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    rows = [{**GOOD, "answer": str(n), "messages": CHAT, "image": b"x"} for n in range(5)]
    folder = save_to_disk(tmp_path / "sets" / "train", rows[:3], rows[3:])
    found = read(folder)
    assert [(row.answer, row.source) for row in found] == [(str(n), f"{folder}:{n + 1}") for n in range(5)]
    assert found[0].problem_id == "train:1"
    first_file = next(Path(folder).glob("data-00000*"))
    first_file.write_bytes(first_file.read_bytes()[:-300])
    with pytest.raises(DataError, match="saved data set"):
        read(folder)
    first_file.unlink()
    with pytest.raises(DataError, match=first_file.name):
        read(folder)


def test_folder_that_is_no_data_set_and_one_of_several_splits_are_refused(tmp_path: Path) -> None:
    for split in ("test", "train"):
        save_to_disk(tmp_path / "sets" / split, [GOOD])
    (tmp_path / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    with pytest.raises(DataError, match=r"--train-data .*sets/test or .*sets/train"):
        read(str(tmp_path / "sets"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other is a folder without state\.json"):
        read(str(tmp_path / "other"))
    for state in ("{}", '{"_data_files": []}', '{"_data_files": ["a"]}', "["):
        (tmp_path / "other" / "state.json").write_text(state)
        with pytest.raises(DataError, match=r"other/state\.json .*save_to_disk"):
            read(str(tmp_path / "other"))


def test_field_names_can_be_mapped(write_rows: Callable) -> None:
    path = write_rows({"q": "p", "solution": "r", "final": "2", "uid": "x"})
    (row,) = read(
        path,
        data_problem_field="q",
        data_response_field="solution",
        data_answer_field="final",
        data_id_field="uid",
    )
    assert (row.problem, row.response, row.answer, row.problem_id) == ("p", "r", "2", "x")


def test_blank_lines_and_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n" + json.dumps(GOOD).encode())
    assert [row.source for row in read(str(path))] == [f"{path}:1", f"{path}:4"]


def test_all_formats_hold_the_same_rows(tmp_path: Path, write_rows: Callable) -> None:
    rows = [{**GOOD, "messages": None}, {"problem": None, "response": None, "answer": "2", "messages": CHAT}]
    plain = write_rows(*rows)
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "heavy": "x"} for row in rows]), table)
    expected = [(row.problem, row.response, row.answer, row.messages) for row in read(plain)]
    for path in (zipped, table):
        assert [(row.problem, row.response, row.answer, row.messages) for row in read(str(path))] == expected
    assert [row.source for row in read(str(table))] == [f"{table}:1", f"{table}:2"]


def test_rows_of_files_with_the_same_name_have_different_ids(tmp_path: Path, write_rows: Callable) -> None:
    (tmp_path / "more").mkdir()
    rows = read(write_rows(GOOD), write_rows(GOOD, name="more/rows.jsonl"))
    assert len({row.problem_id for row in rows if isinstance(row, Row)}) == 2


def test_id_repeated_in_another_file_is_a_fault(write_rows: Callable) -> None:
    first, second = (
        write_rows({**GOOD, "id": "x"}, name="a.jsonl"),
        write_rows({**GOOD, "id": "x"}, name="b.jsonl"),
    )
    fault = read(first, second)[1]
    assert isinstance(fault, RowFault) and f"{first}:1" in str(fault)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.jsonl.gz", gzip.compress(b""), "no rows"),
        ("a.jsonl.gz", b"{}", "gzip"),
        ("a.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 1000)[:-20], "gzip"),
        ("a.parquet", b"PAR1 and no more", "parquet"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        (json.dumps([GOOD, GOOD], indent=1), "jq -c '.[]'"),
        (json.dumps([GOOD, GOOD]), "jq -c '.[]'"),
        ("\n " + json.dumps([GOOD, GOOD])[:-9], "jq -c '.[]'"),
        (json.dumps(GOOD, indent=2), "jq -c '.'"),
    ],
)
@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_a_file_that_is_one_json_value_is_refused_as_a_whole(
    write_rows: Callable, content: str, way_out: str, bad_rows: str
) -> None:
    path = write_rows(content)
    with pytest.raises(DataError, match=re.escape(way_out)) as error:
        read(path, data_bad_rows=bad_rows)
    assert path in str(error.value) and "one row a line" in str(error.value)


@pytest.mark.parametrize("broken", ["{", "{}", '["a"]', "[1, 2", "}", "nonsense"])
def test_a_broken_first_row_is_only_a_faulty_row(write_rows: Callable, broken: str) -> None:
    rows = read(write_rows(broken, GOOD))
    assert [type(row) for row in rows] == [RowFault, Row]


def test_decimals_of_a_table_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"problem": ["p"], "response": ["r"], "answer": [Decimal("0.0000025")]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read(str(path))[0].answer == "0.0000025"


DEFAULTS = DataConfig()
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["check", "f", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
FIELDS = [
    "problem",
    "response",
    "answer",
    "tests",
    "messages",
    "id",
    "entry_point",
    "test_setup_code",
    "test_style",
]


@given(
    record=JSON_VALUES | st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES), require_answer=st.booleans()
)
@settings(deadline=None, derandomize=True)
def test_any_json_value_is_a_row_or_a_fault(record: Any, require_answer: bool) -> None:
    try:
        row = _parse_record(record, DEFAULTS, require_answer, source="a:1", default_id="a")
    except FieldError as fault:
        assert fault.reason and "\n" not in fault.reason
    else:
        assert (
            row.problem.strip()
            and row.response.strip()
            and row.messages[-1]["role"] in ("user", "assistant", "system")
        )
        assert row.tests is not None or row.answer is not None or not require_answer


def test_a_parquet_file_without_the_columns_is_refused_with_a_list_of_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["p"], "solution": ["r"]}), path)
    with pytest.raises(DataError, match="question, solution"):
        read(str(path))


def test_a_missing_file_is_reported_before_any_row_is_read(write_rows: Callable, tmp_path: Path) -> None:
    config = DataConfig(train_data=[write_rows(GOOD), str(tmp_path / "gone.jsonl")])
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        next(read_rows(config))


def test_the_file_that_was_probably_meant_is_named(write_rows: Callable) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl\?"):
        read(write_rows(GOOD).replace("rows.jsonl", "row.jsonl"))


def test_a_pipe_is_refused_as_such(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl is not a regular file"):
        read(str(tmp_path / "pipe.jsonl"))


def test_the_same_file_under_two_names_is_refused(write_rows: Callable, tmp_path: Path) -> None:
    path = write_rows(GOOD)
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(DataError, match=r"link\.jsonl and .*rows\.jsonl"):
        read(path, str(tmp_path / "link.jsonl"))


def test_an_empty_list_of_files_is_refused() -> None:
    with pytest.raises(DataError, match="--train-data"):
        read()


def test_refusal_names_ten_rows_and_counts_all() -> None:
    faults = [RowFault(source=f"a.jsonl:{n}", reason="not JSON") for n in range(1, 14)]
    report = DataReport(num_rows=20, num_demonstrations=7, faults=faults)
    with pytest.raises(DataError) as error:
        report.check(DataConfig())
    message = str(error.value)
    assert "13 of 20 rows" in message and "a.jsonl:10:" in message and "a.jsonl:11:" not in message
    assert "and 3 more: tools/prepare_data.py validate" in message
    assert "--data-bad-rows skip" in message
    report.check(DataConfig(data_bad_rows="skip"))
    assert report.num_faults_by_reason == {"not JSON": 13}


def test_refusal_names_the_flag_of_a_field_that_no_row_has() -> None:
    faults = [RowFault(source=f"a.jsonl:{n}", reason='no "gold"') for n in (1, 2)]
    config = DataConfig(data_answer_field="gold")
    with pytest.raises(DataError, match="give --data-answer-field NAME"):
        DataReport(num_rows=2, faults=faults).check(config)
    assert not DataReport(num_rows=3, num_demonstrations=1, faults=faults).advice(config)


def test_details_of_a_fault_tell_null_from_missing_and_a_cut_line_from_a_wrong_one(
    write_rows: Callable,
) -> None:
    null, missing, cut = read(
        write_rows({**GOOD, "answer": None}, {"problem": "p", "response": "r"}, '{"id": "3')
    )
    assert null.detail == "it is null" and missing.detail == "the row has problem, response"
    assert cut.detail.startswith("Unterminated string") and "at character 8 of" in cut.detail


@pytest.mark.parametrize(
    ("name", "num_rows", "faults"),
    [
        ("gsm8k_train", 7473, []),
        # MATH leaves \boxed{} empty in two solutions.
        ("math_train", 7500, [(5530, '"answer" is empty'), (5532, '"answer" is empty')]),
    ],
)
def test_real_training_sets(
    data_folder: Path, name: str, num_rows: int, faults: list[tuple[int, str]]
) -> None:
    path = data_folder / "train" / f"{name}.jsonl.gz"
    rows = read(str(path))
    assert len(rows) == num_rows
    found = [(row.source, row.reason) for row in rows if isinstance(row, RowFault)]
    assert found == [(f"{path}:{line}", reason) for line, reason in faults]


@pytest.mark.parametrize(
    ("fields", "style", "num_scripts"),
    [
        ({"tests": ["assert f(1) == 1", "assert f(2) == 4"], "entry_point": "f"}, "asserts", 2),
        ({"tests": "def check(candidate):\n    assert candidate(1) == 1\n", "entry_point": "f"}, "check", 1),
        ({"tests": "from solution import f\n\ndef test_f():\n    assert f(1) == 1\n"}, "pytest", 1),
        ({"tests": "def test_f():\n    assert f(1) == 1\ntest_f()\n", "test_style": "asserts"}, "asserts", 1),
    ],
)
def test_a_row_with_tests_needs_no_answer(
    write_rows: Callable[..., str], fields: dict[str, Any], style: str, num_scripts: int
) -> None:
    path = write_rows({"problem": "p", "response": "r", **fields})
    (row,) = read_rows(DataConfig(train_data=[path]))
    assert isinstance(row, Row), row
    assert row.answer is None
    assert row.tests is not None
    assert row.tests.style == style
    assert len(row.tests.tests) == num_scripts
    assert row.tests.entry_point == fields.get("entry_point", "")


@pytest.mark.parametrize("tests", [[], "", " ", [""], [None], None])
def test_empty_tests_beside_an_answer_are_no_tests(write_rows: Callable[..., str], tests: Any) -> None:
    """In a table of both kinds of rows, the columns of the other kind are empty."""
    other = {"tests": tests, "entry_point": "", "test_setup_code": "", "test_style": ""}
    programs = {
        "problem": "p",
        "response": "r",
        "answer": "",
        "tests": ["assert f()"],
        "entry_point": "",
        "test_style": "",
    }
    rows = read(write_rows({**GOOD, **other}, programs))
    assert [(row.answer, row.tests and row.tests.style) for row in rows] == [("2", None), (None, "asserts")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tests": []}, '"tests" is empty'),
        ({"tests": " ", "answer": ""}, '"tests" is empty'),
        ({"tests": ["", None]}, '"tests" is empty'),
        ({"tests": ["assert True", 3]}, '"tests" is not text'),
        ({"tests": "def check(candidate): pass"}, '"entry_point"'),
        ({"tests": "assert f(1)", "entry_point": "f(1)"}, '"entry_point"'),
        ({"tests": "assert f(1)", "test_style": "doctest"}, "unknown test_style"),
        ({"tests": "assert f(1)", "test_setup_code": 3}, '"test_setup_code" is not text'),
        ({}, 'no "answer"'),
    ],
)
def test_unusable_tests_are_reported(
    write_rows: Callable[..., str], fields: dict[str, Any], reason: str
) -> None:
    path = write_rows({"problem": "p", "response": "r", **fields})
    (fault,) = read_rows(DataConfig(train_data=[path]))
    assert isinstance(fault, RowFault)
    assert reason in fault.reason


def test_real_code_rows_are_usable(data_folder: Path) -> None:
    files = [str(data_folder / "train" / f"{name}.jsonl.gz") for name in ("mbpp_train", "kodcode_demo")]
    rows = list(read_rows(DataConfig(train_data=files)))
    assert len(rows) == 374 + 224
    styles = Counter(row.tests.style for row in rows if isinstance(row, Row) and row.tests is not None)
    assert styles == Counter(asserts=374, pytest=224)


def test_every_field_is_kept_for_an_own_function_and_no_answer_is_needed(
    write_rows: Callable[..., str],
) -> None:
    row = {"problem": "p", "response": "r", "answer": {"a": [1, None]}, "tests": 3, "schema": ["x", 0.5]}
    path = write_rows(row, {"problem": "p", "response": "r"})
    first, second = (row for row in read_rows(DataConfig(train_data=[path]), keep_fields=True))
    assert isinstance(first, Row) and isinstance(second, Row)
    assert first.fields == first.check == row
    assert (first.answer, first.tests) == (None, None)
    assert second.check == {"problem": "p", "response": "r"}


def test_every_column_of_a_table_is_kept_for_an_own_function(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"problem": ["p"], "response": ["r"], "day": [datetime.date(2026, 11, 30)], "grades": [[1, 2]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (row,) = read_rows(DataConfig(train_data=[str(path)]), keep_fields=True)
    assert isinstance(row, Row)
    assert row.fields == {"problem": "p", "response": "r", "day": "2026-11-30", "grades": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "picture": [b"1"]}), path)
    (fault,) = read_rows(DataConfig(train_data=[str(path)]), keep_fields=True)
    assert isinstance(fault, RowFault) and "bytes" in fault.reason
