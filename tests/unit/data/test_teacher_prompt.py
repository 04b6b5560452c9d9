"""The teacher's prompt: the plain prompt with the demonstration in its last user message."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.reading import Row
from megatron_rasft.data.row_cache import tokenized
from megatron_rasft.data.row_report import DataReport
from megatron_rasft.data.teacher_prompt import teacher_messages
from megatron_rasft.data.tokenizing import tokenize_rows
from megatron_rasft.types import Demonstration
from tests.unit.data.conftest import CHATML

TEMPLATE = "{problem} Like {demonstration}, {x}."


def built(
    tokenizer: Any, *, template: str | None = TEMPLATE, max_tokens: int = 4096, **row: Any
) -> tuple[list[Demonstration], DataReport]:
    messages = [{"role": "user", "content": "1+1?"}]
    fields = {"problem": "1+1?", "response": "It is 2.", "answer": None, "messages": messages} | row
    report = DataReport()
    rows = [Row(problem_id="p", source="a.jsonl:1", **fields)]
    config = DataConfig(data_prompt_suffix="\nReason.")
    return list(tokenize_rows(rows, tokenizer, config, max_tokens, report, template)), report


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|><|endoftext|>"])
def test_the_chat_template_shows_problem_and_demonstration_to_the_teacher(
    make_tokenizer: Callable[..., Any], end: str
) -> None:
    tokenizer = make_tokenizer(CHATML)
    ((row,), _) = built(tokenizer, response="It is 2." + end)
    begin, reply = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.prompt_ids) == f"{begin}1+1?\nReason.{reply}"
    expected = f"{begin}1+1?\nReason. Like It is 2., {{x}}.{reply}"
    assert tokenizer.decode(row.teacher_prompt_ids) == expected


def test_without_a_chat_template_the_teachers_prompt_is_plain_text(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(None)
    ((row,), _) = built(tokenizer)
    assert tokenizer.decode(row.teacher_prompt_ids) == "1+1?\nReason. Like It is 2., {x}.\n"
    assert built(tokenizer, template=None)[0][0].teacher_prompt_ids == []


def test_earlier_turns_and_braces_in_texts_stay() -> None:
    turns = [("system", "S"), ("user", "first"), ("assistant", "{problem}"), ("user", "{demonstration}?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = teacher_messages(messages, " {problem}! ", "{demonstration}|{problem}", [])
    assert made[:3] == messages[:3]
    assert made[3] == {"role": "user", "content": "{problem}!|{demonstration}?"}
    assert messages[3]["content"] == "{demonstration}?", "the plain prompt is unchanged"


def test_a_row_whose_teachers_prompt_leaves_no_room_is_left_out_with_its_length(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(CHATML)
    length = len(built(tokenizer)[0][0].teacher_prompt_ids)
    rows, report = built(tokenizer, max_tokens=length + 1)
    assert len(rows) == 1 and not report.overlong
    rows, report = built(tokenizer, max_tokens=length)
    assert not rows and f"prompt {length} +" in str(report.overlong[0])
    assert report.max_tokens_found == length + 1


def test_stored_rows_keep_the_teachers_prompts_of_their_template(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer, model = make_tokenizer(CHATML), tmp_path / "model"
    model.mkdir()
    (tmp_path / "rows.jsonl").write_text(
        '{"problem": "p", "response": "r"}\n{"problem": "q", "response": "s"}\n'
    )
    config = DataConfig(train_data=[str(tmp_path / "rows.jsonl")], data_prompt_suffix="")

    def texts(template: str | None) -> list[str]:
        rows = tokenized(
            config, tokenizer, model, 400, False, "--train-data", tmp_path / "cache", False, template
        )
        assert [tokenizer.decode(list(row.response_ids)) for row in rows] == ["r<|im_end|>", "s<|im_end|>"]
        return [tokenizer.decode(list(row.teacher_prompt_ids)) for row in rows]

    for template in ("{problem}:{demonstration}", "{demonstration};{problem}"):
        for _ in range(2):
            for text, problem, response in zip(texts(template), "pq", "rs", strict=True):
                assert template.format(problem=problem, demonstration=response) in text
    assert texts(None) == ["", ""]
