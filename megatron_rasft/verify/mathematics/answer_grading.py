"""Compares the answer of a response with the gold answer. Runs in the pool's workers only.

README.md shows the steps, and docs/verification.md has the rules.

Nothing here has a deadline of its own: signal alarms do not interrupt C code, and would replace the worker's own alarm. The pool
kills the worker at the deadline instead.
"""

import re

from megatron_rasft.types import Verdict
from megatron_rasft.verify.mathematics.answer_extraction import extract_answers
from megatron_rasft.verify.mathematics.comparison import is_rounded_to, normal_words, values_match
from megatron_rasft.verify.mathematics.notation import TEXT_WRAPPER, plain_words, tidy
from megatron_rasft.verify.mathematics.values import (
    Collection,
    Unreadable,
    Value,
    Words,
    is_approximate,
    is_words,
    read_answer,
)

# The longest gold answer of the known sets has 210 characters
_MAX_ANSWER_CHARS = 2000

_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*[.:]?")
_GOLD_CHOICE_WITH_TEXT = re.compile(r"\(([A-J])\)(?:[\s~]+|(?=\\))(.+)", re.DOTALL)
# In a+b the small letter is a variable. Alone or before a mark it may be an option
_NAMES_OPTION = re.compile(
    r"\([A-J]\)|^[A-J]\s*(?:[.:)]|$)|(?-i:^[A-J])[\s=]|\b(?:option|choice)\b", re.IGNORECASE
)
_CHOICES = re.compile(r"\(?([A-J])\)?(?:\s*(?:,|;|and|&|\s)\s*\(?([A-J])\)?)+|[A-J]{2,5}")
_OPTION = re.compile(r"(?:\(([A-J])\)|(?<![A-Za-z\\])([A-J])(?=[.:)]|$))")
_OPTION_WORD = re.compile(r"^(?:the )?(?:correct )?(?:option|choice|answer)s?(?: is)?\s*:?\s*", re.IGNORECASE)
_IS_RIGHT = re.compile(r" is (?:the )?(?:correct|right|true)(?: answer| option| choice)?\.?$")
_ALTERNATIVE = re.compile(r"\b(?:or|either|and|maybe|not)\b", re.IGNORECASE)


def grade_answer(response_text: str, gold: str, rel_tolerance: float = 0.0) -> tuple[Verdict, str]:
    """Compares the answer of a response with the gold answer.

    On hostile input it may run for ever and use any amount of memory, so call it in a ``VerifierPool``.

    Args:
        response_text: the response; ``extract_answers`` finds its answer.
        gold: the gold answer in LaTeX or plain text, without a box.
        rel_tolerance: relative difference up to which two plain numbers are equal; 0 requires equality.

    Returns:
        ``correct``, ``wrong`` or ``unverifiable`` (never ``timeout``) and a short reason.
    """
    if not gold.strip():
        return "unverifiable", "no gold answer"
    gold_value = read_answer(gold)
    answers = extract_answers(response_text, _num_values(gold_value))
    if not answers:
        return "wrong", "no answer"
    if sum(map(len, answers)) > max(_MAX_ANSWER_CHARS, 2 * len(gold)):
        return "unverifiable", f"answer longer than {_MAX_ANSWER_CHARS} characters"
    grades = [_grade(answer, gold, gold_value, rel_tolerance) for answer in answers]
    if len(answers) == 1 or all(verdict == "correct" for verdict, _ in grades):
        return grades[0]
    # Several boxes: one list of values
    return _grade(", ".join(answers), gold, gold_value, rel_tolerance)


def _grade(answer: str, gold: str, gold_value: Value, rel_tolerance: float) -> tuple[Verdict, str]:
    if _spelled_alike(answer, gold):
        return "correct", "same text"
    options = _options(gold)
    if options is not None:
        if _options_match(options, answer):
            return "correct", "same option"
        # The text of the option alone names it too
        with_text = _GOLD_CHOICE_WITH_TEXT.fullmatch(plain_words(tidy(gold)))
        if with_text is None or _NAMES_OPTION.search(plain_words(tidy(answer))):
            return "wrong", "other option"
        return _verdict(with_text[2], read_answer(with_text[2]), read_answer(answer), rel_tolerance)
    return _verdict(gold, gold_value, read_answer(answer), rel_tolerance)


def _num_values(gold: Value) -> int:
    """Returns how many values a gold answer has that a response may put into boxes of their own."""
    return len(gold.items) if isinstance(gold, Collection) else 1


def _verdict(gold: str, gold_value: Value, answer: Value, rel_tolerance: float) -> tuple[Verdict, str]:
    if isinstance(gold_value, Words | Unreadable) and isinstance(answer, Words | Unreadable):
        # Only equal text could have been correct
        is_same = isinstance(gold_value, Words) and values_match(gold_value, answer)
        return ("correct", "equal") if is_same else ("wrong", "different text")
    if isinstance(answer, Unreadable):
        return "unverifiable", "answer not parsed"
    if isinstance(answer, Words) and not isinstance(gold_value, Words):
        return "unverifiable", "answer is prose"
    equal = values_match(gold_value, answer, rel_tolerance)
    if equal is not True and is_approximate(gold) and is_rounded_to(gold_value, answer):
        return "correct", "rounds to the gold answer"
    if equal is None:
        is_readable = values_match(gold_value, gold_value) is not None
        return ("unverifiable", "answer not parsed") if is_readable else ("wrong", "different text")
    return ("correct", "equal") if equal else ("wrong", "not equal")


def _spelled_alike(answer: str, gold: str) -> bool:
    """Compares two answers as text, without typesetting; words also without case and articles."""
    answer, gold = tidy(answer), tidy(gold)
    if is_words(gold):
        return normal_words(plain_words(answer)) == normal_words(plain_words(gold))
    answer, gold = (_squeezed(TEXT_WRAPPER.sub(r"\1", text)) for text in (answer, gold))
    return answer == gold != ""


def _squeezed(text: str) -> str:
    """Removes white space and braces without meaning.

    ``{2}`` becomes 2. It keeps the braces of ``^{10}``, because ``^10`` is another power, and the space in 3 1/2.
    """
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    text = re.sub(r"(?<!\\)\{([^{}\\])\}", r"\1", text)
    return re.sub(r"(?<!\.)\.\Z", "", text)


def _options(gold: str) -> set[str] | None:
    """Returns the letters of a multiple-choice gold answer: ``(B)``, ``B``, ``(B) 12``, ``B and D``, ``AC``; else None.

    A single letter without brackets from F on, or a small letter, is a variable.
    """
    text = plain_words(tidy(gold))
    single = _CHOICE.fullmatch(text)
    if single:
        is_option = "(" in text or single[1] in "ABCDE"
        return {single[1].upper()} if is_option else None
    if with_text := _GOLD_CHOICE_WITH_TEXT.fullmatch(text):
        return {with_text[1]}
    return set(re.findall(r"[A-J]", text)) if _CHOICES.fullmatch(text) else None


def _options_match(wanted: set[str], answer: str) -> bool:
    """Returns whether an answer names exactly the wanted options. Text after the letter of a single option is not compared."""
    text = _OPTION_WORD.sub("", plain_words(tidy(answer))).strip()
    if len(wanted) > 1:
        return (
            bool(_CHOICES.fullmatch(text))
            and set(re.findall(r"[A-J]", text)) == wanted
            and " or " not in text
        )
    text = _IS_RIGHT.sub("", text)
    if bare := _CHOICE.fullmatch(text):
        return bare[1].upper() in wanted
    named = {first or second for first, second in _OPTION.findall(text)}
    starts_with_option = _OPTION.match(text)
    return bool(starts_with_option) and named == wanted and not _ALTERNATIVE.search(text)
