"""The text of a response keeps the tags of its reasoning, also those that the prompt or the tokenizer would hide."""

from collections.abc import Callable

import pytest

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chat_format import read_chat_format
from megatron_rasft.data.response_text import response_decoder
from megatron_rasft.data.tokenizer import tokenize

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\nOPENED{% endif %}"


def decoded(tokenizer: object, text: str) -> str:
    (ids,) = tokenize(tokenizer, [text], add_special_tokens=False)  # type: ignore[arg-type]
    return response_decoder(tokenizer, read_chat_format(tokenizer, DataConfig()))(ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("opened", "response", "text"),
    [
        ("", "so 5<|im_end|>", "so 5"),
        ("", "<think>so</think> 5<|im_end|>", "<think>so</think> 5"),
        ("<think>\n", "so</think> 5<|im_end|>", "<think>so</think> 5"),
        ("<think>\n", "so \\boxed{5}, but", "<think>so \\boxed{5}, but"),
        ("<think>\n", "<think>\nso</think> 5<|im_end|>", "<think>\nso</think> 5"),
        ("<think>\n\n</think>\n\n", "5<|im_end|>", "5"),
        ("[THINK]", "so[/THINK]5", "[THINK]so[/THINK]5"),
        ("<think>", "", "<think>"),
        ("", "", ""),
    ],
)
def test_text_begins_with_the_reasoning_that_the_prompt_opens(
    make_tokenizer: Callable, opened: str, response: str, text: str
) -> None:
    tokenizer = make_tokenizer(CHATML + PROMPT.replace("OPENED", opened.replace("\n", "\\n")))
    assert decoded(tokenizer, response) == text


def test_tags_of_reasoning_that_are_special_tokens_are_kept_and_others_are_not(
    make_tokenizer: Callable,
) -> None:
    tokenizer = make_tokenizer(CHATML + PROMPT.replace("OPENED", ""))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<tool>"]})
    response = "[THINK]so 5[/THINK][/THINK]It is<tool> 6.<|im_end|>"
    assert decoded(tokenizer, response) == "[THINK]so 5[/THINK][/THINK]It is 6."
