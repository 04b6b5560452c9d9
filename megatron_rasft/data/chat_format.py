"""The chat template of a model: how it shows a problem, and how it begins and ends a response."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chats import Message
from megatron_rasft.data.tokenizer import Tokenizer, tokenize
from megatron_rasft.errors import first_line
from megatron_rasft.reasoning_tags import closing_tag, open_tag

_TEMPLATE_DATE = datetime(2024, 7, 26)
"""Date for chat templates that write one into the prompt. They write today's date by default, but a run that is resumed on
another day must get the same tokens. This is the date to which Llama 3's templates fall back."""

_DATE_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFHIjmMpRSTuUVwWxXyYZ"]
"""The codes of strftime that templates may use."""

_QUESTION = "Questionprobe"
_ANSWER = "Answerprobe"
"""Texts that no template contains. Rendering them shows the text that a template puts around a problem and a response."""


class ChatTemplateError(ValueError):
    """A chat template raised an error."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ReasoningBlock:
    """A block of reasoning that the chat template opens at the end of every prompt, and that a response must close."""

    start: str
    """The tag that opens the block, such as "<think>"."""
    end: str
    lead: str
    """Text of the prompt after the tag; in most templates a line break."""

    def continued(self, response: str) -> str:
        """Removes the beginning of a response that the prompt has already: the opening tag and the text after it."""
        text = response.lstrip()
        return (
            text.removeprefix(self.start).removeprefix(self.lead) if text.startswith(self.start) else response
        )

    def fault(self, text: str) -> str:
        """Returns why ``text``, which follows the prompt, does not close the block; "" if it does."""
        is_open = True
        for tag in re.findall(f"{re.escape(self.start)}|{re.escape(self.end)}", text):
            if tag == self.start and is_open:
                return f"the response opens {self.start} again, which the chat template has opened"
            is_open = tag == self.start
        return f"the response leaves {self.start} open, which the chat template opens" if is_open else ""


@dataclass(kw_only=True, slots=True, frozen=True)
class ChatFormat:
    """The chat template of a model and its end tokens; created by ``read_chat_format``."""

    template: str | None
    """Jinja source from --data-chat-template, or with a fixed date; None uses the tokenizer's own template, if it has one."""
    has_template: bool
    """Whether there is a chat template. Without one, the messages of a prompt are joined by blank lines."""
    origin: str = ""
    """Where the template comes from, for messages."""
    closing: str = ""
    """Text that the template puts after a response; "" if none."""
    reasoning: ReasoningBlock | None = None
    """The block of reasoning that every prompt leaves open; None if the template opens none."""
    end_id: int
    """Token that ends responses and rollouts: the template's end-of-turn token if it has one, else end-of-sequence."""
    eos_id: int | None
    """The tokenizer's end-of-sequence token."""

    def render(self, tokenizer: Tokenizer, messages: list[Message], is_prompt: bool) -> str:
        """Renders messages as text; with ``is_prompt`` up to the beginning of the assistant's response.

        Raises:
            ChatTemplateError: the template raises any error.
        """
        try:
            text: str = tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=is_prompt,
                date_string=_TEMPLATE_DATE.strftime("%d %b %Y"),
            )
        except (TemplateError, ValueError) as error:
            raise ChatTemplateError(first_line(error)) from error
        except Exception as error:  # a template is a program and can raise any error
            raise ChatTemplateError(f"{type(error).__name__}: {first_line(error)}") from error
        return text

    def shows_problem(self, tokenizer: Tokenizer, roles: Iterable[str]) -> bool:
        """Returns whether the template shows the last user message of a chat with these roles.

        Raises:
            ChatTemplateError: the template cannot render these roles.
        """
        messages = [{"role": role, "content": _QUESTION + "x" * i + "end"} for i, role in enumerate(roles)]
        last_user = next(message for message in reversed(messages) if message["role"] == "user")
        return last_user["content"] in self.render(tokenizer, messages, is_prompt=True)


def read_chat_format(tokenizer: Tokenizer, config: DataConfig) -> ChatFormat:
    """Determines the chat template, from ``config`` or ``tokenizer``, and how it begins and ends a response.

    Raises:
        ValueError: the template cannot be used, or there is no token that could end a response.
    """
    template = None if config.data_chat_template is None else _read_template(config.data_chat_template)
    has_template = template is not None or bool(tokenizer.chat_template)
    closing, reasoning = "", None
    end_id = tokenizer.eos_token_id
    origin = "the model's own" if template is None else f"--data-chat-template {config.data_chat_template}"
    if has_template:
        template = _with_fixed_date(template, tokenizer.chat_template)
        blank = ChatFormat(template=template, has_template=True, origin=origin, end_id=-1, eos_id=None)
        reasoning, closing = _probe(tokenizer, blank)
        if config.data_system_prompt is not None:
            _check_system_message(tokenizer, blank)
        known_ids = set(tokenizer.added_tokens_decoder).union(tokenizer.all_special_ids)
        closing_ids = tokenize(tokenizer, [closing], add_special_tokens=False)[0] if closing else []
        end_id = next((token for token in closing_ids if token in known_ids), end_id)
    if end_id is None:
        raise ValueError(
            "neither the tokenizer nor the chat template has a token that ends a response. Set eos_token in the model's "
            "tokenizer_config.json, or give a template with --data-chat-template."
        )
    return ChatFormat(
        template=template,
        has_template=has_template,
        origin=origin,
        closing=closing,
        reasoning=reasoning,
        end_id=end_id,
        eos_id=tokenizer.eos_token_id,
    )


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--data-chat-template {file} cannot be read: {first_line(error)}. Give a template in UTF-8."
        ) from error


def _with_fixed_date(template: str | None, own: Any) -> str | None:
    """Replaces the function strftime_now, which transformers gives to templates, by one that always has the same date.

    transformers passes no functions to a template, so the replacement is written in Jinja.

    Args:
        template: the template of --data-chat-template, if any.
        own: the tokenizer's template, or its templates by name.
    """
    source = template or (own.get("default") if isinstance(own, dict) else own)
    if not isinstance(source, str) or "strftime_now" not in source:
        return template
    steps = "".join(
        f".replace({code!r}, {_TEMPLATE_DATE.strftime(code)!r})"
        for code in _DATE_CODES
        if _TEMPLATE_DATE.strftime(code)
    )
    # "+%}" keeps a line break at the beginning of the template
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro +%}}{source}"


def _probe(tokenizer: Tokenizer, chat_format: ChatFormat) -> tuple[ReasoningBlock | None, str]:
    """Returns the block of reasoning that a prompt leaves open, and the text after a response ("" if the template shows none).

    Raises:
        ValueError: the template cannot render a question and its answer, or does not show the question.
    """
    question = {"role": "user", "content": _QUESTION}
    try:
        prompt = chat_format.render(tokenizer, [question], is_prompt=True)
        answered = [question, {"role": "assistant", "content": _ANSWER}]
        whole = chat_format.render(tokenizer, answered, is_prompt=False)
    except ChatTemplateError as error:
        raise ValueError(
            f"the chat template ({chat_format.origin}) cannot render a question and its answer: {error}. "
            "Give another template with --data-chat-template."
        ) from error
    _, found, opening = prompt.rpartition(_QUESTION)
    if not found:
        raise ValueError(
            f"the chat template ({chat_format.origin}) does not show the problem in the prompt: it renders a question as "
            f"{prompt[:60]!r}. Give another template with --data-chat-template."
        )
    _, found, closing = whole.rpartition(_ANSWER)
    return _open_block(opening), closing if found else ""


def _open_block(opening: str) -> ReasoningBlock | None:
    """Returns the last block of reasoning in ``opening`` if nothing closes it there."""
    start = open_tag(opening)
    if not start:
        return None
    return ReasoningBlock(start=start, end=closing_tag(start), lead=opening.rpartition(start)[2])


def _check_system_message(tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
    """Refuses --data-system-prompt if the template does not accept or show a system message."""
    messages = [{"role": "system", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
    try:
        prompt = chat_format.render(tokenizer, messages, is_prompt=True)
        if _ANSWER in prompt and _QUESTION in prompt:
            return
        reason = f"shows only {prompt[:60]!r}"
    except ChatTemplateError as error:
        reason = f"raises: {error}"
    raise ValueError(
        f"--data-system-prompt needs a chat template that accepts a system message, but this template {reason}. "
        "Remove the flag, or put the text into the problems."
    )
