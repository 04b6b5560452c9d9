"""Compares the answer of a response with the gold answer. Runs in the pool's workers only.

Three layers, cheapest first: normalised strings, plain numbers as exact fractions, and the structure of tuples,
sets and lists; what is left, single expressions, goes to math-verify. Its own deadlines are signal alarms that
do not stop C code and that clash with ours, so they are off: the pool kills the worker instead.
"""

import logging
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

from megatron_rasft.types import Verdict
from megatron_rasft.verify.extraction import extract_answer

# math-verify warns once per process that its deadlines are off
logging.getLogger("math_verify").setLevel(logging.ERROR)

_EXTRACTION = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]
# Rounding of math-verify's comparison of floats: enough digits that 0.333333 is not 1/3
_FLOAT_DIGITS = 10
# No gold answer of the known sets is longer than 210 characters
_MAX_ANSWER_CHARS = 2000
_MAX_LIST_ITEMS = 64
_MAX_EXPONENT = 400

_UNIT_SPELLINGS = {
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres",
    "ft": "ft foot feet",
    "in": "in inch inches",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "l": "l liter liters litre litres",
    "ml": "ml milliliter milliliters",
    "dollar": "dollar dollars usd",
    "cent": "cent cents",
}
_UNITS = {spelling: unit for unit, spellings in _UNIT_SPELLINGS.items() for spelling in spellings.split()}
_NOT_UNITS = frozenset(
    "pi sqrt or and mod times plus minus over to log ln sin cos tan sec csc cot infinity infty inf hundred thousand "
    "million billion trillion dozen half halves third thirds quarter quarters percent base if for when where by "
    "not at is are was".split()
)

_TEXT_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname)\s*\{([^{}]*)\}"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\text\s*\{\s*degrees?\s*\}|\s+degrees?$")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_EMPTY_GROUP_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d{3})|(?<=\d),(?:\\[!,;: ]\s*)+(?=\d{3})")
_NUMBER = r"[+-]?\s?(?:\d+\.?\d*|\.\d+)"
_DECIMAL = re.compile(_NUMBER + r"(?:e[+-]?\d{1,4})?", re.IGNORECASE)
_SCIENTIFIC = re.compile(
    rf"({_NUMBER})\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*\{{?\s*([+-]?\s?\d{{1,4}})\s*\}}?"
)
_SLASH = re.compile(rf"({_NUMBER})\s*/\s*({_NUMBER})")
_FRAC = re.compile(r"([+-]?)\s?(\d*)\s*\\frac\s*(?:\{\s*(-?\d+)\s*\}|\s?(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d+))")
_BASE = re.compile(r"([0-9A-Za-z.]+)_\{?(\d+)\}?")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_CHOICE_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])[\s\\~].*|\(?([A-Z])\)?[.:]?", re.DOTALL)
_NUMBER_WITH_UNIT = re.compile(
    r"(?P<number>.*[\d}])(?:\s+|(?=\\text|\\math|\\mbox|\\,|\\ |~)|(?<=\d)(?=[A-Za-z]{2}))(?P<unit>[A-Za-z][A-Za-z /.^0-9{}\-]*)"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{4,}")
_SPACING = re.compile(r"\\[,;:! ]|~|\\q?quad\b|\\(?:left|right|displaystyle|big[lr]?|Big[lr]?)(?![A-Za-z])")


def grade_answer(response_text: str, gold: str, rel_tolerance: float = 0.0) -> tuple[Verdict, str]:
    """Whether the answer of a response is the gold answer, and why.

    May run for ever and claim any amount of memory on hostile input: call it in a ``VerifierPool``.

    Args:
        response_text: what the model wrote; see ``extract_answer`` for where its answer is looked for.
        gold: the bare gold answer, LaTeX or plain, without a box.
        rel_tolerance: relative difference up to which two plain numbers are equal; 0 asks for equality.

    Returns:
        ``correct``, ``wrong`` or ``unverifiable`` (never ``timeout``) and a short reason.
    """
    if not gold.strip():
        return "unverifiable", "no gold answer"
    answer = extract_answer(response_text)
    if answer is None:
        return "wrong", "no answer"
    if len(answer) > max(_MAX_ANSWER_CHARS, 2 * len(gold)):
        return "unverifiable", f"answer longer than {_MAX_ANSWER_CHARS} characters"
    if _spelled_alike(answer, gold):
        return "correct", "same text"
    if _is_words(gold):
        return "wrong", "different text"
    if _is_prose(answer):
        return "unverifiable", "answer is prose"
    equal = _answers_equal(_tidy(gold), _tidy(answer), rel_tolerance)
    if equal is None:
        return (
            ("wrong", "different text")
            if _parse(_tidy(gold)) is None
            else ("unverifiable", "answer not parsed")
        )
    return ("correct", "equal") if equal else ("wrong", "not equal")


def _tidy(answer: str) -> str:
    """The answer without typesetting: no spacing commands, dollar signs, thousands separators, degree signs."""
    answer = _EMPTY_GROUP_COMMA.sub("", _CONTROL.sub("", answer).strip())
    answer = answer.replace(r"\$", "").replace("$", "").replace("−", "-")
    for mark in (r"\(", r"\)", r"\[", r"\]"):
        answer = answer.replace(mark, "")
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer)
    answer = _SPACING.sub(" ", answer)
    answer = _DEGREES.sub("", answer)
    answer = re.sub(r"^\s*(?:\\approx(?![A-Za-z])|≈)", "", answer)
    answer = re.sub(r"\\?%|\\text\s*\{\s*percent\s*\}|(?<=\d)\s*percent\b", r"\\%", answer)
    answer = re.sub(r"\s+", " ", answer).strip()
    if answer.endswith((".", ",", ";", ":")):
        answer = answer[:-1].rstrip()
    if answer.startswith("{") and answer.endswith("}") and _closes_at_end(answer):
        answer = answer[1:-1].strip()
    sign = "-" if answer.startswith("-") else ""
    number, _, rest = answer.removeprefix("-").partition(" ")
    if _THOUSANDS.fullmatch(number.removesuffix(r"\%")):
        answer = f"{sign}{number.replace(',', '')} {rest}".strip()
    return answer


def _spelled_alike(answer: str, gold: str) -> bool:
    """Equality of strings but for typesetting, case of words and the brackets of an option letter."""
    answer, gold = (_TEXT_WRAPPER.sub(r"\1", _tidy(s)) for s in (answer, gold))
    letter = _CHOICE.fullmatch(gold.strip())
    if letter:
        option = _CHOICE_WITH_TEXT.fullmatch(answer.strip())
        if option and letter[1] in option.groups():
            return True
        bare = _CHOICE.fullmatch(answer.strip())
        if bare is None:
            return False
        is_option = gold.startswith("(") or letter[1] in "ABCDE"
        return bare[1] == letter[1] or (is_option and bare[1].upper() == letter[1].upper())
    answer, gold = (re.sub(r"[\s{}]", "", s).rstrip(".") for s in (answer, gold))
    if _WORD.search(_COMMAND.sub("", gold)):
        answer, gold = answer.casefold(), gold.casefold()
    return answer == gold != ""


def _is_words(gold: str) -> bool:
    """A gold answer made of words alone; as a formula, LQSX would be a product that commutes."""
    text = _TEXT_WRAPPER.sub(r"\1", gold)
    if "\\" in text or not re.fullmatch(r"[A-Za-z][A-Za-z\s,.'\"()&-]*", text.strip()):
        return False
    has_wrapper = text != gold
    return has_wrapper or bool(re.search(r"[A-Za-z]{4,}|[A-Z]{2,}|[A-Za-z]{2,}\s+[A-Za-z]{2,}", text))


def _is_prose(answer: str) -> bool:
    """Words that no formula has; a unit after a number is not prose."""
    if _split_unit(answer)[1] or re.search(r"[=<>\\]", _TEXT_WRAPPER.sub("", answer)):
        return False
    words = _WORD.findall(_TEXT_WRAPPER.sub(r" \1 ", answer))
    return len(words) >= 2 or (len(words) == 1 and words[0].lower() not in {"sqrt", "infinity", "percent"})


def _answers_equal(gold: str, answer: str, rel_tolerance: float) -> bool | None:
    """None where one of the two, free of typesetting, cannot be read."""
    numbers_equal = _numbers_equal(gold, answer, rel_tolerance)
    if numbers_equal is not None:
        return numbers_equal
    base_equal = _bases_equal(gold, answer)
    if base_equal is not None:
        return base_equal
    lists_equal = _lists_equal(gold, answer, rel_tolerance)
    if lists_equal is not None:
        return lists_equal
    return _expressions_equal(gold, answer)


def _numbers_equal(gold: str, answer: str, rel_tolerance: float) -> bool | None:
    (gold_number, gold_unit), (answer_number, answer_unit) = _split_unit(gold), _split_unit(answer)
    x, y = _to_fraction(gold_number.removesuffix(r"\%")), _to_fraction(answer_number.removesuffix(r"\%"))
    if x is None or y is None:
        return None
    gold_unit, answer_unit = _UNITS.get(gold_unit, ""), _UNITS.get(answer_unit, "")
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    # 50% may be written 50, and also 1/2: the percent sign names the scale, the number decides
    scaled = [y]
    if answer_number.endswith(r"\%") != gold_number.endswith(r"\%"):
        scaled.append(y / 100 if answer_number.endswith(r"\%") else y * 100)
    return any(abs(x - z) <= Fraction(rel_tolerance) * abs(x) for z in scaled)


def _to_fraction(text: str) -> Fraction | None:
    """An integer, decimal, scientific number, fraction or mixed number, exactly; None for anything else."""
    text = text.strip()
    if len(text) > 1000:
        return None
    try:
        if _DECIMAL.fullmatch(text):
            return _bounded(Decimal(text.replace(" ", "")))
        if match := _SCIENTIFIC.fullmatch(text):
            mantissa, exponent = match[1].replace(" ", ""), int(match[2].replace(" ", ""))
            return _bounded(Decimal(mantissa).scaleb(exponent)) if abs(exponent) <= _MAX_EXPONENT else None
        if match := _SLASH.fullmatch(text):
            over, under = (Fraction(Decimal(part.replace(" ", ""))) for part in match.groups())
            return over / under
        if match := _FRAC.fullmatch(text):
            fraction = Fraction(int(match[3] or match[4]), int(match[5] or match[6])) + int(match[2] or 0)
            return -fraction if match[1] == "-" else fraction
    except (InvalidOperation, ZeroDivisionError, OverflowError, ValueError):
        return None
    return None


def _bounded(number: Decimal) -> Fraction | None:
    return Fraction(number) if number.is_zero() or abs(number.adjusted()) <= _MAX_EXPONENT else None


def _split_unit(answer: str) -> tuple[str, str]:
    """``(number, unit)`` of a number followed by words; the unit is empty where there is none."""
    text = re.sub(r"\s+", " ", _TEXT_WRAPPER.sub(r" \1", answer)).strip()
    text = (
        re.sub(r"\s*(?:\^\s*\{?[23]\}?)$", "", text)
        if re.search(r"[A-Za-z]\s*\^\s*\{?[23]\}?$", text)
        else text
    )
    match = _NUMBER_WITH_UNIT.fullmatch(text)
    if not match:
        return answer, ""
    unit = match["unit"].strip(" .").lower()
    words = re.findall(r"[a-z]+", unit)
    if not words or len(words) > 5 or _NOT_UNITS.intersection(words):
        return answer, ""
    if any(len(word) == 1 and word not in _UNITS for word in words):
        return answer, ""
    if _to_fraction(match["number"].strip().removesuffix(r"\%")) is None:
        return answer, ""
    return match["number"].strip(), unit


def _bases_equal(gold: str, answer: str) -> bool | None:
    """``2516_8`` is not ``2516_9``; a bare ``2516`` is read in the base that the other one names."""
    x, y = (_BASE.fullmatch(s.replace(" ", "")) for s in (gold, answer))
    if not (x or y) or not any(m and m[1][0].isdigit() for m in (x, y)):
        return None
    digits = [m[1] if m else s.replace(" ", "") for m, s in ((x, gold), (y, answer))]
    return digits[0].lstrip("0") == digits[1].lstrip("0") and (not (x and y) or x[2] == y[2])


def _lists_equal(gold: str, answer: str, rel_tolerance: float) -> bool | None:
    """Tuples and intervals item by item, sets and bare lists in any order; None if either is a single value."""
    gold_brackets, gold_items = _split_list(gold)
    answer_brackets, answer_items = _split_list(answer)
    if not gold_items or not answer_items:
        return None
    if len(gold_items) == 1 or len(answer_items) == 1:
        if len(gold_items) != len(answer_items) or "" in (gold_brackets, answer_brackets):
            return None
    if len(gold_items) != len(answer_items) or len(gold_items) > _MAX_LIST_ITEMS:
        return False
    unordered = {"", "{}"}
    if gold_brackets != answer_brackets and not {gold_brackets, answer_brackets} <= unordered:
        # the brackets were left off, or put around a list: the order must hold. [1,2] is not (1,2)
        if "" not in (gold_brackets, answer_brackets):
            return False
        return all(_answers_equal(g, a, rel_tolerance) for g, a in zip(gold_items, answer_items, strict=True))
    if gold_brackets in unordered:
        return _same_items(gold_items, answer_items, rel_tolerance)
    return all(_answers_equal(g, a, rel_tolerance) for g, a in zip(gold_items, answer_items, strict=True))


def _same_items(gold_items: list[str], answer_items: list[str], rel_tolerance: float) -> bool:
    left = list(answer_items)
    for gold_item in gold_items:
        # cheap comparison first, so that a long list in the same order costs one pass
        left.sort(key=lambda item, wanted=gold_item: item != wanted)  # type: ignore[misc]
        for i, item in enumerate(left):
            if item == gold_item or _answers_equal(gold_item, item, rel_tolerance):
                del left[i]
                break
        else:
            return False
    return True


def _split_list(text: str) -> tuple[str, list[str]]:
    r"""Brackets around the whole text ("", "()", "[)", "{}" ...) and its items at the top level."""
    text = text.replace(r"\{", "{").replace(r"\}", "}") if text.startswith(r"\{") else text
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")")
    brackets = ""
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}") and _closes_at_end(text):
        brackets, text = text[0] + text[-1], text[1:-1].strip()
    items, depth, start = [], 0, 0
    for i, symbol in enumerate(text):
        if symbol in "([{":
            depth += 1
        elif symbol in ")]}":
            depth -= 1
        elif symbol in ",;" and depth == 0:
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    if not brackets or brackets == "{}":
        items = [
            part
            for item in items
            for part in re.split(r"\s+(?:and|or)\s+|\\text\s*\{\s*(?:and|or)\s*\}", item)
        ]
    items = [re.sub(r"^(?:and|or)\s+", "", item.strip()) for item in items]
    return brackets, [item for item in items if item]


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character; ( and [ close each other."""
    depth = 0
    for i, symbol in enumerate(text):
        if symbol in "([{":
            depth += 1
        elif symbol in ")]}":
            depth -= 1
            if depth == 0:
                return i == len(text) - 1
    return False


def _expressions_equal(gold: str, answer: str) -> bool | None:
    gold_expression = _parse(_split_unit(gold)[0])
    if gold_expression is None:
        return None
    answer_expression = _parse(_split_unit(answer)[0])
    if answer_expression is None:
        return None
    return verify(gold_expression, answer_expression, float_rounding=_FLOAT_DIGITS, timeout_seconds=0)


def _parse(text: str) -> Basic | MatrixBase | None:
    if not text.strip():
        return None
    found = parse(f"\\boxed{{{text}}}", _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=0)
    return found[0] if found and isinstance(found[0], Basic | MatrixBase) else None
