"""The answer of a long response is found in linear time: evaluation extracts it in the main process, without a deadline."""

import time

import pytest

from megatron_rasft.verify.mathematics.answer_extraction import extract_answers

NUM_CHARS = 20_000
REPEATED = [
    *("\n", " ", "$", "(", ")", ",", ".", "?", "*", "#", "{", "}", "1", "x", "\\", "%", "。", "- "),
    *("1,", "1/", "1.", "1,000", "<think>", "</think>", "<answer>", "\\boxed{", "\\boxed{5} or ", "\\boxed{5}, x = ", "\\text{"),
    *("wait, ", "hmm, ", ". oh, ", ". no but ", "not ", "answer is ", "the answer is not ", "option A is ", "答案", "x = "),
    *("(a) ", "(a) \\boxed{5} ", "part 1: ", "1. $", "3, ", "(3, ", "I do not ", "$x", "\\sqrt{", "\\frac{1}", "is not "),
]  # fmt: skip


@pytest.mark.parametrize("frame", ["{}", "\\boxed{{5}}{}", "{}\\boxed{{5}}", "The answer is 5{}", "5{}"])
def test_repeated_text_takes_linear_time(frame: str) -> None:
    """A quadratic expression needs seconds for one of these texts, all of them together need half a second."""
    start = time.process_time()
    for part in REPEATED:
        extract_answers(frame.format(part * (NUM_CHARS // len(part))), num_values=2)
        assert time.process_time() - start < 5, part


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("Final answer:\n- \\boxed{5}", ["5"]),
        ("Final answer:\n-\\boxed{5}", ["-5"]),
        ("It is $-\\boxed{5}$.", ["-5"]),
        ("x = - \\boxed{5}", ["-5"]),
    ],
)
def test_minus_before_a_box_is_a_sign_unless_it_begins_an_item(text: str, answers: list[str]) -> None:
    assert extract_answers(text) == answers
