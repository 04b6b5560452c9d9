"""Blocks of reasoning are the same for answers, programs and chat templates: they read the tags by one module."""

import time

import pytest

from megatron_rasft.reasoning_tags import closing_tag, is_reasoning_tag, open_tag, without_reasoning
from megatron_rasft.verify.mathematics.answer_extraction import extract_answer
from megatron_rasft.verify.programs.program_extraction import extract_program

TAGS = [
    ("<think>", "</think>"),
    ("<Thinking>", "</Thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
    ("<seed:think>", "</seed:think>"),
    ("<my-thoughts>", "</my-thoughts>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
]
FENCE = "```"
NAMES_THE_TAG = f"{FENCE}python\ndef f(s):\n    # a <think> tag\n    return s\n{FENCE}"

TAGS_ON_LINES = f'{FENCE}python\nT = """\n<think>\n</think>\n"""\ndef f(s):\n    return s + T\n{FENCE}'


@pytest.mark.parametrize(("start", "end"), TAGS)
def test_block_of_reasoning_holds_no_answer_and_no_program(start: str, end: str) -> None:
    assert is_reasoning_tag(start) and is_reasoning_tag(end) and closing_tag(start) == end
    assert extract_answer(rf"{start}So \boxed{{3}}.{end}The answer is 4.") == "4"
    assert extract_answer(rf"So \boxed{{3}}.{end}I do not know.") is None, "the prompt opened the block"
    assert extract_answer(rf"{start}So \boxed{{3}}.") is None
    draft, final = (f"{FENCE}python\ndef f(): return {n}\n{FENCE}" for n in (3, 4))
    assert extract_program(f"{start}{draft}{end}\n{final}", "f") == "def f(): return 4\n"
    assert extract_program(f"So {draft}{end}Sorry.", "f") == "Sorry."
    assert extract_program(f"{start}{draft}", "f") is None


def test_program_keeps_tags_on_lines_of_their_own() -> None:
    program = extract_program(TAGS_ON_LINES, "f")
    assert program is not None and "<think>\n</think>" in program and "return s + T" in program


@pytest.mark.parametrize("text", ["", "<tool>", "think", "a <think>", "<|im_end|>", "<think> 5", "[think]"])
def test_other_texts_are_not_tags(text: str) -> None:
    assert not is_reasoning_tag(text)


@pytest.mark.parametrize(
    ("text", "reply", "tag"),
    [
        ("5", "5", ""),
        ("a<think>b</think>c<think>d</think>e", "ace", ""),
        ("a</think>b</think>c", "c", ""),
        ("<think>a<think>b</think>c</think>d", "d", ""),
        ("<think>a<analysis>b</analysis>c", "", "<think>"),
        ("<think>a</thinking>b", "", "<think>"),
        ("a<think>b", "a", "<think>"),
        ("I close it with `</think>`.\nc</think>d", "d", ""),
        ("<think>re.sub(r'<think>.*?</think>', '', s)\nc</think>d", "d", ""),
        ("<think>don't</think>It's 5", "It's 5", ""),
        ("<think>so `5`</think>`5`", "`5`", ""),
        (f"<think>{FENCE}a</think>\nb", "\nb", ""),
        (f"<think>{FENCE}a</think>b<think>c</think>d", "bd", ""),
        (f"{FENCE}\na\n</think>\nb", "\nb", ""),
        (NAMES_THE_TAG, NAMES_THE_TAG, ""),
        (TAGS_ON_LINES, TAGS_ON_LINES, ""),
        (f"a</think>{TAGS_ON_LINES}", TAGS_ON_LINES, ""),
        (f"{FENCE}\na\n</think>\n{NAMES_THE_TAG}", f"\n{NAMES_THE_TAG}", ""),
        ('<think>it is "5."</think> So "7".', ' So "7".', ""),
        ('<think>it is "5".</think>"7"', '"7"', ""),
        ('<think>"5" and "</think>" too</think>7', "7", ""),
        ('it is "5."</think>"7"', '"7"', ""),
        ("""<think>the sides' sum is "5."</think>"7\"""", '"7"', ""),
        ("""<think>f("a", '</think>')</think>7""", "7", ""),
        ("s.split('</think>')[-1]", "s.split('</think>')[-1]", ""),
    ],
)
def test_reply_is_the_text_outside_of_blocks(text: str, reply: str, tag: str) -> None:
    assert without_reasoning(text) == reply
    assert open_tag(text) == tag


def test_text_of_nothing_but_tags_takes_linear_time() -> None:
    began = time.process_time()
    for part in (
        "<think>",
        "</think>",
        "<think></think>",
        "<think",
        "[THINK",
        "'<think>",
        f"{FENCE}<think>",
        '"</think>',
    ):
        without_reasoning(part * 50_000)
    assert time.process_time() - began < 10
