from pathlib import Path

import pytest

from megatron_rasft.config.data import DataConfig


@pytest.mark.parametrize(
    ("values", "flag", "way_out"),
    [
        ({"train_data": ["rows.csv"]}, "--train-data", "rows.csv"),
        ({"train_data": ["a.jsonl", "a.jsonl"]}, "--train-data", "--data-epochs"),
        ({"data_epochs": 0}, "--data-epochs", "0"),
        ({"data_seed": -1}, "--data-seed", "-1"),
        ({"data_overlong": "cut"}, "--data-overlong", "drop"),
        ({"data_bad_rows": "ignore"}, "--data-bad-rows", "skip"),
        ({"data_chat_template": "/nowhere/chat.jinja"}, "--data-chat-template", "leave the flag out"),
        ({"data_answer_field": ""}, "--data-answer-field", "field"),
        ({"data_response_field": "problem"}, "--data-response-field", "worked solution"),
    ],
)
def test_wrong_value_names_the_flag_and_the_way_out(values: dict, flag: str, way_out: str) -> None:
    with pytest.raises(ValueError) as error:
        DataConfig(**values)
    assert flag in str(error.value) and way_out in str(error.value)


def test_defaults_and_empty_suffix_are_valid(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("x")
    assert DataConfig().train_data == []
    assert DataConfig(data_prompt_suffix="", data_chat_template=str(template)).data_prompt_suffix == ""


def test_missing_file_with_another_ending_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"--train-data.*rows\.jsonl\?"):
        DataConfig(train_data=[str(tmp_path / "rows.json")])
