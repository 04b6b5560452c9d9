"""Rows -> demonstrations: chat template, token ids, and exactly one end-of-sequence."""

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
"""Texts per call of the fast tokenizer, which works through a batch on all cores."""

_TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3's templates write today's date into the prompt unless they are given one: a run resumed tomorrow
must see the same tokens. This is the date those templates fall back to; others ignore it."""

_PROBE = "\u2020probe\u2020"
"""A response no template knows, to see what a template puts behind a response."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

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
    """How one model writes a conversation; made by ``read_chat_format``."""

    template: str | None
    """Jinja source given by flag; None is the tokenizer's own, if it has one."""
    has_template: bool
    closing: str
    """What the template puts behind the response; "" if it puts nothing."""
    end_id: int
    """Ends a response and a rollout: the template's end-of-turn token, else end-of-sequence."""
    eos_id: int | None

    def render(self, tokenizer: Tokenizer, messages: list[Message], is_prompt: bool) -> str:
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
    """The tokenizer of a model folder on this machine.

    Raises:
        ModelFolderError: transformers finds none that it can load.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"model folder {folder} has no tokenizer that transformers can load ({first_line(error)}). "
            "Copy tokenizer.json and tokenizer_config.json into it."
        ) from error
    return tokenizer


def end_ids(folder: str | Path, tokenizer: Tokenizer) -> set[int]:
    """Token ids that end a response by the word of the model's generation_config.json and tokenizer."""
    path = Path(folder) / "generation_config.json"
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    values = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return {value for value in values if value is not None}


def read_chat_format(tokenizer: Tokenizer, config: DataConfig) -> ChatFormat:
    """Find the template of ``config`` or ``tokenizer`` and what it puts behind a response."""
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
            "the tokenizer has no end-of-sequence token and the chat template closes a response with none, "
            "so a response could not end. Set eos_token in the model's tokenizer_config.json or give "
            "--data-chat-template."
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
    """Tokenise rows; refuse, skip or drop as ``config`` says.

    Prompt and response are tokenised apart: ``prompt_ids`` is what a rollout server is given, so an expert
    and a rolled-out response follow the very same tokens. ``response_ids`` ends with one end-of-sequence
    token.

    Args:
        rows: of ``read_rows``.
        tokenizer: of transformers; a fast one takes seconds for 10,000 rows.
        config: template, prompt and what to refuse.
        max_tokens: most tokens of prompt and response together.
        require_answer: as for ``read_rows``.

    Raises:
        DataError: ``config`` refuses what was found, or no row is left.
        ValueError: the chat template cannot be used.
    """
    demonstrations, report = collect_demonstrations(rows, tokenizer, config, max_tokens, require_answer)
    report.check(config)
    return demonstrations, report


def tokenize_prompts(problems: Sequence[str], tokenizer: Tokenizer, config: DataConfig) -> list[list[int]]:
    """Token ids of the prompts that demonstrations of these problems would have.

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
    """As ``build_demonstrations``, but whatever was found is only reported."""
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
    """``collect_demonstrations`` one by one; ``report`` is complete when the last was taken."""
    chat_format = read_chat_format(tokenizer, config)
    for batch in batched(
        _render_rows(rows, tokenizer, chat_format, config, report, require_answer), _BATCH_SIZE
    ):
        # A template writes every special token itself; plain text leaves them to the tokenizer.
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
    """Count every row in ``report`` and write the usable ones as text."""
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
                        source=row.source, reason="the chat template refuses it", detail=first_line(error)
                    )
                )
        elif any(message["role"] == "assistant" for message in messages):
            report.faults.append(RowFault(source=row.source, reason="several turns need a chat template"))
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
    """The prompt without end-of-sequence: some tokenizers close whatever they are given."""
    is_closed = not chat_format.has_template and prompt_ids and prompt_ids[-1] == chat_format.eos_id
    return prompt_ids[:-1] if is_closed else prompt_ids


def _complete_prompt(
    messages: list[Message], config: DataConfig, tests: CodeTests | None = None
) -> list[Message]:
    """Add the system prompt, unless the row has one, and the suffix of the last user message."""
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
    """Prompt as the template opens it; response as the template continues it, without its closing.

    A template may begin a response with tokens of its own or trim it, and those versions are what the model
    knows. But one that drops part of the response (its reasoning, say) or renders the prompt differently once
    it is answered would train on something else: there the response is taken as it stands.
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
    """End ``response_ids`` with the end token, once, in place; or return why that cannot be."""
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
    """Text behind the response in a rendered conversation; "" if the template does not show the response."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = chat_format.render(tokenizer, messages, is_prompt=False)
    except (TemplateError, ValueError) as error:
        origin = (
            f"--data-chat-template {config.data_chat_template}" if chat_format.template else "the model's own"
        )
        raise ValueError(
            f"the chat template ({origin}) cannot render a question and its answer: {first_line(error)}. "
            "Give another with --data-chat-template."
        ) from error
    if config.data_system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.data_system_prompt})
        try:
            chat_format.render(tokenizer, messages, is_prompt=False)
        except (TemplateError, ValueError) as error:
            raise ValueError(
                f"--data-system-prompt needs a chat template that takes a system message, this one refuses: "
                f"{first_line(error)}. Leave the flag out, or put the text into the problems."
            ) from error
    _, found, closing = text.rpartition(_PROBE)
    return closing if found else ""


def _tokenize(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]
