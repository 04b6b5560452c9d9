"""Reads plain numbers as exact fractions: integers, decimals, repeating decimals, fractions, mixed and scientific numbers."""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

# Exponents above this would make integers that take too long to compare
_MAX_EXPONENT = 5000
_MAX_CHARS = 2000

_UNSIGNED = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = rf"[+-]?\s?{_UNSIGNED}"
_THOUSANDS = re.compile(r"([+-]?)\s?(\d{1,3}(?:,\d{3})+(?:\.\d+)?)")
_SPACED = re.compile(r"[+-]?\s?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(NUMBER + r"(?:e[+-]?\d{1,5})?", re.IGNORECASE)
_SCIENTIFIC = re.compile(
    rf"({NUMBER})\s*(?:\\times|\\cdot|\*|x(?=\s*10\s*\^))\s*10\s*\^\s*(?:\{{\s*([+-]?\s?\d{{1,5}})\s*\}}|(\d))"
)
_POWER_OF_TEN = re.compile(r"(-?)\s*10\s*\^\s*(?:\{\s*([+-]?\s?\d{1,5})\s*\}|(\d))")
_SLASH = re.compile(rf"({NUMBER})\s*(?:/|\\div(?![A-Za-z]))\s*({NUMBER})")
_BRACED_SLASH = re.compile(r"(-?)\{\s*(-?\d+)\s*\}\s*/\s*\{\s*(-?\d+)\s*\}")
_PART = rf"(?:\{{\s*({NUMBER})\s*\}}|\s?(\d))"
_FRAC = re.compile(rf"([+-]?)\s?(\d*)\s*\\frac\s*{_PART}\s*{_PART}")
_MIXED_SLASH = re.compile(r"([+-]?)\s?(\d+)\s+(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(
    r"([+-]?)\s?(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overset\{\\rule\})\s*\{?\s*(\d+)\s*\}?|\((\d+)\))"
)
_DOTS = re.compile(r"([+-]?)\s?(\d*)\.(\d+?)(?:\s*\\ldots|\.{2,3})")
_REPEATED_BLOCK = re.compile(r"(\d*?)(\d{1,8}?)\2+(\d{0,7})")

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_WORDS = {word: n for n, word in enumerate(_ONES.split())} | {
    word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_PARTS = {
    word: n
    for n, words in (
        (2, "half halves"),
        (3, "third thirds"),
        (4, "quarter quarters fourth fourths"),
        (5, "fifth fifths"),
    )
    for word in words.split()
}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(.*[\d}}])\s*({'|'.join(_SCALES)}|dozen)s?", re.IGNORECASE)


def exact_number(text: str) -> Fraction | None:
    """Returns the exact value of a plain number in tidy text, or None for anything else.

    ``0.333...`` is a repeating decimal if its digits end with at least two copies of a block. ``3.14159...`` is not: its value
    is not known.
    """
    text = text.strip()
    if not text or len(text) > _MAX_CHARS:
        return None
    try:
        for read in _READERS:
            number = read(text)
            if number is not None:
                return number
    except (InvalidOperation, ZeroDivisionError, OverflowError, ValueError):
        return None
    return None


def scaled_number(text: str) -> Fraction | None:
    """Returns the value of ``3 million`` or ``two dozen``; None if no such word follows a number."""
    match = _SCALED.fullmatch(text.strip())
    number = exact_number(match[1]) if match else None
    if match is None or number is None:
        words = text.lower().replace("-", " ").split()
        return _worded(words) if words and words[-1].rstrip("s") in (*_SCALES, "dozen") else None
    scale = match[2].lower()
    return number * (12 if scale == "dozen" else 10 ** _SCALES[scale])


def worded_number(text: str) -> Fraction | None:
    """Returns the value of a number in words, such as ``twenty-one``; None for other text."""
    words = text.lower().replace("-", " ").replace(" and ", " ").split()
    if words and words[-1] in _PARTS and len(words) <= 3:
        count = _worded(words[:-1]) if words[:-1] not in ([], ["a"], ["an"]) else Fraction(1)
        return None if count is None else count / _PARTS[words[-1]]
    return _worded(words)


def _worded(words: list[str]) -> Fraction | None:
    if not words or any(w.rstrip("s") not in _SCALES and w not in _WORDS and w != "dozen" for w in words):
        return None
    total = group = 0
    previous = 1000
    for word in words:
        scale = word.rstrip("s")
        if word == "dozen":
            group, previous = (group or 1) * 12, 1000
        elif scale in _SCALES:
            group, previous = (group or 1) * 10 ** _SCALES[scale], 1000
            if scale != "hundred":
                total, group = total + group, 0
        else:
            # "twenty one" is a number, "one twenty" and "five six" are not
            if not (previous == 1000 or (previous >= 20 and 0 < _WORDS[word] < 10)):
                return None
            group, previous = group + _WORDS[word], _WORDS[word]
    return Fraction(total + group)


def _decimal(text: str) -> Fraction | None:
    return _bounded(Decimal(text.replace(" ", ""))) if _DECIMAL.fullmatch(text) else None


def _grouped(text: str) -> Fraction | None:
    if match := _THOUSANDS.fullmatch(text):
        return Fraction(Decimal(match[1] + match[2].replace(",", "")))
    return Fraction(Decimal(text.replace(" ", ""))) if _SPACED.fullmatch(text) else None


def _scientific(text: str) -> Fraction | None:
    if match := _SCIENTIFIC.fullmatch(text):
        return _scaled_by_ten(match[1], match[2] or match[3])
    if match := _POWER_OF_TEN.fullmatch(text):
        return _scaled_by_ten(match[1] + "1", match[2] or match[3])
    return None


def _scaled_by_ten(mantissa: str, exponent: str) -> Fraction | None:
    power = int(exponent.replace(" ", ""))
    return (
        Fraction(Decimal(mantissa.replace(" ", ""))) * Fraction(10) ** power
        if abs(power) <= _MAX_EXPONENT
        else None
    )


def _slash(text: str) -> Fraction | None:
    if match := _SLASH.fullmatch(text):
        over, under = (Fraction(Decimal(part.replace(" ", ""))) for part in match.groups())
        return over / under
    if match := _BRACED_SLASH.fullmatch(text):
        return _signed(match[1], Fraction(int(match[2]), int(match[3])))
    return None


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text)
    return _repeating_value(match[1], match[2], match[3], match[4] or match[5]) if match else None


def _with_dots(text: str) -> Fraction | None:
    match = _DOTS.fullmatch(text)
    block = _REPEATED_BLOCK.fullmatch(match[3]) if match else None
    # The digits end with whole blocks and perhaps the start of the next one. A single digit must occur twice
    if match is None or block is None or not block[2].startswith(block[3]):
        return None
    return _repeating_value(match[1], match[2], block[1], block[2])


def _repeating_value(sign: str, whole: str, fixed: str, repeated: str) -> Fraction:
    period = Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    return _signed(sign, int(whole or 0) + Fraction(int(fixed or 0), 10 ** len(fixed)) + period)


def _mixed(text: str) -> Fraction | None:
    match = _MIXED_SLASH.fullmatch(text)
    return _signed(match[1], int(match[2]) + Fraction(int(match[3]), int(match[4]))) if match else None


def _frac(text: str) -> Fraction | None:
    match = _FRAC.fullmatch(text)
    if not match:
        return None
    over, under = (
        Fraction(Decimal((a or b).replace(" ", ""))) for a, b in (match.group(3, 4), match.group(5, 6))
    )
    if match[2] and (over < 0 or under < 0):
        return None
    return _signed(match[1], int(match[2] or 0) + over / under)


def _signed(sign: str, number: Fraction) -> Fraction:
    return -number if sign == "-" else number


def _bounded(number: Decimal) -> Fraction | None:
    """Returns the number as a fraction, or None if its exponent would make the fraction's integers too large."""
    return Fraction(number) if number.is_zero() or abs(number.adjusted()) <= _MAX_EXPONENT else None


_READERS = (_decimal, _grouped, _scientific, _slash, _frac, _mixed, _repeating, _with_dots)
