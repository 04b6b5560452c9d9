"""Turns rows into demonstrations: applies the chat template, tokenizes, and ends each response with one end token."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.reading import DataReport, Message, Row, RowFault
from megatron_rasft.errors import ModelFolderError, first_line
from megatron_rasft.types import CodeTests, Demonstration

_BATCH_SIZE = 1024
"""Number of texts per call of the tokenizer. Fast tokenizers process the texts of a batch on all cores."""

_TEMPLATE_DATE = "26 Jul 2024"
"""Date for chat templates that write one into the prompt. Llama 3's templates write today's date by default, but a run that is
resumed on another day must get the same tokens. This is the date to which those templates fall back."""

_PROBE = "\u2020probe\u2020"
"""A response that no template contains. Rendering it shows the text that a template puts after a response."""


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that this module uses."""

    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    @property
    def chat_template(self) -> Any: ...
    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> Any: ...


@dataclass(kw_only=True, slots=True, frozen=True)
class ChatFormat:
    """The chat template of a model and its end tokens; created by ``read_chat_format``."""

    template: str | None
    """Jinja source from --data-chat-template; None uses the tokenizer's own template, if it has one."""
    has_template: bool
    """Whether there is a chat template. Without one, the messages of a prompt are joined by blank lines."""
    closing: str
    """Text that the template puts after a response; "" if none."""
    end_id: int
    """Token that ends responses and rollouts: the template's end-of-turn token if it has one, else end-of-sequence."""
    eos_id: int | None
    """The tokenizer's end-of-sequence token."""

    def render(self, tokenizer: Tokenizer, messages: list[Message], is_prompt: bool) -> str:
        """Renders messages as text; with ``is_prompt`` up to the beginning of the assistant's response."""
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=is_prompt,
            date_string=_TEMPLATE_DATE,
        )
        return text


@dataclass(kw_only=True, slots=True)
class _Rendered:
    row: Row
    prompt_text: str
    response_text: str
    is_plain_ending: bool


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a local model folder.

    Raises:
        ModelFolderError: transformers cannot load a tokenizer from it.
    """
    from transformers import AutoTokenizer  # imported here because it takes seconds

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"model folder {folder} has no tokenizer that transformers can load ({first_line(error)}). "
            "Copy tokenizer.json and tokenizer_config.json into it."
        ) from error
    return tokenizer


def end_ids(folder: str | Path, tokenizer: Tokenizer) -> set[int]:
    """The token ids that end a response according to the model's generation_config.json and its tokenizer."""
    path = Path(folder) / "generation_config.json"
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    values = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return {value for value in values if value is not None}


def read_chat_format(tokenizer: Tokenizer, config: DataConfig) -> ChatFormat:
    """Determines the chat template, from ``config`` or ``tokenizer``, and how it ends a response.

    Raises:
        ValueError: the template cannot be used, or there is no token that could end a response.
    """
    template = None
    if config.data_chat_template is not None:
        template = Path(config.data_chat_template).read_text(encoding="utf-8")
    has_template = template is not None or bool(tokenizer.chat_template)
    closing = ""
    end_id = tokenizer.eos_token_id
    if has_template:
        blank = ChatFormat(template=template, has_template=True, closing="", end_id=-1, eos_id=None)
        closing = _probe_closing(tokenizer, blank, config)
        known_ids = set(tokenizer.added_tokens_decoder).union(tokenizer.all_special_ids)
        closing_ids = _tokenize(tokenizer, [closing], add_special_tokens=False)[0] if closing else []
        end_id = next((token for token in closing_ids if token in known_ids), end_id)
    if end_id is None:
        raise ValueError(
            "neither the tokenizer nor the chat template has a token that ends a response. Set eos_token in the model's "
            "tokenizer_config.json, or give a template with --data-chat-template."
        )
    return ChatFormat(
        template=template,
        has_template=has_template,
        closing=closing,
        end_id=end_id,
        eos_id=tokenizer.eos_token_id,
    )


def build_demonstrations(
    rows: Iterable[Row | RowFault],
    tokenizer: Tokenizer,
    config: DataConfig,
    max_tokens: int,
    require_answer: bool = True,
) -> tuple[list[Demonstration], DataReport]:
    """Tokenizes rows into demonstrations, and refuses or leaves out unusable rows as ``config`` demands.

    Prompt and response are tokenized separately. Rollouts are sampled after ``prompt_ids``, so demonstrations and
    rollouts of a problem follow exactly the same tokens. ``response_ids`` ends with one end token.

    Args:
        rows: the output of ``read_rows``.
        tokenizer: a tokenizer of transformers; a fast one takes seconds for 10,000 rows.
        config: chat template, prompt, and treatment of unusable rows.
        max_tokens: maximum number of tokens of prompt plus response.
        require_answer: as for ``read_rows``.

    Raises:
        DataError: ``config`` refuses rows that were found, or no row is left.
        ValueError: the chat template cannot be used.
    """
    demonstrations, report = collect_demonstrations(rows, tokenizer, config, max_tokens, require_answer)
    report.check(config)
    return demonstrations, report


def tokenize_prompts(problems: Sequence[str], tokenizer: Tokenizer, config: DataConfig) -> list[list[int]]:
    """Tokenizes problems into the prompts that their demonstrations would have.

    Raises:
        ValueError: the chat template cannot be used.
    """
    chat_format = read_chat_format(tokenizer, config)
    texts = []
    for problem in problems:
        messages = _complete_prompt([{"role": "user", "content": problem}], config)
        if chat_format.has_template:
            texts.append(chat_format.render(tokenizer, messages, is_prompt=True))
        else:
            texts.append(_plain_prompt(messages))
    if not texts:
        return []
    prompts = _tokenize(tokenizer, texts, add_special_tokens=not chat_format.has_template)
    return [_opened(ids, chat_format) for ids in prompts]


def collect_demonstrations(
    rows: Iterable[Row | RowFault],
    tokenizer: Tokenizer,
    config: DataConfig,
    max_tokens: int,
    require_answer: bool = True,
) -> tuple[list[Demonstration], DataReport]:
    """Like ``build_demonstrations``, but does not raise DataError for unusable rows."""
    report = DataReport()
    return list(tokenize_rows(rows, tokenizer, config, max_tokens, report, require_answer)), report


def tokenize_rows(
    rows: Iterable[Row | RowFault],
    tokenizer: Tokenizer,
    config: DataConfig,
    max_tokens: int,
    report: DataReport,
    require_answer: bool = True,
) -> Iterator[Demonstration]:
    """Yields the demonstrations of ``rows`` one by one, and adds to ``report``, which is complete after the last one.

    Rows that cannot be used, or have more than ``max_tokens`` tokens, are left out and reported.
    """
    chat_format = read_chat_format(tokenizer, config)
    for batch in batched(
        _render_rows(rows, tokenizer, chat_format, config, report, require_answer), _BATCH_SIZE
    ):
        # A chat template writes all special tokens itself. Without one the tokenizer adds its own.
        prompts = _tokenize(
            tokenizer, [item.prompt_text for item in batch], add_special_tokens=not chat_format.has_template
        )
        responses = _tokenize(tokenizer, [item.response_text for item in batch], add_special_tokens=False)
        for item, prompt_ids, response_ids in zip(batch, prompts, responses, strict=True):
            prompt_ids = _opened(prompt_ids, chat_format)
            reason = _close(response_ids, chat_format) if prompt_ids else "the prompt has no tokens"
            if reason:
                report.faults.append(RowFault(source=item.row.source, reason=reason))
                continue
            num_tokens = len(prompt_ids) + len(response_ids)
            report.max_tokens_found = max(report.max_tokens_found, num_tokens)
            if num_tokens > max_tokens:
                report.overlong.append(
                    RowFault(
                        source=item.row.source,
                        reason=f"longer than {max_tokens} tokens",
                        detail=f"prompt {len(prompt_ids)} + response {len(response_ids)}",
                    )
                )
                continue
            report.num_demonstrations += 1
            report.num_prompt_tokens += len(prompt_ids)
            report.num_response_tokens += len(response_ids)
            report.num_plain_endings += item.is_plain_ending
            yield Demonstration(
                problem_id=item.row.problem_id,
                problem=item.row.problem,
                response=item.row.response,
                answer=item.row.answer,
                tests=item.row.tests,
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                source=item.row.source,
            )


def _render_rows(
    rows: Iterable[Row | RowFault],
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    config: DataConfig,
    report: DataReport,
    require_answer: bool,
) -> Iterator[_Rendered]:
    """Counts every row in ``report``, and yields the usable ones as text."""
    for row in rows:
        report.num_rows += 1
        if isinstance(row, RowFault):
            report.faults.append(row)
            continue
        if require_answer and row.answer is None and row.tests is None:
            report.faults.append(RowFault(source=row.source, reason=f'no "{config.data_answer_field}"'))
            continue
        messages = _complete_prompt(row.messages, config, row.tests)
        if chat_format.has_template:
            try:
                yield _render_chat(row, messages, tokenizer, chat_format)
            except (TemplateError, ValueError) as error:
                report.faults.append(
                    RowFault(
                        source=row.source,
                        reason="the chat template raises an error",
                        detail=first_line(error),
                    )
                )
        elif any(message["role"] == "assistant" for message in messages):
            report.faults.append(
                RowFault(source=row.source, reason="a chat of several turns needs a chat template")
            )
        else:
            yield _Rendered(
                row=row,
                prompt_text=_plain_prompt(messages),
                response_text=row.response,
                is_plain_ending=False,
            )


def _plain_prompt(messages: list[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages) + "\n"


def _opened(prompt_ids: list[int], chat_format: ChatFormat) -> list[int]:
    """Removes end-of-sequence from the end of a prompt. Some tokenizers append it to every text."""
    is_closed = not chat_format.has_template and prompt_ids and prompt_ids[-1] == chat_format.eos_id
    return prompt_ids[:-1] if is_closed else prompt_ids


def _complete_prompt(
    messages: list[Message], config: DataConfig, tests: CodeTests | None = None
) -> list[Message]:
    """Adds the suffix to the last user message, and the system prompt unless the row has one."""
    messages = [dict(message) for message in messages]
    last_user = next(message for message in reversed(messages) if message["role"] == "user")
    suffix = config.data_prompt_suffix
    if tests is not None:
        suffix = config.data_code_prompt_suffix
        name = tests.entry_point
        if suffix and name and name not in last_user["content"]:
            suffix += f" Name the function `{name}`."
    if not last_user["content"].endswith(suffix):
        last_user["content"] += suffix
    if config.data_system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.data_system_prompt})
    return messages


def _render_chat(
    row: Row, messages: list[Message], tokenizer: Tokenizer, chat_format: ChatFormat
) -> _Rendered:
    """Renders prompt and response by the chat template, the response without the template's closing text.

    A template may add text before a response, or strip white space from it. The model was trained on that form, so the
    rendered response is used. Some templates drop part of a response, such as its reasoning, or render a prompt
    differently when a response follows. The response of the row is then used unchanged.
    """
    prompt_text = chat_format.render(tokenizer, messages, is_prompt=True)
    answered = [*messages, {"role": "assistant", "content": row.response}]
    whole_text = chat_format.render(tokenizer, answered, is_prompt=False)
    if whole_text.startswith(prompt_text) and whole_text.endswith(chat_format.closing):
        body = whole_text[len(prompt_text) : len(whole_text) - len(chat_format.closing)]
        if row.response.strip() in body:
            return _Rendered(row=row, prompt_text=prompt_text, response_text=body, is_plain_ending=False)
    return _Rendered(row=row, prompt_text=prompt_text, response_text=row.response, is_plain_ending=True)


def _close(response_ids: list[int], chat_format: ChatFormat) -> str:
    """Makes ``response_ids`` end with exactly one end token, in place. Returns "", or the reason why it cannot."""
    ends = (chat_format.end_id, chat_format.eos_id)
    while response_ids and response_ids[-1] in ends:
        response_ids.pop()
    if not response_ids:
        return "the response has no tokens"
    if any(token in ends for token in response_ids):
        return "end-of-sequence inside the response"
    response_ids.append(chat_format.end_id)
    return ""


def _probe_closing(tokenizer: Tokenizer, chat_format: ChatFormat, config: DataConfig) -> str:
    """Returns the text after the response in a rendered conversation; "" if the response does not occur in it.

    Raises:
        ValueError: the template cannot render a question with its answer, or not with the configured system prompt.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = chat_format.render(tokenizer, messages, is_prompt=False)
    except (TemplateError, ValueError) as error:
        origin = (
            f"--data-chat-template {config.data_chat_template}" if chat_format.template else "the model's own"
        )
        raise ValueError(
            f"the chat template ({origin}) cannot render a question and its answer: {first_line(error)}. "
            "Give another template with --data-chat-template."
        ) from error
    if config.data_system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.data_system_prompt})
        try:
            chat_format.render(tokenizer, messages, is_prompt=False)
        except (TemplateError, ValueError) as error:
            raise ValueError(
                f"--data-system-prompt needs a chat template that accepts a system message, but this template raises: "
                f"{first_line(error)}. Remove the flag, or put the text into the problems."
            ) from error
    _, found, closing = text.rpartition(_PROBE)
    return closing if found else ""


def _tokenize(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]
