"""Compares the answer of a response with the gold answer. Runs in the pool's workers only.

The comparisons, cheapest first: equal text without typesetting, plain numbers as exact fractions, and tuples, sets and lists
item by item. All other single expressions go to math-verify (0.9.0), which parses them with sympy.

math-verify's own deadlines are off. They are signal alarms, which do not interrupt C code and would replace the worker's
own alarm. The pool kills the worker at the deadline instead.
"""

import logging
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

from megatron_rasft.types import Verdict
from megatron_rasft.verify.math_extraction import extract_answer

# math-verify warns in every process that its deadlines are off
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Only boxes are extracted, because _parse puts every text into a box
_EXTRACTION = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]
# math-verify rounds floats before it compares them. With its default of 6 digits, 0.333333 equals 1/3
_FLOAT_DIGITS = 10
# The longest gold answer of the known sets has 210 characters
_MAX_ANSWER_CHARS = 2000
_MAX_LIST_ITEMS = 64
_MAX_EXPONENT = 400

_UNIT_SPELLINGS = {
    "m": ("m meter meters metre metres", "length", "1"),
    "cm": ("cm centimeter centimeters centimetre centimetres", "length", "0.01"),
    "mm": ("mm millimeter millimeters millimetre millimetres", "length", "0.001"),
    "km": ("km kilometer kilometers kilometre kilometres", "length", "1000"),
    "ft": ("ft foot feet", "imperial length", "12"),
    "in": ("in inch inches", "imperial length", "1"),
    "yd": ("yd yard yards", "imperial length", "36"),
    "mi": ("mi mile miles", "imperial length", "63360"),
    "s": ("s sec secs second seconds", "time", "1"),
    "min": ("min mins minute minutes", "time", "60"),
    "h": ("h hr hrs hour hours", "time", "3600"),
    "day": ("day days", "time", "86400"),
    "week": ("week weeks", "time", "604800"),
    "month": ("month months", "months", "1"),
    "year": ("yr yrs year years", "months", "12"),
    "g": ("g gram grams", "mass", "1"),
    "kg": ("kg kilogram kilograms", "mass", "1000"),
    "lb": ("lb lbs pound pounds", "imperial mass", "16"),
    "oz": ("oz ounce ounces", "imperial mass", "1"),
    "l": ("l liter liters litre litres", "volume", "1000"),
    "ml": ("ml milliliter milliliters", "volume", "1"),
    "dollar": ("dollar dollars usd", "money", "100"),
    "cent": ("cent cents", "money", "1"),
}
"""Unit -> its spellings, its dimension, and its size relative to the dimension's base unit.

Imperial and metric units have different dimensions here: answers are not converted between the two systems.
"""
_UNITS = {
    spelling: unit for unit, (spellings, _, _) in _UNIT_SPELLINGS.items() for spelling in spellings.split()
}
# Words after a number that change its value or are not units
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
_LETTER_AND_TEXT = re.compile(r"\(([A-E])\)[\s\\~].*", re.DOTALL)
_CHOICE_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])[\s\\~].*|\(?([A-Z])\)?[.:]?", re.DOTALL)
_NUMBER_WITH_UNIT = re.compile(
    r"(?P<number>.*[\d}])(?:\s+|(?=\\text|\\math|\\mbox|\\,|\\ |~)|(?<=\d)(?=[A-Za-z]{2}))(?P<unit>[A-Za-z][A-Za-z /.^0-9{}\-]*)"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{4,}")
_SHORT_WORDS = frozenset({"yes", "no"})
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"({_NUMBER})\s*(?:\\text\s*\{{\s*)?({'|'.join(_SCALES)})\b\s*\}}?")
_DIGIT_GROUPS = re.compile(r"\d{1,3}(?: \d{3})+")
_REPEATING = re.compile(r"([+-]?)\s?(\d*)\.(\d*)\\overline\s*\{?\s*(\d+)\s*\}?")
_MIXED_SLASH = re.compile(r"([+-]?)\s?(\d+)\s+(\d+)\s*/\s*(\d+)")
_MONEY = re.compile(r"(-?)\s*\\?\$\s*(\d[\d,]*(?:\.\d+)?)")
_NUMBER_IS_LETTER = re.compile(rf"({_NUMBER}|{_FRAC.pattern})\s*=\s*([A-Za-z])")
_TRIG_OF_DEGREES = re.compile(
    r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*[)}]?"
)
_INEQUALITY = re.compile(r"[<>≤≥]|\\(?:l|g)(?:e|eq|eqslant|t)(?![A-Za-z])")
_COLOR = re.compile(r"\\(?:text)?color\s*\{[A-Za-z]*\}")
_STYLE = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it)|boldsymbol|underline)\s*(?=\{)")
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "²": "^2", "³": "^3", "×": r"\times ", "·": r"\cdot ",
     "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset "}
)  # fmt: skip
_UNICODE_ROOT = re.compile(r"√\s*(\d+|[A-Za-z])")
_OPTION_WORD = re.compile(r"(?:option|choice|answer)\s+", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)
_SPACING = re.compile(
    r"(?<!\\)\\[,;:! ]|~|\\q?quad\b|\\(?:left|right|displaystyle|big[lr]?|Big[lr]?)(?![A-Za-z])"
)


def grade_answer(response_text: str, gold: str, rel_tolerance: float = 0.0) -> tuple[Verdict, str]:
    """Compares the answer of a response with the gold answer.

    On hostile input it may run for ever and use any amount of memory, so call it in a ``VerifierPool``.

    Args:
        response_text: the response; ``extract_answer`` finds its answer.
        gold: the gold answer in LaTeX or plain text, without a box.
        rel_tolerance: relative difference up to which two plain numbers are equal; 0 requires equality.

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
    if _is_prose(_tidy(answer)):
        return "unverifiable", "answer is prose"
    equal = _answers_equal(_tidy(gold), _tidy(answer), rel_tolerance)
    if equal is None:
        # If even the gold answer cannot be parsed, only equal text could have been correct
        is_text = _parse(_tidy(gold)) is None
        return ("wrong", "different text") if is_text else ("unverifiable", "answer not parsed")
    return ("correct", "equal") if equal else ("wrong", "not equal")


def _tidy(answer: str) -> str:
    """Returns the answer without typesetting: spacing commands, dollar signs, thousands separators, degree signs.

    The steps depend on each other, so their order matters: an amount of money must be found before dollar signs are removed.
    """
    answer = _unstyled(_EMPTY_GROUP_COMMA.sub("", _CONTROL.sub("", answer).strip()))
    if money := _MONEY.fullmatch(answer):
        answer = f"{money[1]}{money[2]} dollars"
    answer = answer.replace(r"\$", "").replace("$", "").translate(_UNICODE)
    answer = _UNICODE_ROOT.sub(r"\\sqrt{\1}", answer)
    for mark in (r"\(", r"\)", r"\[", r"\]"):
        answer = answer.replace(mark, "")
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer)
    answer = (
        answer.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").replace(r"\varnothing", r"\emptyset")
    )
    # Before the degree signs are removed: sin(30 degrees) is not sin(30)
    answer = _TRIG_OF_DEGREES.sub(r"\\\1{\\frac{\2\\pi}{180}}", answer)
    answer = _SPACING.sub(" ", answer)
    answer = _DEGREES.sub("", answer)
    answer = re.sub(r"^\s*(?:\\approx(?![A-Za-z])|≈)", "", answer)
    answer = re.sub(r"\\?%|\\text\s*\{\s*percent\s*\}|(?<=\d)\s*percent\b", r"\\%", answer)
    answer = re.sub(r"\s+", " ", answer).strip()
    if answer.endswith((".", ",", ";", ":")) or (answer.endswith("\\") and not answer.endswith("\\\\")):
        answer = answer[:-1].rstrip()
    if scaled := _SCALED.fullmatch(answer):
        answer = f"{scaled[1]} \\times 10^{{{_SCALES[scaled[2]]}}}"
    if _DIGIT_GROUPS.fullmatch(answer):
        answer = answer.replace(" ", "")
    # "5 = x" is written "x = 5", which math-verify understands as the value of x
    if named := _NUMBER_IS_LETTER.fullmatch(answer):
        answer = f"{named[named.lastindex or 0]} = {named[1]}"
    if answer.startswith("{") and answer.endswith("}") and _closes_at_end(answer):
        answer = answer[1:-1].strip()
    sign = "-" if answer.startswith("-") else ""
    number, _, rest = answer.removeprefix("-").partition(" ")
    if _THOUSANDS.fullmatch(number.removesuffix(r"\%")):
        answer = f"{sign}{number.replace(',', '')} {rest}".strip()
    return answer


def _unstyled(answer: str) -> str:
    """Removes colours, and a font command around a whole formula. Words keep their font command, which marks them as text."""
    answer = _COLOR.sub("", answer)
    while (style := _STYLE.match(answer)) and _closes_at_end(answer[style.end() :]):
        inner = answer[style.end() + 1 : -1].strip()
        if not re.search(r"[\\$\d]", inner) or re.search(r"[A-Za-z]{2,}", _COMMAND.sub("", inner)):
            break
        answer = inner
    return answer


def _spelled_alike(answer: str, gold: str) -> bool:
    """Compares two answers as text, without typesetting. Ignores case of words and the brackets of an option letter."""
    is_word = _is_words(gold)
    answer, gold = (_TEXT_WRAPPER.sub(r"\1", _tidy(s)).strip() for s in (answer, gold))
    # Multiple choice: (B), B. and "(B) 12" are one answer
    letter = _CHOICE.fullmatch(gold) or _LETTER_AND_TEXT.fullmatch(gold)
    if letter:
        answer = _OPTION_WORD.sub("", answer, count=1)
        option = _CHOICE_WITH_TEXT.fullmatch(answer)
        if option and letter[1] in option.groups():
            return True
        bare = _CHOICE.fullmatch(answer)
        if bare is None:
            return _squeezed(answer) == _squeezed(gold)
        is_option = gold.startswith("(") or letter[1] in "ABCDE"
        return bare[1] == letter[1] or (is_option and bare[1].upper() == letter[1].upper())
    if is_word or _WORD.search(_COMMAND.sub("", gold)) or gold.casefold() in _SHORT_WORDS:
        answer, gold = (_ARTICLE.sub("", s, count=1).casefold() for s in (answer, gold))
    answer, gold = _squeezed(answer), _squeezed(gold)
    return answer == gold != ""


def _squeezed(text: str) -> str:
    """Removes white space and braces without meaning.

    ``{2}`` becomes 2. It keeps the braces of ``^{10}``, because ``^10`` is another power, and the space in 3 1/2.
    """
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return re.sub(r"(?<!\\)\{([^{}\\])\}", r"\1", text).rstrip(".")


def _is_words(gold: str) -> bool:
    """Returns whether a gold answer consists of words only. If parsed as a formula, LQSX would be a product and equal SXLQ."""
    text = _TEXT_WRAPPER.sub(r"\1", gold)
    if "\\" in text or not re.fullmatch(r"[A-Za-z][A-Za-z\s,.'\"()&-]*", text.strip()):
        return False
    has_wrapper = text != gold
    return has_wrapper or bool(re.search(r"[A-Za-z]{4,}|[A-Z]{2,}|[A-Za-z]{2,}\s+[A-Za-z]{2,}", text))


def _is_prose(answer: str) -> bool:
    """Returns whether an answer is prose and not a formula. Units after a number do not count as words."""
    if _split_words(answer)[1] or re.search(r"[=<>\\]", _TEXT_WRAPPER.sub("", answer)):
        return False
    words = _WORD.findall(_TEXT_WRAPPER.sub(r" \1 ", answer))
    return len(words) >= 2 or (len(words) == 1 and words[0].lower() not in {"sqrt", "infinity", "percent"})


def _answers_equal(gold: str, answer: str, rel_tolerance: float) -> bool | None:
    """Compares two answers without typesetting. Returns None if one of them cannot be parsed."""
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
    """Compares two plain numbers with optional units. Returns None if one of them is not a plain number."""
    (gold_number, gold_unit), (answer_number, answer_unit) = _split_unit(gold), _split_unit(answer)
    x, y = _to_fraction(gold_number.removesuffix(r"\%")), _to_fraction(answer_number.removesuffix(r"\%"))
    if x is None or y is None:
        return None
    if gold_unit and answer_unit and gold_unit != answer_unit:
        factor = _conversion(answer_unit, gold_unit)
        if factor is None:
            return False
        y *= factor
    # With a percent sign on one side only, two readings are accepted: 50% equals 50, and 50% equals 1/2
    scaled = [y]
    if answer_number.endswith(r"\%") != gold_number.endswith(r"\%"):
        scaled.append(y / 100 if answer_number.endswith(r"\%") else y * 100)
    return any(abs(x - z) <= Fraction(rel_tolerance) * abs(x) for z in scaled)


def _conversion(unit: str, wanted: str) -> Fraction | None:
    """Returns the size of ``unit`` in units of ``wanted``, or None for different dimensions and for powers of units."""
    if unit not in _UNIT_SPELLINGS or wanted not in _UNIT_SPELLINGS:
        return None
    (_, measure, size), (_, wanted_measure, wanted_size) = _UNIT_SPELLINGS[unit], _UNIT_SPELLINGS[wanted]
    return Fraction(size) / Fraction(wanted_size) if measure == wanted_measure else None


def _to_fraction(text: str) -> Fraction | None:
    """Returns the exact value of an integer, decimal, scientific number, fraction or mixed number, else None."""
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
        if match := _REPEATING.fullmatch(text):
            sign, whole, fixed, repeated = match.groups()
            period = Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
            number = int(whole or 0) + Fraction(int(fixed or 0), 10 ** len(fixed)) + period
            return -number if sign == "-" else number
        if match := _MIXED_SLASH.fullmatch(text):
            mixed = int(match[2]) + Fraction(int(match[3]), int(match[4]))
            return -mixed if match[1] == "-" else mixed
        if match := _FRAC.fullmatch(text):
            fraction = Fraction(int(match[3] or match[4]), int(match[5] or match[6])) + int(match[2] or 0)
            return -fraction if match[1] == "-" else fraction
    except (InvalidOperation, ZeroDivisionError, OverflowError, ValueError):
        return None
    return None


def _bounded(number: Decimal) -> Fraction | None:
    """Returns the number as a fraction, or None if its exponent would make the fraction's integers too large."""
    return Fraction(number) if number.is_zero() or abs(number.adjusted()) <= _MAX_EXPONENT else None


def _split_unit(answer: str) -> tuple[str, str]:
    """Splits a number with a unit into ``(number, unit)``.

    The unit is a key of the table, followed by its power if it has one; "" if there is no unit or an unknown unit.
    """
    number, words = _split_words(answer)
    unit, _, power = words.partition("^")
    unit = _UNITS.get(unit.strip(), "")
    return number, f"{unit}^{power}" if unit and power else unit


def _split_words(answer: str) -> tuple[str, str]:
    """Splits a number with words after it into ``(number, words)``. A power of the words follows them as ``^2``."""
    text = re.sub(r"\s+", " ", _TEXT_WRAPPER.sub(r" \1", answer)).strip()
    power = re.search(r"(?<=[A-Za-z])\s*\^\s*\{?([23])\}?$", text)
    match = _NUMBER_WITH_UNIT.fullmatch(text[: power.start()] if power else text)
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
    return match["number"].strip(), f"{unit}^{power[1]}" if power else unit


def _bases_equal(gold: str, answer: str) -> bool | None:
    """Compares numbers in a given base, such as ``2516_8``. Returns None if neither answer names a base.

    A number without a base is read in the other answer's base.
    """
    x, y = (_BASE.fullmatch(s.replace(" ", "")) for s in (gold, answer))
    if not (x or y) or not any(m and m[1][0].isdigit() for m in (x, y)):
        return None
    digits = [m[1] if m else s.replace(" ", "") for m, s in ((x, gold), (y, answer))]
    return digits[0].lstrip("0") == digits[1].lstrip("0") and (not (x and y) or x[2] == y[2])


def _lists_equal(gold: str, answer: str, rel_tolerance: float) -> bool | None:
    """Compares tuples and intervals item by item, sets and lists without brackets in any order.

    Returns None if one of the answers is a single value.
    """
    gold_brackets, gold_items = _split_list(gold)
    answer_brackets, answer_items = _split_list(answer)
    if not gold_items or not answer_items:
        return None
    if len(gold_items) == 1 or len(answer_items) == 1:
        if len(gold_items) != len(answer_items):
            # A plain number never equals a list of several items. Another expression can, for example 1 \pm 2
            single = gold_items[0] if len(gold_items) == 1 else answer_items[0]
            return None if _to_fraction(single) is None else False
        if "" in (gold_brackets, answer_brackets):
            return None
    if len(gold_items) != len(answer_items) or len(gold_items) > _MAX_LIST_ITEMS:
        return False
    unordered = {"", "{}"}
    if gold_brackets != answer_brackets and not {gold_brackets, answer_brackets} <= unordered:
        # If one side has no brackets, the order must match. Different brackets, as in [1,2] and (1,2), have different meanings
        if "" not in (gold_brackets, answer_brackets):
            return False
        return all(_answers_equal(g, a, rel_tolerance) for g, a in zip(gold_items, answer_items, strict=True))
    if gold_brackets in unordered:
        return _same_items(gold_items, answer_items, rel_tolerance)
    return all(_answers_equal(g, a, rel_tolerance) for g, a in zip(gold_items, answer_items, strict=True))


def _same_items(gold_items: list[str], answer_items: list[str], rel_tolerance: float) -> bool:
    """Returns whether the items are equal in some order. Both lists have the same length."""
    left = list(answer_items)
    for gold_item in gold_items:
        # Equal text first, so that a list in the same order needs no comparison of different items
        left.sort(key=lambda item, wanted=gold_item: item != wanted)  # type: ignore[misc]
        for i, item in enumerate(left):
            if item == gold_item or _answers_equal(gold_item, item, rel_tolerance):
                del left[i]
                break
        else:
            return False
    return True


def _split_list(text: str) -> tuple[str, list[str]]:
    r"""Splits a list into the brackets around it ("", "()", "[)", "{}" ...) and its items at the top level."""
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
    """Returns whether the first bracket is closed by the last character. "(" may be closed by "]", as in an interval."""
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
    """Compares two expressions by math-verify. Returns None if one of them cannot be parsed."""
    gold_expression = _parse(_split_words(gold)[0])
    if gold_expression is None:
        return None
    answer_expression = _parse(_split_words(answer)[0])
    if answer_expression is None:
        return None
    if verify(gold_expression, answer_expression, float_rounding=_FLOAT_DIGITS, timeout_seconds=0):
        return True
    # math-verify (0.9.0) converts an inequality such as x < 3 to an interval only on the side of the gold answer
    return bool(_INEQUALITY.search(answer)) and verify(
        answer_expression, gold_expression, float_rounding=_FLOAT_DIGITS, timeout_seconds=0
    )


def _parse(text: str) -> Basic | MatrixBase | None:
    """Returns the text as an expression of sympy, or None if it cannot be parsed."""
    if not text.strip():
        return None
    found = parse(f"\\boxed{{{text}}}", _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=0)
    return found[0] if found and isinstance(found[0], Basic | MatrixBase) else None
