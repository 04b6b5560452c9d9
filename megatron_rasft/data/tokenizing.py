"""Turns rows into demonstrations: applies the chat template, tokenizes, and ends each response with one end token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chat_format import ChatFormat, ChatTemplateError, read_chat_format
from megatron_rasft.data.chats import Message
from megatron_rasft.data.reading import Row
from megatron_rasft.data.row_report import DataReport, RowFault
from megatron_rasft.data.teacher_prompt import teacher_messages
from megatron_rasft.data.tokenizer import Tokenizer, tokenize
from megatron_rasft.types import CodeTests, Demonstration

_BATCH_SIZE = 1024
"""Number of texts per call of the tokenizer. Fast tokenizers process the texts of a batch on all cores."""


@dataclass(kw_only=True, slots=True)
class _Rendered:
    row: Row
    prompt_text: str
    response_text: str
    teacher_text: str = ""
    """The teacher's prompt, for objectives with a teacher."""
    is_plain_ending: bool = False
    is_continued: bool = False
    """Whether the opening tag of the reasoning was removed from the response, because the prompt ends with it."""


def tokenize_prompts(problems: Sequence[str], tokenizer: Tokenizer, config: DataConfig) -> list[list[int]]:
    """Tokenizes problems into the prompts that their demonstrations would have.

    Raises:
        ValueError: the chat template cannot be used.
    """
    chat_format = read_chat_format(tokenizer, config)
    texts = []
    for problem in problems:
        messages = _complete_prompt([{"role": "user", "content": problem}], config)
        texts.append(_render_prompt(chat_format, tokenizer, messages))
    return _tokenize_prompts(texts, tokenizer, chat_format) if texts else []


def _render_prompt(chat_format: ChatFormat, tokenizer: Tokenizer, messages: list[Message]) -> str:
    """Renders a prompt by the chat template, or as plain text if there is none."""
    if not chat_format.has_template:
        return _plain_prompt(messages)
    try:
        return chat_format.render(tokenizer, messages, is_prompt=True)
    except ChatTemplateError as error:
        raise ValueError(
            f"the chat template ({chat_format.origin}) cannot render the problem {messages[-1]['content'][:60]!r}: {error}"
        ) from error


def collect_demonstrations(
    rows: Iterable[Row | RowFault], tokenizer: Tokenizer, config: DataConfig, max_tokens: int
) -> tuple[list[Demonstration], DataReport]:
    """Returns all demonstrations of ``tokenize_rows``, and their report."""
    report = DataReport()
    return list(tokenize_rows(rows, tokenizer, config, max_tokens, report)), report


def tokenize_rows(
    rows: Iterable[Row | RowFault],
    tokenizer: Tokenizer,
    config: DataConfig,
    max_tokens: int,
    report: DataReport,
    teacher_template: str | None = None,
) -> Iterator[Demonstration]:
    """Yields the demonstrations of ``rows`` one by one, and adds to ``report``, which is complete after the last one.

    Prompt and response are tokenized separately. Rollouts are sampled after ``prompt_ids``, so demonstrations and
    rollouts of a problem follow exactly the same tokens. ``response_ids`` ends with one end token.

    Args:
        rows: the output of ``read_rows``.
        tokenizer: a tokenizer of transformers; a fast one takes seconds for 10,000 rows.
        config: chat template and prompt.
        max_tokens: maximum number of tokens of prompt plus response.
        report: gets the rows that cannot be used, or have more tokens. They are left out.
        teacher_template: if given, rows whose teacher's prompt leaves no room for a response are left out too.

    Raises:
        ValueError: the chat template cannot be used.
    """
    chat_format = read_chat_format(tokenizer, config)
    for batch in batched(
        _render_rows(rows, tokenizer, chat_format, config, report, teacher_template), _BATCH_SIZE
    ):
        prompts = _tokenize_prompts([item.prompt_text for item in batch], tokenizer, chat_format)
        teachers: list[list[int]] = [[]] * len(batch)
        if teacher_template is not None:
            teachers = _tokenize_prompts([item.teacher_text for item in batch], tokenizer, chat_format)
        responses = tokenize(tokenizer, [item.response_text for item in batch], add_special_tokens=False)
        for item, prompt_ids, response_ids, teacher_ids in zip(
            batch, prompts, responses, teachers, strict=True
        ):
            reason = _close(response_ids, chat_format) if prompt_ids else "the prompt has no tokens"
            if reason:
                report.faults.append(RowFault(source=item.row.source, reason=reason))
                continue
            detail = f"prompt {len(prompt_ids)} + response {len(response_ids)}"
            num_tokens = len(prompt_ids) + len(response_ids)
            if len(teacher_ids) >= num_tokens:
                detail = f"teacher's prompt {len(teacher_ids)} + a response of at least 1"
                num_tokens = len(teacher_ids) + 1
            report.max_tokens_found = max(report.max_tokens_found, num_tokens)
            if num_tokens > max_tokens:
                report.overlong.append(
                    RowFault(
                        source=item.row.source,
                        reason=f"longer than {max_tokens} tokens",
                        detail=detail,
                    )
                )
                continue
            report.num_demonstrations += 1
            report.num_prompt_tokens += len(prompt_ids)
            report.num_response_tokens += len(response_ids)
            report.num_plain_endings += item.is_plain_ending
            report.num_continued += item.is_continued
            yield Demonstration(
                problem_id=item.row.problem_id,
                problem=item.row.problem,
                response=item.row.response,
                answer=item.row.answer,
                tests=item.row.tests,
                fields=item.row.fields,
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                source=item.row.source,
                teacher_prompt_ids=teacher_ids,
            )


def _tokenize_prompts(texts: list[str], tokenizer: Tokenizer, chat_format: ChatFormat) -> list[list[int]]:
    """Tokenizes rendered prompts, without an end token after them."""
    # A chat template writes all special tokens itself. Without one the tokenizer adds its own.
    prompts = tokenize(tokenizer, texts, add_special_tokens=not chat_format.has_template)
    return [_opened(ids, chat_format) for ids in prompts]


def _render_rows(
    rows: Iterable[Row | RowFault],
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    config: DataConfig,
    report: DataReport,
    teacher_template: str | None,
) -> Iterator[_Rendered]:
    """Counts every row in ``report``, and yields the usable ones as text."""
    shown: dict[tuple[str, ...], bool] = {}
    end_texts = [tokenizer.decode([i]) for i in (chat_format.end_id, chat_format.eos_id) if i is not None]
    for row in rows:
        report.num_rows += 1
        if isinstance(row, RowFault):
            report.faults.append(row)
            continue
        messages = _complete_prompt(row.messages, config, row.tests)
        rendered = (
            _render_chat(row, messages, tokenizer, chat_format, shown)
            if chat_format.has_template
            else _render_plain(row, messages)
        )
        if isinstance(rendered, RowFault):
            report.faults.append(rendered)
            continue
        if teacher_template is not None:
            asked = teacher_messages(messages, row.response, teacher_template, end_texts)
            rendered.teacher_text = _render_prompt(chat_format, tokenizer, asked)
        yield rendered


def _render_plain(row: Row, messages: list[Message]) -> _Rendered | RowFault:
    if any(message["role"] == "assistant" for message in messages):
        return RowFault(source=row.source, reason="a chat of several turns needs a chat template")
    return _Rendered(row=row, prompt_text=_plain_prompt(messages), response_text=row.response)


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
        suffix = code_suffix(last_user["content"], tests.entry_point, config.data_code_prompt_suffix)
    if not last_user["content"].endswith(suffix):
        last_user["content"] += suffix
    if config.data_system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.data_system_prompt})
    return messages


def code_suffix(problem: str, entry_point: str, suffix: str) -> str:
    """Returns what --data-code-prompt-suffix appends to a problem with tests: the suffix, and the name that the tests call."""
    if suffix and entry_point and entry_point not in problem:
        return f"{suffix} Name the function `{entry_point}`."
    return suffix


def _render_chat(
    row: Row,
    messages: list[Message],
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    shown: dict[tuple[str, ...], bool],
) -> _Rendered | RowFault:
    """Renders prompt and response by the chat template, the response without the template's closing text.

    A template may add text before a response, or strip white space from it. The model was trained on that form, so the
    rendered response is used. Some templates drop part of a response, such as its reasoning, or render a prompt
    differently when a response follows. The response of the row is then used unchanged. If the prompt ends in an open block
    of reasoning, as with DeepSeek-R1's and Qwen3-Thinking's templates, the response does not open it again.

    Args:
        shown: roles of a chat -> whether the template shows its problem; filled here.
    """
    roles = tuple(message["role"] for message in messages)
    answered = [*messages, {"role": "assistant", "content": row.response}]
    try:
        if roles not in shown:
            shown[roles] = chat_format.shows_problem(tokenizer, roles)
        prompt_text = chat_format.render(tokenizer, messages, is_prompt=True)
        whole_text = chat_format.render(tokenizer, answered, is_prompt=False)
    except ChatTemplateError as error:
        return RowFault(source=row.source, reason="the chat template raises an error", detail=str(error))
    if not shown[roles]:
        return RowFault(
            source=row.source, reason="the chat template does not show the problem", detail=", ".join(roles)
        )
    reasoning = chat_format.reasoning
    response = row.response if reasoning is None else reasoning.continued(row.response)
    rendered = _Rendered(
        row=row,
        prompt_text=prompt_text,
        response_text=response,
        is_plain_ending=True,
        is_continued=response != row.response,
    )
    if whole_text.startswith(prompt_text) and whole_text.endswith(chat_format.closing):
        body = whole_text[len(prompt_text) : len(whole_text) - len(chat_format.closing)]
        if response.strip() in body:
            rendered.response_text, rendered.is_plain_ending = body, False
    reason = "" if reasoning is None else reasoning.fault(rendered.response_text)
    return RowFault(source=row.source, reason=reason) if reason else rendered


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
