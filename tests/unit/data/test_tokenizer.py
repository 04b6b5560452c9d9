"""A tokenizer that transformers cannot load, or that does not give text back, is refused when it is opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_rasft.data.tokenizer import check_round_trip, end_ids, open_tokenizer
from megatron_rasft.errors import ModelFolderError


@pytest.fixture
def folder(make_tokenizer: Callable, tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_that_gives_text_back_is_opened(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    text = "Add the numbers, the sum"
    assert tokenizer.decode(tokenizer([text], add_special_tokens=False)["input_ids"][0]) == text


def lose_spaces(tokenizer: dict[str, Any]) -> None:
    """Has the effect of transformers 5.10 on byte-level tokenizers that name LlamaTokenizerFast."""
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def decode_without_bytes(tokenizer: dict[str, Any]) -> None:
    tokenizer["decoder"] = None


def lose_line_breaks(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}


def lower_case(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("damage", [lose_spaces, decode_without_bytes, lose_line_breaks])
def test_a_tokenizer_that_changes_text_is_refused(
    folder: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    damage(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json") as error:
        open_tokenizer(folder)
    assert str(folder) in str(error.value) and "transformers" in str(error.value)


def test_a_small_vocabulary_need_not_have_every_character() -> None:
    import transformers

    small = Tokenizer(models.WordLevel({"?": 0, "1": 1, "+": 2, " ": 3, "\n": 4, "x": 5}, unk_token="?"))
    small.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    small.decoder = decoders.Fuse()
    check_round_trip(transformers.PreTrainedTokenizerFast(tokenizer_object=small), "folder")


def test_a_small_vocabulary_of_words_need_not_have_every_word() -> None:
    import transformers

    symbols = ["?", " ", "\n", *"Add the numbers", "numbers", "add"]
    small = Tokenizer(models.WordLevel({s: i for i, s in enumerate(dict.fromkeys(symbols))}, unk_token="?"))
    small.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+|[\s\S]"), "isolated")
    small.decoder = decoders.Fuse()
    check_round_trip(transformers.PreTrainedTokenizerFast(tokenizer_object=small, unk_token="?"), "folder")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", '{"model": NaN}'),
        ("tokenizer_config.json", "3"),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
    ],
)
def test_files_that_transformers_cannot_read_are_one_line(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelFolderError) as error:
        open_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("eos", "ids"), [("3", {3}), ("[3, 4]", {3, 4}), ("null", set()), ("[]", set())])
def test_the_ids_that_end_a_response_are_those_of_both_files(
    tokenizer: Any, tmp_path: Path, eos: str, ids: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    assert end_ids(tmp_path, tokenizer) == ids | {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "content", ["{", "[]", "", '{"eos_token_id": "x"}', '{"eos_token_id": [NaN]}', '{"eos_token_id": true}']
)
def test_an_unusable_generation_config_is_named(tokenizer: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"generation_config\.json") as error:
        end_ids(tmp_path, tokenizer)
    assert str(tmp_path) in str(error.value)
