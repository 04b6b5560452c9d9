"""Overlaps with benchmarks: the counts in the README of the data, and generated rows with a known overlap."""

import gzip
import json
import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from megatron_rasft.errors import DataError
from megatron_rasft.tools.data.contamination import find_contamination, words_of
from tests.unit.data.conftest import save_to_disk
from tools import prepare_data

LONG = (
    "How many of the first thousand positive integers are divisible by seven but by neither two nor by three"
)


def named(texts: list[str]) -> list[tuple[str, str]]:
    return [(f"train/{i}", text) for i, text in enumerate(texts)]


def listed_overlaps(readme: str) -> list[tuple[str, str, list[int]]]:
    """(benchmark, training set, counts) of each line of the README's table."""
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", readme, re.M
    )
    return [(row[0], row[3], [int(n) for n in (*row[1:3], *row[4:])]) for row in rows]


@pytest.mark.parametrize("training", ["math_train", "gsm8k_train", "mbpp_train", "kodcode_demo"])
def test_finds_what_the_data_readme_lists(data_folder: Path, training: str) -> None:
    table = listed_overlaps((data_folder / "README.md").read_text(encoding="utf-8"))
    expected = {name: counts for name, train, counts in table if train == training}
    assert len(expected) == 13 and any(counts[2] for counts in expected.values()) != (
        training == "kodcode_demo"
    )
    with gzip.open(data_folder / "train" / f"{training}.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [(row["id"], row["problem"]) for row in map(json.loads, lines)]
    files = [data_folder / "evaluation" / f"{name}.jsonl.gz" for name in expected]
    found = find_contamination(problems, files)
    counted = {
        o.path.name.split(".")[0]: [
            o.num_rows, o.num_short, len(o.sharing), o.num_half, len(o.exact), len(o.train_rows), o.num_pairs,
        ]
        for o in found.overlaps
    }  # fmt: skip
    assert counted == expected
    if training == "mbpp_train":  # "the 108 shared tasks", many of them reworded
        (plus,) = (o for o in found.overlaps if o.path.name.startswith("mbpp_plus"))
        assert len(plus.same_id) == 108 and set(plus.same_id.values()) <= set(found.dropped)


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words_of(r"Find $\frac{3}{4}$ of Zoë's x_1!") == [
        "find",
        "frac",
        "3",
        "4",
        "of",
        "zoë",
        "s",
        "x",
        "1",
    ]


CHINESE = "已知等差数列的前三项之和为十二，前六项之和为四十二，求该数列的公差与首项。"
JAPANESE = "サイコロを三回ふるとき、出た目の和が十になる確率を求めなさい。ただし、どの目も同様に確からしい。"
THAI = "มีจำนวนเต็มบวกกี่จำนวนที่น้อยกว่าหนึ่งพันและหารด้วยเจ็ดลงตัว"


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, THAI])
def test_text_without_spaces_is_compared_character_by_character(write_rows: Callable, text: str) -> None:
    benchmark = write_rows({"id": "b1", "question": text}, name="b.jsonl")
    assert len(words_of(text)) > 25
    problems = [
        f"x{text}y",  # with other text before and after it
        text.replace("，", "\n").replace("、", " , "),  # with other punctuation
        text[: len(text) // 3],
        f"{LONG} {text[-5:]}",
    ]
    found = find_contamination(named(problems), [Path(benchmark)])
    assert list(found.dropped) == [0, 1] and found.overlaps[0].num_short == 0


def test_characters_of_mixed_scripts_are_words_of_their_own() -> None:
    assert words_of("若x12=３，求AB的值") == ["若", "x12", "3", "求", "ab", "的", "值"]
    assert words_of("한국어 문장 is spaced") == ["한국어", "문장", "is", "spaced"]


def test_a_problem_in_an_earlier_message_is_found(write_rows: Callable, tmp_path: Path) -> None:
    benchmark = write_rows({"id": "b1", "question": LONG}, {"id": "b2", "question": "∫?"}, name="b.jsonl")
    turns = [("user", LONG), ("assistant", "7"), ("user", "And why?"), ("assistant", "So.")]
    shots = [("system", f"Example: {LONG} It is 7."), ("user", "Next one?"), ("assistant", "So.")]
    harmless = [("user", "∫!"), ("assistant", LONG)]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in chat], "answer": "1"}
        for chat in (turns, shots, harmless)
    ]
    clean = tmp_path / "clean.jsonl"
    command = ["--decontaminate", benchmark, "--train-data", write_rows(*rows, name="t.jsonl")]
    assert prepare_data.main([*command, "--output", str(clean)]) == 0
    assert [json.loads(line) for line in clean.read_text().splitlines()] == rows[2:]


def test_copies_and_near_copies_are_dropped_and_common_phrases_kept(write_rows: Callable) -> None:
    benchmark = write_rows(
        {"id": "b1", "question": LONG}, {"id": "b2", "question": "What is 2 + 2?"}, name="b.jsonl"
    )
    words = LONG.split()
    problems = [
        LONG.upper() + "?",  # the same words
        "Tell me. "
        + LONG.replace("thousand", "million"),  # the last of the seven 13-grams, ten of the fifteen 5-grams
        " ".join(words[:13]) + " one may ask",  # the first of the seven 13-grams
        "what is 2+2",  # shorter than an n-gram, but with the same words
        "Nothing in common with any of the benchmarks here, as far as thirteen words in a row can show it at all",
    ]
    found = find_contamination(named(problems), [Path(benchmark)], n=13)
    assert list(found.dropped) == [0, 3]
    assert "is b1" in found.dropped[0] and "is b2" in found.dropped[3]
    (overlap,) = found.overlaps
    assert overlap.covered == {"b1": 1.0} and overlap.sharing == {"b1": {0, 1, 2}}
    assert list(find_contamination(named(problems), [Path(benchmark)], n=5).dropped) == [0, 1, 2, 3]
    assert list(find_contamination(named(problems), [Path(benchmark)], n=13, max_share=0.0).dropped) == [
        0,
        1,
        2,
        3,
    ]


def test_tool_reports_and_writes_the_rows_that_stay(
    write_rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    benchmark = write_rows({"id": "b1", "problem": LONG}, name="b.jsonl")
    rows = [{"problem": p, "response": "r", "answer": "1", "kept": True} for p in (LONG, "What is 1 + 1?")]
    train = write_rows(*rows, name="train.jsonl")
    command = ["--decontaminate", benchmark, "--train-data", train]
    assert prepare_data.main(command) == 1
    clean, report = tmp_path / "clean.jsonl", tmp_path / "report.json"
    assert prepare_data.main([*command, "--output", str(clean), "--report", str(report)]) == 0
    assert [json.loads(line) for line in clean.read_text().splitlines()] == rows[1:]
    content = json.loads(report.read_text())
    assert content["dropped"] == {"1": "is b1 (b.jsonl)"} and content["benchmarks"][0]["exact_rows"] == ["b1"]
    assert "contaminated    1" in capsys.readouterr().out
    assert prepare_data.main([*command, "--output", str(clean)]) == 2
    assert prepare_data.main([*command, "--overlap-share", "1.5"]) == 2
    assert "--overlap-share" in capsys.readouterr().err


def test_rows_of_a_saved_data_set_are_written_as_json(write_rows: Callable, tmp_path: Path) -> None:
    row = {"problem": "1+1?", "response": "2", "answer": Decimal("2.5"), "day": date(2026, 1, 2)}
    command = ["--decontaminate", write_rows({"id": "b1", "problem": LONG}, name="b.jsonl")]
    command += [
        "--train-data",
        save_to_disk(tmp_path / "set", [row]),
        "--output",
        str(tmp_path / "clean.jsonl"),
    ]
    assert prepare_data.main(command) == 0
    (written,) = map(json.loads, (tmp_path / "clean.jsonl").read_text().splitlines())
    assert written == {**row, "answer": "2.5", "day": "2026-01-02"}


def test_names_of_fields_may_have_capitals(write_rows: Callable) -> None:
    benchmark = write_rows({"ID": "2024-I-4", "Problem": LONG, "Answer": 4}, name="b.jsonl")
    assert find_contamination(named([LONG]), [Path(benchmark)]).dropped == {0: "is 2024-I-4 (b.jsonl)"}


def test_a_benchmark_row_without_text_is_named(write_rows: Callable) -> None:
    benchmark = write_rows({"id": "b1", "problem": LONG}, {"id": "b2", "answer": "7"}, name="b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl:2 "):
        find_contamination(named([LONG]), [Path(benchmark)])
    with pytest.raises(DataError, match=r"--decontaminate .*nowhere\.jsonl"):
        find_contamination(named([LONG]), [Path("nowhere.jsonl")])
