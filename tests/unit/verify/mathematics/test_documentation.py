"""The examples of docs/verification.md are true. The page explains their notation."""

import re
from pathlib import Path

from megatron_rasft.verify.mathematics.answer_extraction import extract_answer
from megatron_rasft.verify.mathematics.answer_grading import grade_answer

PAGE = Path(__file__).parents[4] / "docs" / "verification.md"
COMMITMENT = re.compile(r"`([^`]+)`\s→\s(?:`([^`]+)`|nothing)")
COMPARISONS = re.compile(r"`([^`\n]+)`((?: [=≠] `[^`\n]+`)+)")
COMPARISON = re.compile(r" ([=≠]) `([^`]+)`")


def test_each_response_commits_to_the_answer_beside_it() -> None:
    examples = COMMITMENT.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) > 50
    found = {response: (extract_answer(response), answer or None) for response, answer in examples}
    assert {response: pair for response, pair in found.items() if pair[0] != pair[1]} == {}


def test_each_answer_equals_the_gold_answer_or_not() -> None:
    examples = [
        (gold, sign, answer)
        for gold, others in COMPARISONS.findall(PAGE.read_text(encoding="utf-8"))
        for sign, answer in COMPARISON.findall(others)
    ]
    assert len(examples) > 120
    graded = {
        (gold, sign, answer): grade_answer(f"So the result is $\\boxed{{{answer}}}$.", gold)
        for gold, sign, answer in examples
    }
    wrong = {
        example: grade for example, grade in graded.items() if (grade[0] == "correct") != (example[1] == "=")
    }
    assert wrong == {}
