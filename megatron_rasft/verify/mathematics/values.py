r"""Reads a tidy answer as a typed value: number, quantity, list, interval, assignment, equation, ratio, matrix, cases or words."""

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_rasft.verify.mathematics.exact_numbers import exact_number, scaled_number, worded_number
from megatron_rasft.verify.mathematics.expressions import has_symbols, is_multiple
from megatron_rasft.verify.mathematics.notation import (
    TEXT_WRAPPER,
    closes_at_end,
    plain_words,
    split_top_level,
    tidy,
)
from megatron_rasft.verify.mathematics.units import Unit, parse_unit

MAX_ITEMS = 64


@dataclass(frozen=True)
class Number:
    """A plain number."""

    value: Fraction
    text: str


@dataclass(frozen=True)
class Percent:
    """A number with a percent sign; ``value`` is the number before the sign."""

    value: "Number | Expression"


@dataclass(frozen=True)
class Quantity:
    """A value with a unit."""

    value: "Number | Expression"
    unit: Unit


@dataclass(frozen=True)
class Expression:
    """A formula that is compared by its value."""

    text: str


@dataclass(frozen=True)
class Collection:
    """Several values. ``brackets`` is "" for a list, "{}" for a set, "()" for a tuple or open interval, or "[)", "[]" ..."""

    brackets: str
    items: tuple["Value", ...]
    joined_by: str = ","
    """ "and" or "or" if the items are joined by this word, else a comma."""


@dataclass(frozen=True)
class Assignment:
    """A chain such as ``x = a = b``: its names, and its other members. ``approximate`` is the member after an ``≈``."""

    names: tuple[str, ...]
    members: tuple["Value", ...]
    approximate: "Value | None" = None


@dataclass(frozen=True)
class Equation:
    """An equation whose left side is not a name."""

    left: str
    right: str


@dataclass(frozen=True)
class Inequality:
    """A chain such as ``2 < x <= 5``: its members, and the operators between them (``<``, ``<=``, ``>``, ``>=``, ``!=``)."""

    members: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    r"""A set of numbers, such as ``\mathbb{R}``, or a union, intersection or difference of sets.

    ``operators[i]`` stands between ``parts[i]`` and ``parts[i + 1]``.
    """

    parts: tuple["Value", ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Membership:
    r"""A statement that a name is in a set, ``x \in A``, or a set-builder with its condition."""

    name: str
    region: "Value"


@dataclass(frozen=True)
class Based:
    """A number in a given base: its digits without leading zeros, and the base."""

    digits: str
    base: str


@dataclass(frozen=True)
class Ratio:
    """A ratio such as ``a:b:c``."""

    terms: tuple[str, ...]


@dataclass(frozen=True)
class Congruence:
    r"""A congruence: ``a \pmod{m}``, with or without ``x \equiv`` before it. The residues are as written, not reduced."""

    name: str
    residues: tuple[Fraction, ...]
    modulus: Fraction
    is_statement: bool = False
    """Whether a number stands on the left, as in ``17 \\equiv 2 \\pmod 5``."""


@dataclass(frozen=True)
class Matrix:
    """A matrix, row by row. A column vector has rows of one entry."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Cases:
    """Rows of a ``cases`` environment: the value, and the condition ("" for "otherwise")."""

    rows: tuple[tuple["Value", "Value | None"], ...]


@dataclass(frozen=True)
class Words:
    """Text that is compared as text."""

    text: str


@dataclass(frozen=True)
class Unreadable:
    """Text that does not commit to a value: a hedge, prose, or a formula that cannot be read."""

    text: str


Value = (
    Number | Percent | Quantity | Expression | Collection | Assignment | Equation | Inequality | Region | Membership
    | Based | Ratio | Congruence | Matrix | Cases | Words | Unreadable
)  # fmt: skip

_LETTER = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
    r"|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell)\s?)"
)
_INDEX = r"(?:\s*_\s*(?:\w|\{[^{}]{1,20}\}|\\text\{[^{}]{1,20}\}|\{\\(?:text|mathrm)\{[^{}]{1,20}\}\}|\\[a-z]+\s?[A-Z]*))"
_VECTOR = rf"(?:\\(?:vec|mathbf|overrightarrow|overline|hat|bar|boldsymbol|mathrm|mathcal|text|widehat)\s*\{{\s*[A-Za-z]{{1,3}}\s*\}}{_INDEX}?)"
_ARGUMENT = r"(?:\s*\([^()=<>]{1,30}\)|\s*\[[^\[\]=<>]{1,20}\])"
_NAME = re.compile(
    rf"(?:m\s*)?(?:\\(?:angle|triangle|measuredangle|arc|overarc)\s*)?(?:{_LETTER}{_INDEX}?'*(?:\^\{{-1\}})?{_INDEX}?{_ARGUMENT}?|{_VECTOR}{_ARGUMENT}?)"
    rf"|\\(?:angle|triangle|widehat)\s*\{{?[A-Z]{{1,4}}\}}?|m\s*\\angle\s*\{{?[A-Z]{{1,4}}\}}?|[A-Z]{{2,4}}'?|\|\s*[A-Z]{{2}}\s*\||\[[A-Z]{{3,6}}\]"
    rf"|\\frac\s*\{{\s*d\s*[a-z]?\s*\}}\s*\{{\s*d\s*[a-z]\s*\}}|\\(?:Pr|det|dim|min|max|Re|Im|deg|gcd|operatorname\{{[a-z]+\}}){_ARGUMENT}"
    r"|\\(?:min|max)|[A-Za-z]{1,3}(?:\s*:\s*[A-Za-z]{1,3})+"
)
_WORDY_NAME = re.compile(
    r"(?:\\(?:text|mathrm|textbf|textit|operatorname)\s*\{[A-Za-z .'()\-]+\}\s*)+(?:\([^()]*\))?"
    r"|(?!(?:sqrt|pi)\b)[A-Za-z]{4,20}(?: [A-Za-z]{2,20}){0,5}"
)
_RELATION = re.compile(r"(\\(?:le|ge|ne|approx|in|equiv)(?![A-Za-z])|<|>|=)")
_OPERATORS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!="}
_AND = r"(?:\\text\s*\{\s*,?\s*(?:and|also|or|und)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))"
_SEPARATOR = re.compile(rf"\s*[,;]\s*(?:\\text\s*\{{\s*(?:and|or)\s*\}}|(?:and|or)\b)?\s*|\s*{_AND}\s*")
_OR = re.compile(r"\\text\s*\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])")
_AND_WORD = re.compile(r"\\text\s*\{\s*,?\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])")
_SET_OPERATION = re.compile(r"(\\(?:cup|cap|setminus)(?![A-Za-z]))")
_NUMBER_SET = re.compile(r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?(\^\{?[+*]\}?|_\{?[+>\d ]+\}?)?")
_SET_BUILDER = re.compile(
    r"\\?\{\s*(?P<name>[A-Za-z]|\\[a-z]+ ?)\s*(?:\\in\s*\\mathbb\s*\{?(?P<domain>[RZNQ])\}?)?\s*(?:\\mid|\||:|,(?=[^{}]*(?:[<>=]|\\(?:le|ge|ne|in)(?![A-Za-z])))|\\text\{ such that \})\s*(?P<condition>.+?)\s*\\?\}"
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_ENVIRONMENT = re.compile(
    r"(?:\\left)?[(\[]?\s*\\begin\s*\{(?P<kind>[pbBvV]?matrix|smallmatrix|array)\}(?:\s*\{[lcr| ]+\})?(?P<body>.*?)\\end\s*\{(?P=kind)\}\s*[)\]]?",
    re.DOTALL,
)
_CASES = re.compile(
    r"\\begin\s*\{(?P<kind>d?cases|aligned|align\*?)\}(?P<body>.*)\\end\s*\{(?P=kind)\}", re.DOTALL
)
_CONDITION = re.compile(r"^(?:\\text\s*\{\s*,?\s*(?:if|for|when|where)\s*\}|\b(?:if|for|when|where)\b|,|\s)+")
_IS_PROPERTY = re.compile(r"\bis (?:an? )?(?=(?:even|odd|prime|rational|irrational|an? integer|integer)\b)")
_OTHERWISE = re.compile(r"\W*(?:\\text\s*\{\s*)?(?:otherwise|else|all other .*)\s*\}?\W*", re.IGNORECASE)
_PERCENT_SIGN = r"\%"
_TRAILING_UNIT = re.compile(
    r"(?P<value>.*?[\d)}\]!A-Za-z])\s*(?P<unit>(?:\^\{\\circ\}\s*(?:(?:\\(?:text|mathrm)\s*\{\s*)?[CF]\s*\}?)?|\\(?:text|mathrm|mbox|operatorname|textrm|textbf|mathbf|rm|mathit|textit)\s*\{[^{}]*\}"
    r"|(?<=[\d)}\] ])[A-Za-zμ€£¢¥₹å][A-Za-zμ\-']*|[\u4e00-\u9fff]+)(?:[\s/*.]|\\cdot|\\times|\^\s*\{?-?\d\}?|\\(?:text|mathrm|mbox|rm)\s*\{[^{}]*\}|[A-Za-zμ][A-Za-zμ\-']*|\^\{\\circ\})*)"
)
_UNIT_START = re.compile(
    r"\^\{\\circ\}|\\Omega|\\ohm|\\frac\{\s*\\(?:text|mathrm|rm)|\\(?:text|math|mbox|operatorname|rm)|[A-Za-zμ€£¢¥₹\u4e00-\u9fff]|\\mu"
)
_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)(\s*[A-Za-z]+\s*)")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_GROUPED = re.compile(
    r"(?P<before>[^\d,]*)(?P<number>\d{1,3}(?:,\d{3})+)(?P<after>(?:\.\d+)?(?:[^\d,][^,]*)?)"
)
_CLOCK = re.compile(r"\d{1,2}(?::\d{2})?\s*[ap]\.?\s?m\b\.?", re.IGNORECASE)
_CURRENCY_BEFORE = re.compile(
    r"(?P<sign>-?)\s*(?P<unit>\\usd|€|£|¥|₹|(?:US|USD|Rs\.?|EUR|GBP)(?=\s*\d)|\\text\{\s*(?:Rs\.?|USD|US)\s*\})\s*(?P<value>[\d.].*)"
)
_DEGREES_MINUTES = re.compile(
    r"(-?\d+)\^\{\\circ\}\s*(\d+(?:\.\d+)?)\s*(?:'|\\prime|\^\{?\\prime\}?)\s*(?:(\d+(?:\.\d+)?)\s*''\s*)?"
)
_ORDINAL = re.compile(
    r"(-?\d+)\s*(?:\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?)(?: (?:place|term|position|person|day|row|floor|grade|century))?"
)
_CHANCE = re.compile(r"(\d{1,15}) (?:out of|in) (\d{1,15})")
_WORD_AND_NUMBER = re.compile(r"([A-Za-z][A-Za-z\- ]{2,40}?)\s*\((-?[\d.,]{1,20})\)")
_REMARK = re.compile(
    r"\s*(?:\\text\s*\{\s*)?[(\[]\s*(?:\\text\s*\{\s*)?(?P<words>(?:not|see|because|since|as|by|from|in|rounded|to the nearest|after"
    r"|exact|exactly|approximately|which|where|for)\b[^()]*)[)\]]\s*\}?$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"\s*,?\s*(?:\\text\s*\{\s*,?\s*)?(?:,\s*not|but not|and not|not|because|since|where|for (?:all|any|every|some)|when|with)\b.*$"
)
_DOMAIN = re.compile(
    r"(?<=\s)\(?\s*(?:\\text\s*\{\s*)?\(\s*(?:\\text\s*\{[^{}]*\})?\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*(?:\\(?:ge|le|ne|in)(?![A-Za-z])|[<>=])[^()]*\)$"
)
_NEGATIVE = re.compile(r"(?:\\text\s*\{\s*)?(?:negative|minus)\s*\}?\s*(?=[\d\\.])", re.IGNORECASE)
_PREFIX = re.compile(
    r"^(?:\\text\s*\{\s*)?(?:(?:so|thus|hence|therefore|then),?\s+)*"
    r"(?:(?:the|their|its|his|her|this)\s+[A-Za-z][A-Za-z ']{0,50}?\s(?:is|are|equals|=)(?:\s+(?:equal to|therefore|thus|simply))?\s*:?"
    r"|(?:final |correct |my )?(?:answer|result|solution)s?(?: is| are| equals)?\s*[:=]?|it is|it's|there are|is equal to|equals"
    r"|approximately|about|approx\.?|only|exactly|just|simply|therefore|precisely|namely)(?:\s*\}\s*|\s+)",
    re.IGNORECASE,
)
_ONLY = re.compile(
    r"\s*(?:\\text\s*\{\s*)?(?:only|exactly|is the (?:only |unique |smallest |largest |final )?(?:solution|answer|value|number|one))\s*\}?$",
    re.IGNORECASE,
)
_NUMBER_AND_WORD = re.compile(r"(.*\d)\s*(?:\\text\s*\{)?\s*\(([A-Za-z\- ]{3,40})\)\s*\}?")
_APPROX_MARK = re.compile(r"^(?:\\approx(?![A-Za-z])|\\sim(?![A-Za-z])|~)\s*")
_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|might|could|either|unsure|not sure|guess|probably|alternatively|unknown|or so)\b",
    re.IGNORECASE,
)
_EMPTY_SET = re.compile(r"\\emptyset|\\?\{\s*\\?\}|\\\{\s*\\\}")
_BASED = re.compile(
    r"(?P<digits>\d[0-9A-Za-z. ]*|[0-9A-F]{2,})_\s*\{?\s*(?:\\text\s*\{\s*)?(?P<base>\d{1,2}|[a-z]{3,7})\s*\}?\s*\}?"
)
_CONGRUENCE = re.compile(
    r"(?:(?:(?P<name>[A-Za-z])|(?P<left>[^=<>,]{1,60}?))\s*\\equiv\s*)?(?P<residues>-?\d+(?:\s*,\s*-?\d+)*)\s*\(?\s*\\(?:pmod|mod)\s*\{?\s*(?P<modulus>\d+)\s*\}?\s*\)?"
)
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are|exists?) )?(?:no|none) ?(?:such |real |integer |possible |valid |positive |complex |rational )*"
    r"(?:solutions?|roots?|values?|numbers?|integers?)(?: for [a-z])?(?: exists?)?|(?:the )?empty set|(?:has )?no solutions?"
)
_ALL_REALS = re.compile(
    r"(?:for )?all (?:the )?(?:real numbers?|reals?)|(?:the )?(?:set of )?(?:all )?real numbers|all real values?(?: of [a-z])?"
)
_IS_WORDS = re.compile(r"[A-Za-z][A-Za-z\s,.'\"()&\-:]*")
_FORMULA_WORDS = frozenset("sqrt frac".split())


@functools.lru_cache(maxsize=512)
def read_value(text: str) -> Value:
    """Reads a tidy answer. Never raises: text without a value is ``Unreadable``."""
    text = text.strip()
    for read in _READERS:
        value = read(text)
        if value is not None:
            return value
    return Unreadable(text)


def read_answer(answer: str) -> Value:
    """Reads an answer as it was written. Removes an announcement before it and a remark after it."""
    text = tidy(answer)
    if _HEDGE.search(text):
        return Unreadable(text)
    if is_words(text):
        return _words_or_number(text)
    wrapped = TEXT_WRAPPER.fullmatch(text)
    if wrapped and re.search(r"\d", wrapped[1]):
        text = tidy(wrapped[1])
    for rule in (_PREFIX, _APPROX_MARK, _REMARK, _DOMAIN, _CLAUSE, _ONLY):
        text = _shortened(rule, text)
    swapped = _WORD_AND_NUMBER.fullmatch(plain_words(text))
    if swapped and worded_number(swapped[1]) is not None:
        text = f"{swapped[2]} ({swapped[1]})"
    twice = _NUMBER_AND_WORD.fullmatch(text)
    if twice and worded_number(twice[2]) is not None and worded_number(twice[2]) == exact_number(twice[1]):
        text = twice[1]
    return read_value(tidy(text))


def _words_or_number(text: str) -> Value:
    """Reads words. ``The answer is five`` is a number."""
    value = read_value(text)
    number = (
        worded_number(_PREFIX.sub("", plain_words(text)).strip(" .")) if isinstance(value, Words) else None
    )
    return value if number is None else Number(number, plain_words(text))


def _shortened(rule: re.Pattern[str], text: str) -> str:
    """Removes what a rule matches, unless nothing would be left or a brace would lose its partner."""
    shorter = rule.sub("", text).strip()
    return shorter if shorter and shorter.count("{") == shorter.count("}") else text


def is_approximate(gold: str) -> bool:
    """Returns whether a gold answer is marked as a rounded value."""
    return bool(_APPROX_MARK.match(tidy(gold)))


def both_readings(text: str) -> Collection | None:
    """Returns ``120,240`` as a list of two numbers, or None for text that is not a number with thousands separators."""
    match = _THOUSANDS.fullmatch(text)
    return Collection("", tuple(read_value(part) for part in text.split(","))) if match else None


def is_words(text: str) -> bool:
    """Returns whether tidy text consists of words. A product of letters, such as ``xy``, is a formula."""
    bare = plain_words(text)
    if not _IS_WORDS.fullmatch(bare) or re.search(r"\\[a-z]", TEXT_WRAPPER.sub("", text)):
        return False
    if TEXT_WRAPPER.search(text) and re.search(r"[A-Za-z]{2,}", bare):
        return True
    return bool(re.search(r"[A-Za-z]{4,}|[A-Z]{2,}|[A-Za-z]{2,}\s+[A-Za-z]{2,}|^(?:[Yy]es|[Nn]o)$", bare))


def _read_empty(text: str) -> Value | None:
    return Collection("{}", ()) if _EMPTY_SET.fullmatch(text) else None


def _read_number(text: str) -> Value | None:
    number = exact_number(text)
    if number is not None:
        return Number(number, text)
    scaled = scaled_number(plain_words(text)) if re.search(r"[a-z]{5}", text) else None
    return Number(scaled, plain_words(text)) if scaled is not None else None


def _read_negative(text: str) -> Value | None:
    """Reads ``negative 6`` and ``minus six``."""
    if sign := _NEGATIVE.match(text):
        return read_value(f"-{text[sign.end() :]}")
    words = re.fullmatch(r"(?:negative|minus) (.+)", plain_words(text), re.IGNORECASE)
    number = worded_number(words[1]) if words else None
    return Number(-number, plain_words(text)) if number is not None else None


def _read_grouped(text: str) -> Value | None:
    """Reads ``1,200 dollars``, whose comma separates no items."""
    match = _GROUPED.fullmatch(text)
    if not match or text[:1] in "([{" or match["before"].endswith("("):
        return None
    return read_value(f"{match['before']}{match['number'].replace(',', '')}{match['after']}")


def _read_chance(text: str) -> Value | None:
    """Reads ``2 out of 5`` and ``2 in 5`` as a fraction."""
    match = _CHANCE.fullmatch(plain_words(text))
    if not match:
        return None
    part, whole = map(int, match.groups())
    return Number(Fraction(part, whole), text) if 0 < part <= whole else Unreadable(text)


def _read_words(text: str) -> Value | None:
    if _CLOCK.fullmatch(plain_words(text)):
        return Words(plain_words(text))
    if not is_words(text):
        return None
    number = worded_number(plain_words(text))
    if number is not None:
        return Number(number, plain_words(text))
    counted = re.fullmatch(r"([a-z\-]+)\s+(.+)", plain_words(text), re.IGNORECASE)
    number = worded_number(counted[1]) if counted else None
    unit = parse_unit(counted[2]) if counted and number is not None else None
    if unit is not None and number is not None and counted is not None:
        return Quantity(Number(number, counted[1]), unit)
    return _meaning(plain_words(text)) or Words(plain_words(text))


def _meaning(words: str) -> Value | None:
    """Returns the value of words that stand for a symbol."""
    words = words.casefold().strip(" .")
    if _NO_SOLUTION.fullmatch(words):
        return Collection("{}", ())
    if _ALL_REALS.fullmatch(words):
        return Region((Words(r"\mathbb{R}"),), ())
    sign = re.fullmatch(r"(?:(negative|minus|positive) )?infinity", words)
    return Expression("-\\infty" if sign[1] in ("negative", "minus") else r"\infty") if sign else None


def _read_cases(text: str) -> Value | None:
    match = _CASES.search(text)
    if not match:
        return None
    before = text[: match.start()].strip()
    if before and not before.endswith("="):
        return Unreadable(text)
    rows = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", match["body"]) if row.strip()]
    if len(rows) > MAX_ITEMS:
        return Unreadable(text)
    if match["kind"].endswith("cases") and all(_is_case(row) for row in rows):
        cases = Cases(tuple(map(_read_case, rows)))
        return Assignment((_name(before[:-1]),), (cases,)) if before and _name(before[:-1]) else cases
    return Collection("", tuple(read_value(tidy(row.replace("&", " "))) for row in rows), "and")


def _is_case(row: str) -> bool:
    return ("&" in row and not re.match(r"[^&=]*&\s*=|[^&]*=\s*&", row)) or bool(
        re.search(r"\b(?:if|for|when|otherwise)\b", row)
    )


def _read_case(row: str) -> tuple[Value, Value | None]:
    value, mark, condition = row.partition("&")
    if not mark:
        match = re.search(
            r"\\text\s*\{\s*,?\s*(?:if|for|when|otherwise)\b|\b(?:if|for|when|otherwise)\b", row
        )
        value, condition = (row[: match.start()], row[match.start() :]) if match else (row, "")
    condition = _IS_PROPERTY.sub("", condition)
    if _OTHERWISE.fullmatch(condition):
        return read_value(tidy(value)), None
    return read_value(tidy(value)), read_value(tidy(_CONDITION.sub("", condition.strip())))


def _read_matrix(text: str) -> Value | None:
    match = _ENVIRONMENT.fullmatch(text)
    if not match or match["kind"] in ("vmatrix", "Vmatrix"):
        return None
    rows = [
        row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match["body"].replace(r"\hline", "")) if row.strip()
    ]
    cells = tuple(tuple(tidy(cell) for cell in row.split("&")) for row in rows)
    if not cells or len({len(row) for row in cells}) > 1 or len(cells) * len(cells[0]) > MAX_ITEMS:
        return Unreadable(text)
    return Matrix(cells)


def _read_based(text: str) -> Value | None:
    match = _BASED.fullmatch(text)
    if not match:
        return None
    base = match["base"] if match["base"].isdigit() else str(worded_number(match["base"]))
    return Based(match["digits"].replace(" ", "").lstrip("0").upper(), base)


def _read_congruence(text: str) -> Value | None:
    match = _CONGRUENCE.fullmatch(text)
    if not match or ("\\equiv" not in text and "pmod" not in text and "(" not in text):
        return None
    modulus = Fraction(match["modulus"])
    if modulus == 0:
        return Unreadable(text)
    residues = tuple(Fraction(part.strip()) for part in match["residues"].split(","))
    if match["left"] and not is_multiple(match["left"], residues[0], int(modulus)):
        return Unreadable(text)
    return Congruence(match["name"] or "", residues, modulus, is_statement=bool(match["left"]))


def _read_set_builder(text: str) -> Value | None:
    match = _SET_BUILDER.fullmatch(text)
    if not match:
        return None
    condition = read_value(match["condition"])
    if match["domain"] and match["domain"] != "R":
        condition = Region((condition, Region((Words(f"\\mathbb{{{match['domain']}}}"),), ())), (r"\cap",))
    return Membership(match["name"].strip(), condition)


def _read_list(text: str) -> Value | None:
    parts = split_top_level(text, _SEPARATOR)
    if len(parts) < 2:
        return None
    items = [part.strip() for part in parts if part.strip()]
    if len(items) > MAX_ITEMS or not items or len(items) < len(parts) - 1:
        return Unreadable(text)
    joined_by = "or" if _OR.search(text) else "and" if _AND_WORD.search(text) else ","
    return Collection("", _items(items), joined_by)


def _items(texts: list[str]) -> tuple[Value, ...]:
    """Reads the items of a list. In ``x = 2, 3`` the name holds for the items after it. ``±`` gives two items."""
    items: list[Value] = []
    name: tuple[str, ...] = ()
    for text in texts:
        value = read_value(text)
        if isinstance(value, Assignment):
            name = value.names if len(value.names) == 1 else ()
        elif name and isinstance(value, Number | Expression | Quantity | Percent):
            value = Assignment(name, (value,))
        if isinstance(value, Collection) and value.brackets == "" and value.joined_by == "pm":
            items.extend(value.items)
        else:
            items.append(value)
    return tuple(items)


def _read_relation(text: str) -> Value | None:
    parts = [part.strip() for part in split_top_level(text, _RELATION)]
    if len(parts) < 3 or len(parts) > 15:
        return None
    members, operators = parts[::2], parts[1::2]
    if not all(members[1:]) or (not members[0] and operators[0] != "="):
        return Unreadable(text)
    if not members[0]:
        return read_value(" ".join(parts[2:]))
    if set(operators) <= {"=", r"\approx", r"\equiv"}:
        return _equality(text, members, operators)
    if operators == [r"\in"]:
        return _membership(members[0], read_value(members[1]))
    if set(operators) <= set(_OPERATORS):
        return Inequality(tuple(members), tuple(_OPERATORS[o] for o in operators))
    # x \in \mathbb{R}, x > 2 and the like are lists. A mixture such as x = 3 > 2 has no single value
    return Unreadable(text)


def _membership(name: str, region: Value) -> Value:
    """Reads ``x \\in \\{2, 3\\}`` as ``x = 2, x = 3``."""
    is_finite = isinstance(region, Collection) and region.brackets == "{}" and bool(region.items)
    if is_finite and _name(name) and all(isinstance(item, Number | Expression) for item in region.items):  # type: ignore[union-attr]
        return Collection("", tuple(Assignment((_name(name),), (item,)) for item in region.items))  # type: ignore[union-attr]
    return Membership(name, region)


def _equality(text: str, members: list[str], operators: list[str]) -> Value:
    if len(members) == 2 and not _name(members[0]) and _name(members[1]):
        members = members[::-1]
    num_names = 0
    while num_names < len(members) - 1 and _name(members[num_names]):
        num_names += 1
    names = [_name(member) for member in members[:num_names]]
    rest = members[num_names:]
    if names and members[0].startswith("(") and len(names) == 1:
        return _tuple_assignment(names[0], rest[-1]) if len(rest) == 1 else Unreadable(text)
    if not names and any(has_symbols(member) is not False for member in members):
        return (
            Equation(members[0], members[1]) if len(members) == 2 and operators == ["="] else Unreadable(text)
        )
    kept = [m for m, o in zip(rest, ["=", *operators[num_names:]], strict=True) if o != r"\approx"]
    approximate = read_value(rest[-1]) if len(rest) > 1 and operators[-1] == r"\approx" else None
    values = tuple(read_value(m) for m in (kept or rest[:1]))
    return Assignment(tuple(names), values, approximate)


def _tuple_assignment(name: str, value: str) -> Value:
    """Reads ``(x, y) = (3, 4)`` as ``x = 3, y = 4``."""
    names = [_name(part.strip()) for part in name[1:-1].split(",")]
    read = read_value(value)
    if (
        isinstance(read, Collection)
        and read.brackets == "()"
        and len(read.items) == len(names)
        and all(names)
    ):
        return Collection(
            "()", tuple(Assignment((n,), (v,)) for n, v in zip(names, read.items, strict=True)), "and"
        )
    if isinstance(read, Collection) and read.brackets == "":
        return read
    return Unreadable(f"{name} = {value}")


def _name(text: str) -> str:
    """Returns a name without typesetting, or "" if the text is not a name."""
    text = text.strip()
    if text.startswith("(") and closes_at_end(text):
        parts = [_name(part) for part in text[1:-1].split(",")]
        return f"({','.join(parts)})" if len(parts) > 1 and all(parts) else ""
    if not (_NAME.fullmatch(text) or _WORDY_NAME.fullmatch(text)) or re.fullmatch(r"e|i|\\pi\s?", text):
        return ""
    text = TEXT_WRAPPER.sub(
        r"\1", re.sub(r"\\(?:vec|mathbf|overrightarrow|boldsymbol|hat)\s*\{([^{}]*)\}", r"\1", text)
    )
    return re.sub(r"[{}\s]|m(?=\\angle)", "", text)


def _read_region(text: str) -> Value | None:
    if _NUMBER_SET.fullmatch(text):
        return Region((Words(text.replace(" ", "")),), ())
    text = re.sub(
        r"(\\mathbb\s*\{?\s*[RZNQC]\s*\}?)\s*(?:\\backslash|-|/)\s*(?=\\\{)", r"\1 \\setminus ", text
    )
    parts = split_top_level(text, _SET_OPERATION)
    if len(parts) < 3:
        return None
    values = tuple(read_value(part) for part in parts[::2])
    return Region(values, tuple(parts[1::2])) if all(p.strip() for p in parts) else Unreadable(text)


def _read_ratio(text: str) -> Value | None:
    text = re.sub(r"(?<=\d)\s*(?:\\text\s*\{\s*(?:to|:)\s*\}|\bto\b)\s*(?=\d)", ":", text).replace("{:}", ":")
    parts = [part.strip() for part in split_top_level(text, re.compile(":"))]
    if len(parts) < 2 or not all(parts) or len(parts) > 8:
        return None
    if any(re.search(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", part)) for part in parts):
        return Unreadable(text)
    return Ratio(tuple(parts))


def _read_plus_minus(text: str) -> Value | None:
    if not _PLUS_MINUS.search(text):
        return None
    signs = {"pm": "+-", "mp": "-+"}
    both = [_PLUS_MINUS.sub(lambda m, i=i: signs[m[1]][i], text).strip().removeprefix("+") for i in (0, 1)]  # type: ignore[misc]
    return Collection("", tuple(read_value(one) for one in both), "pm")


def _read_bracketed(text: str) -> Value | None:
    text = (
        re.sub(r"\^\s*\{?\s*(?:T|\\top|\\intercal)\s*\}?$", "", text)
        .replace(r"\langle", "(")
        .replace(r"\rangle", ")")
    )
    text = text.replace(r"\{", "{").replace(r"\}", "}").strip()
    if text[:1] not in ("(", "[", "{") or text[-1:] not in (")", "]", "}") or not closes_at_end(text):
        return None
    brackets, inner = text[0] + text[-1], text[1:-1].strip()
    parts = split_top_level(inner, _SEPARATOR if brackets == "{}" else re.compile(r"\s*[,;]\s*"))
    items = [part.strip() for part in parts]
    if brackets != "{}" and len(items) == 1:
        return read_value(inner) if brackets == "()" and inner else None
    if not all(items) or len(items) > MAX_ITEMS:
        return Unreadable(text)
    return Collection(
        brackets, _items(items) if brackets == "{}" else tuple(read_value(item) for item in items)
    )


def _read_percent(text: str) -> Value | None:
    if not text.endswith(_PERCENT_SIGN):
        return None
    value = read_value(text.removesuffix(_PERCENT_SIGN).rstrip())
    return Percent(value) if isinstance(value, Number | Expression) else Unreadable(text)


def _read_quantity(text: str) -> Value | None:
    if match := _CURRENCY_BEFORE.fullmatch(text):
        return _quantity(match["sign"] + match["value"], plain_words(match["unit"]).rstrip(".").lower(), text)
    if match := _DEGREES_MINUTES.fullmatch(text):
        parts = [Fraction(part or 0) for part in match.groups()]
        degrees = abs(parts[0]) + parts[1] / 60 + parts[2] / 3600
        unit = parse_unit(r"^{\circ}")
        return Quantity(Number(-degrees if text.startswith("-") else degrees, text), unit) if unit else None
    if compound := _compound(text):
        return compound
    if match := _ORDINAL.fullmatch(text):
        return Number(Fraction(match[1]), match[1])
    return _unit_after(text)


def _compound(text: str) -> Quantity | None:
    """Reads ``3 hours 30 minutes`` and ``5 ft 2 in`` as one quantity, in the first unit."""
    parts = _COMPOUND.findall(plain_words(text))
    if len(parts) < 2 or "".join("".join(part) for part in parts) != plain_words(text).replace(" and ", " "):
        return None
    units = [parse_unit(unit) for _, unit in parts]
    numbers = [exact_number(number) for number, _ in parts]
    if any(unit is None or unit.dimensions != units[0].dimensions for unit in units) or None in numbers:  # type: ignore[union-attr]
        return None
    scales = [unit.scale for unit in units if unit]
    if scales != sorted(scales, reverse=True) or len(set(scales)) < len(scales):
        return None
    total = sum(number * scale for number, scale in zip(numbers, scales, strict=True) if number is not None)
    return Quantity(Number(Fraction(total / scales[0]), text), units[0]) if units[0] else None


def _unit_after(text: str) -> Value | None:
    """Splits ``5\\text{ cm}^2``. The unit starts at the first mark, word or text after which the whole rest is a unit."""
    for start in (m.start() for m in _UNIT_START.finditer(text, 1)):
        value, unit = text[:start].rstrip(), text[start:]
        if re.search(r"(?:[\\{(^_/*+\-=]|\\[A-Za-z]+)$", value) and not value.endswith((r"\pi", r"\%")):
            continue
        if unit.startswith("^") and _TRIGONOMETRIC.search(value):
            continue
        if value.count("{") != value.count("}") or value.count("(") != value.count(")"):
            continue
        is_wrapped = unit.startswith(("\\", "^")) or not unit[0].isascii() or text[start - 1] == " "
        if not is_wrapped and exact_number(value) is None:
            continue
        parsed = parse_unit(unit)
        if parsed is None:
            continue
        # 5k and 2m are products. 5cm and 10kJ are quantities
        if not is_wrapped and len(unit) == 1 and unit not in "€£¢¥₹":
            return None
        if (
            not is_wrapped
            and re.fullmatch(r"[a-z]{2}", unit)
            and unit not in ("cm", "mm", "km", "kg", "ft", "in", "ml", "mg", "yd", "mi", "lb", "oz", "hr")
        ):
            continue
        return _quantity(value, unit, text)
    return None


def _quantity(value: str, unit: str, text: str) -> Value:
    read, parsed = read_value(value), parse_unit(unit)
    if parsed is None or not isinstance(read, Number | Expression | Quantity):
        return Unreadable(text)
    if isinstance(read, Quantity):
        # "$5 dollars" names its unit twice
        return read if read.unit == parsed else Unreadable(text)
    return Quantity(read, parsed) if parsed.dimensions else read


def _read_expression(text: str) -> Value | None:
    bare = re.sub(r"\\(?:operatorname|begin|end)\{[a-z]+\*?\}|\\[A-Za-z]+", "", text)
    if re.search(r"\\text|[A-Za-z]{4,}", bare) or (
        r"\text" in text and not re.search(r"\\text\{\s*(?:lcm|gcd|max|min)\s*\}", text)
    ):
        return None
    return Expression(text) if text else None


_READERS = (
    _read_empty, _read_number, _read_negative, _read_grouped, _read_chance, _read_words, _read_based, _read_cases, _read_matrix, _read_congruence, _read_set_builder, _read_list,
    _read_relation, _read_region, _read_plus_minus, _read_percent, _read_quantity, _read_ratio, _read_bracketed,
    _read_expression,
)  # fmt: skip
