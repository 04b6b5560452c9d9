from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chat_format import read_chat_format
from megatron_rasft.data.reading import Row, read_rows
from megatron_rasft.data.row_report import DataReport, RowFault
from megatron_rasft.data.tokenizing import collect_demonstrations, tokenize_prompts
from megatron_rasft.errors import DataError
from megatron_rasft.types import CodeTests, Demonstration

NO_SUFFIX = DataConfig(data_prompt_suffix="")
LLAMA_LIKE = (
    "{{ '<|im_start|>' }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDS_WITH_EOS = "{% for m in messages %}{{ m.content }}{{ '<|endoftext|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = ("<think>", "</think>")
NO_SYSTEM_SHOWN = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
SHOWS_FIRST = "{{ messages[0].content }}<|im_end|>"
NEEDS_TOOLS = "{% for t in tools %}{{ t }}{% endfor %}" + LLAMA_LIKE
FAILS_ON_A_NUMBER = "{% if '3' in messages[-1].content %}{{ 1 / 0 }}{% endif %}" + LLAMA_LIKE
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA_LIKE
)


def make_row(
    problem: str = "1+1?", response: str = "It is \\boxed{2}.", number: int = 1, **values: Any
) -> Row:
    messages = [{"role": "user", "content": problem}]
    fields = {"problem": problem, "response": response, "answer": "2", "messages": messages, **values}
    return Row(problem_id=f"p{number}", source=f"a.jsonl:{number}", **fields)


def build(
    tokenizer: Any,
    *rows: Row | RowFault,
    config: DataConfig = NO_SUFFIX,
    max_tokens: int = 4096,
) -> tuple[list[Demonstration], DataReport]:
    demonstrations, report = collect_demonstrations(rows, tokenizer, config, max_tokens)
    report.check(config)
    return demonstrations, report


def spell(tokenizer: Any, demonstration: Demonstration) -> tuple[str, str]:
    return tokenizer.decode(demonstration.prompt_ids), tokenizer.decode(demonstration.response_ids)


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        (None, "1+1?\n", "It is \\boxed{2}.<|endoftext|>"),
        (WITHOUT_END, "user: 1+1?\nassistant: ", "It is \\boxed{2}.<|endoftext|>"),
        (ENDS_WITH_EOS, "1+1?\n", "It is \\boxed{2}.<|endoftext|>"),
        (LLAMA_LIKE, "<|im_start|>[user] 1+1?<|im_end|>[assistant] ", "It is \\boxed{2}.<|im_end|>"),
        (
            DROPS_REASONING,
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            "It is \\boxed{2}.<|im_end|>",
        ),
    ],
)
def test_the_response_ends_with_the_templates_end_token(
    make_tokenizer: Callable, template: str | None, prompt: str, response: str
) -> None:
    tokenizer = make_tokenizer(template)
    (demonstration,), _ = build(tokenizer, make_row())
    assert spell(tokenizer, demonstration) == (prompt, response)


def test_the_prompt_has_the_tokens_that_the_template_gives_a_server(tokenizer: Any) -> None:
    row = make_row("Größe? 数学 🙂")
    (demonstration,), _ = build(tokenizer, row)
    encoded = tokenizer.apply_chat_template(row.messages, tokenize=True, add_generation_prompt=True)
    assert demonstration.prompt_ids == encoded["input_ids"]
    body, end = demonstration.response_ids[:-1], demonstration.response_ids[-1]
    assert body == tokenizer(row.response, add_special_tokens=False)["input_ids"]
    assert (
        end == tokenizer.convert_tokens_to_ids("<|im_end|>") == read_chat_format(tokenizer, NO_SUFFIX).end_id
    )


# As in DeepSeek-R1-Distill: the prompt opens the reasoning, and an answer's reasoning is dropped.
@pytest.mark.parametrize(
    ("tags", "lead", "response", "trained"),
    [
        (THINK, "\n", "<think>\nso\n</think>\n\nTwo.", "so\n</think>\n\nTwo."),
        (THINK, "\n", "\n<think>so</think>Two.", "so</think>Two."),
        (THINK, "", "<think>\nso</think>Two.", "\nso</think>Two."),
        (THINK, "\n", "so</think>Two.", "so</think>Two."),
        (THINK, "\nOkay,", "<think>\nOkay, so</think>Two.", " so</think>Two."),
        (("<thinking>", "</thinking>"), "\n", "<thinking>\nso</thinking>Two.", "so</thinking>Two."),
        (("<seed:think>", "</seed:think>"), "", "<seed:think>so</seed:think>2", "so</seed:think>2"),
        (("[THINK]", "[/THINK]"), "", "[THINK]so[/THINK]Two.", "so[/THINK]Two."),
        (("<|begin_of_thought|>", "<|end_of_thought|>"), "\n", "<|begin_of_thought|>\nso<|end_of_thought|>2", "so<|end_of_thought|>2"),
        (THINK, "\n", "It is \\boxed{2}.", None),
        (THINK, "\n", "<think>\ncut off", None),
        (THINK, "\n", "<think>so</think>Two.<think>again", None),
        (THINK, "\n", "Well: <think>so</think>Two.", None),
        (THINK, "\n", "<think><think>so</think>Two.", None),
    ],
)  # fmt: skip
def test_reasoning_that_the_prompt_opens_is_not_opened_twice_and_must_be_closed(
    make_tokenizer: Callable, tags: tuple[str, str], lead: str, response: str, trained: str | None
) -> None:
    opens = DROPS_REASONING.replace("</think>", tags[1]).replace(
        "assistant\n{% endif", "assistant\n{{ '" + tags[0] + lead.replace("\n", "\\n") + "' }}{% endif"
    )
    tokenizer = make_tokenizer(opens)
    skip = DataConfig(data_prompt_suffix="", data_bad_rows="skip")
    filler = make_row(response=f"x{tags[1]}y", number=2)
    demonstrations, report = build(tokenizer, make_row(response=response), filler, config=skip)
    if trained is None:
        assert [fault.source for fault in report.faults] == ["a.jsonl:1"]
        assert tags[0] in report.faults[0].reason and not report.num_continued
        return
    prompt, made = spell(tokenizer, demonstrations[0])
    assert prompt.endswith(tags[0] + lead) and made == trained + "<|im_end|>"
    assert report.num_continued == (response.lstrip().startswith(tags[0]))


def test_reasoning_that_the_template_completes_keeps_the_templates_form(make_tokenizer: Callable) -> None:
    """Qwen3-Thinking's template writes the reasoning of the last answer itself, an empty one if there is none."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set parts = m.content.split('</think>') %}<think>\n"
        "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n"
        "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    rows = [make_row(response="<think>\nso\n</think>\n\nTwo."), make_row(response="Two.", number=2)]
    responses = [spell(tokenizer, d)[1] for d in build(tokenizer, *rows)[0]]
    assert responses == ["so\n</think>\n\nTwo.<|im_end|>", "\n</think>\n\nTwo.<|im_end|>"]


@pytest.mark.parametrize("opening", ["<think>\n\n</think>\n\n", "<answer>\n", "<|assistant|>"])
def test_a_prompt_that_leaves_no_reasoning_open_takes_any_response(
    make_tokenizer: Callable, opening: str
) -> None:
    tokenizer = make_tokenizer(
        DROPS_REASONING.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif")
    )
    (demonstration,), _ = build(tokenizer, make_row(problem="What is <think>?", response="<think>a</think>b"))
    assert spell(tokenizer, demonstration)[1] == "<think>a</think>b<|im_end|>"


@pytest.mark.parametrize(
    "ending", ["<|im_end|>", "<|im_end|><|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>"]
)
def test_the_end_token_is_never_repeated(tokenizer: Any, ending: str) -> None:
    (demonstration,), _ = build(tokenizer, make_row(response="Two." + ending))
    assert spell(tokenizer, demonstration)[1] == "Two.<|im_end|>"


def test_reasoning_that_a_template_drops_is_trained_on(make_tokenizer: Callable) -> None:
    tokenizer = make_tokenizer(DROPS_REASONING)
    (demonstration,), report = build(tokenizer, make_row(response="<think>so</think>Two."))
    assert spell(tokenizer, demonstration)[1] == "<think>so</think>Two.<|im_end|>"
    assert report.num_plain_endings == 1


def test_prompts_for_programs_have_their_own_suffix_with_the_functions_name(tokenizer: Any) -> None:
    config = DataConfig(data_code_prompt_suffix="\nIn Python.")
    tests = CodeTests(style="asserts", tests=("assert f(1) == 1",), entry_point="square")
    rows = [
        make_row("Square it.", answer=None, tests=tests),
        make_row("Write square(x).", answer=None, tests=tests, number=2),
        make_row("1+1?", number=3),
    ]
    demonstrations, _ = build(tokenizer, *rows, config=config)
    prompts = [spell(tokenizer, d)[0] for d in demonstrations]
    assert "Square it.\nIn Python. Name the function `square`.<" in prompts[0]
    assert "Write square(x).\nIn Python.<" in prompts[1]
    assert "1+1?" + config.data_prompt_suffix in prompts[2]
    assert [d.check for d in demonstrations] == [tests, tests, "2"]


def test_suffix_and_system_prompt_are_added_once(tokenizer: Any) -> None:
    config = DataConfig(data_prompt_suffix="\nThink.", data_system_prompt="Be brief.")
    chat = [
        {"role": "system", "content": "Own."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1+1?\nThink."},
    ]
    plain, talk = build(tokenizer, make_row(), make_row(messages=chat, number=2), config=config)[0]
    assert spell(tokenizer, plain)[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?\nThink.<|im_end|>\n<|im_start|>assistant\n"
    )
    text = spell(tokenizer, talk)[0]
    assert text.count("Think.") == 1 and "Own." in text and "Be brief." not in text
    assert plain.problem == "1+1?", "the problem has no suffix"


def test_the_template_of_the_flag_replaces_the_models_own(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(WITHOUT_END)
    config = DataConfig(data_prompt_suffix="", data_chat_template=str(file))
    (demonstration,), _ = build(tokenizer, make_row(), config=config)
    assert spell(tokenizer, demonstration) == ("user: 1+1?\nassistant: ", "It is \\boxed{2}.<|endoftext|>")


def test_an_end_token_that_the_tokenizer_appends_to_the_prompt_is_removed(make_tokenizer: Callable) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(None)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=ids
    )
    (demonstration,), _ = build(tokenizer, make_row())
    assert spell(tokenizer, demonstration) == ("<|im_start|>1+1?\n", "It is \\boxed{2}.<|endoftext|>")


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (LLAMA_LIKE, make_row(response="a<|im_end|>b"), "inside the response"),
        (LLAMA_LIKE, make_row(response="<|im_end|>"), "no tokens"),
        (
            NO_SYSTEM,
            make_row(messages=[{"role": r, "content": "x"} for r in ("system", "user")]),
            "chat template",
        ),
        (
            None,
            make_row(messages=[{"role": r, "content": "x"} for r in ("user", "assistant", "user")]),
            "chat template",
        ),
        (
            SHOWS_FIRST,
            make_row(messages=[{"role": r, "content": "x"} for r in ("user", "assistant", "user")]),
            "does not show the problem",
        ),
        (
            SHOWS_FIRST,
            make_row(messages=[{"role": r, "content": "x"} for r in ("system", "user")]),
            "does not show the problem",
        ),
        (FAILS_ON_A_NUMBER, make_row("3?"), "chat template raises"),
    ],
)
def test_a_row_that_cannot_be_tokenized_is_a_fault(
    make_tokenizer: Callable, template: str, row: Row, reason: str
) -> None:
    skip = DataConfig(data_prompt_suffix="", data_bad_rows="skip")
    tokenizer = make_tokenizer(template)
    demonstrations, report = build(tokenizer, row, make_row(number=2), config=skip)
    assert [demonstration.problem_id for demonstration in demonstrations] == ["p2"]
    ((found, num),) = report.num_faults_by_reason.items()
    assert reason in found and num == 1
    assert (report.num_rows, report.num_demonstrations) == (2, 1)
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        build(tokenizer, row, make_row(number=2))


def test_a_missing_answer_is_allowed_without_rollouts(tokenizer: Any) -> None:
    assert build(tokenizer, make_row(answer=None))[0][0].answer is None


def test_faults_of_reading_and_tokenizing_are_refused_together(tokenizer: Any) -> None:
    fault = RowFault(source="a.jsonl:7", reason="not JSON")
    with pytest.raises(DataError, match="2 of 3 rows") as error:
        build(tokenizer, fault, make_row(response="<|im_end|>"), make_row(number=2))
    assert "a.jsonl:7: not JSON" in str(error.value) and "a.jsonl:1: the response" in str(error.value)


def test_an_overlong_row_is_dropped_or_refused_but_not_truncated(tokenizer: Any) -> None:
    short, long = make_row(), make_row(response="word " * 50, number=2)
    whole = build(tokenizer, short, long)[0]
    limit = len(whole[1].prompt_ids) + len(whole[1].response_ids)
    assert len(build(tokenizer, short, long, max_tokens=limit)[0]) == 2
    kept, report = build(tokenizer, short, long, max_tokens=limit - 1)
    assert kept == whole[:1]
    assert [row.source for row in report.overlong] == ["a.jsonl:2"]
    assert report.max_tokens_found == limit
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        refuse = DataConfig(data_prompt_suffix="", data_overlong="refuse")
        build(tokenizer, short, long, config=refuse, max_tokens=limit - 1)


def test_a_data_set_without_usable_rows_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="--seq-length"):
        build(tokenizer, make_row(), max_tokens=3)


@pytest.mark.parametrize(
    ("template", "eos_token", "values", "message"),
    [
        (None, None, {}, "eos_token"),
        (WITHOUT_END, None, {}, "eos_token"),
        ("{{ raise_exception('broken') }}", "<|endoftext|>", {}, "broken"),
        ("{% for %}", "<|endoftext|>", {}, "--data-chat-template"),
        (NO_SYSTEM, "<|endoftext|>", {"data_system_prompt": "x"}, "--data-system-prompt"),
        (SHOWS_FIRST, "<|endoftext|>", {"data_system_prompt": "x"}, "--data-system-prompt"),
        (NO_SYSTEM_SHOWN, "<|endoftext|>", {"data_system_prompt": "x"}, "--data-system-prompt"),
        (NEEDS_TOOLS, "<|endoftext|>", {}, "the model's own.*TypeError"),
        ("{{ 1 // 0 }}", "<|endoftext|>", {}, "the model's own.*ZeroDivisionError"),
        ("{% if add_generation_prompt %}{{ x.y.z }}{% endif %}", "<|endoftext|>", {}, "the model's own"),
        ("Hello", "<|endoftext|>", {}, "the model's own.*problem"),
        ("{{ messages[0].text }}", "<|endoftext|>", {}, "the model's own.*problem"),
    ],
)
def test_an_unusable_template_is_refused(
    make_tokenizer: Callable, template: str | None, eos_token: str | None, values: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(make_tokenizer(template, eos_token), make_row(), config=DataConfig(**values))


@pytest.mark.parametrize(
    ("dated", "date"),
    [
        ("{{ strftime_now('%Y-%m-%d %H') }}", "2024-07-26 00"),
        (
            "{% if date_string is not defined %}{{ strftime_now('%d %b %Y') }}{% else %}{{ date_string }}{% endif %}",
            "26 Jul 2024",
        ),
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_date_every_day(
    make_tokenizer: Callable, dated: str, date: str
) -> None:
    tokenizer = make_tokenizer(dated + LLAMA_LIKE)
    (demonstration,), _ = build(tokenizer, make_row())
    assert spell(tokenizer, demonstration)[0].startswith(date + "<|im_start|>")
    (prompt,) = tokenize_prompts(["1+1?"], tokenizer, NO_SUFFIX)
    assert prompt == demonstration.prompt_ids


def test_a_template_file_that_cannot_be_read_is_named(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"--data-chat-template .*chat\.jinja"):
        build(tokenizer, make_row(), config=DataConfig(data_chat_template=str(file)))


def test_a_question_that_the_template_refuses_is_named(make_tokenizer: Callable) -> None:
    with pytest.raises(ValueError, match=r"3\?.*ZeroDivisionError"):
        tokenize_prompts(["1?", "3?"], make_tokenizer(FAILS_ON_A_NUMBER), NO_SUFFIX)


def test_tokens_of_real_rows_decode_to_their_text(data_folder: Path, tokenizer: Any) -> None:
    files = [str(data_folder / "train" / f"{name}_train.jsonl.gz") for name in ("gsm8k", "math")]
    config = DataConfig(train_data=files, data_bad_rows="skip")
    demonstrations, report = collect_demonstrations(read_rows(config), tokenizer, config, 100_000)
    assert (len(demonstrations), len(report.faults), report.num_plain_endings) == (7473 + 7498, 2, 0)
    for demonstration in demonstrations[::97]:
        prompt, response = spell(tokenizer, demonstration)
        assert response == demonstration.response + "<|im_end|>"
        assert demonstration.problem + config.data_prompt_suffix in prompt
