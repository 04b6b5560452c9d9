"""Reads single fields of a row: text, gold answer, tests and id."""

import json
import re
from decimal import Decimal
from typing import Any

from megatron_rasft.types import CodeTests, ProblemRow, TestStyle

TESTS_COMPANIONS = ("entry_point", "test_setup_code", "test_style")
"""Optional fields of a row with tests."""

_TEST_STYLES: tuple[TestStyle, ...] = ("asserts", "check", "pytest")


class FieldError(ValueError):
    """A row, or one of its fields, cannot be used. ``read_rows`` turns it into a RowFault."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def parse_text(record: dict[str, Any], name: str) -> str:
    """Returns a field that every row must have."""
    value = record.get(name)
    if value is None:
        found = ", ".join(map(str, record)) or "no fields"
        raise FieldError(f'no "{name}"', "it is null" if name in record else f"the row has {found}")
    return check_text(value, f'"{name}"')


def check_text(value: Any, what: str) -> str:
    """Returns ``value`` if it is text that a tokenizer can read and that is not blank.

    Raises:
        FieldError: the value is something else. ``what`` names it.
    """
    if not isinstance(value, str):
        raise FieldError(f"{what} is not text", f"it is a {type(value).__name__}")
    if not value.strip():
        raise FieldError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON allows half of a surrogate pair, tokenizers do not
        raise FieldError(f"{what} is not valid Unicode", f"character {error.start}") from None
    return value


def is_blank(value: Any) -> bool:
    """Returns whether a field holds nothing. In a table, rows without a value often have an empty text or list."""
    if isinstance(value, list):
        return all(is_blank(item) for item in value)
    return value is None or (isinstance(value, str) and not value.strip())


def parse_answer(record: dict[str, Any], name: str, require_answer: bool) -> str | None:
    """Returns the gold answer; None if the row has none and needs none."""
    value = record.get(name)
    if not require_answer and not isinstance(value, list) and is_blank(value):
        return None
    return gold_text(value, name) if value is not None else parse_text(record, name)


def gold_text(value: Any, name: str) -> str:
    """Returns a gold answer as text. Training and evaluation accept and refuse the same values.

    Args:
        value: the field's value: text or a finite number.
        name: name of the field, for messages.

    Raises:
        FieldError: the value is something else, such as a boolean, NaN, a list or an object.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return check_text(value, f'"{name}"')
    number = Decimal(str(value))
    if not number.is_finite():
        raise FieldError(f'"{name}" is not a finite number', f"it is {value}")
    # never in the form 1e-07, which is a product in mathematical notation
    text = format(number, "f")
    # a table has 2.0 for 2 if the column also has empty fields
    return text.removesuffix(".0") if isinstance(value, float) else text


def parse_tests(record: dict[str, Any], name: str) -> CodeTests | None:
    """Returns the tests of a program; None if the row has none."""
    value = record.get(name)
    if is_blank(value):
        return None
    items = value if isinstance(value, list) else [value]
    scripts = [check_text(item, f'"{name}"') for item in items]
    entry_point, setup, style = (
        None if is_blank(record.get(field)) else record[field] for field in TESTS_COMPANIONS
    )
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise FieldError('"entry_point" is not a function name', repr(entry_point)[:50])
    if setup is not None and not isinstance(setup, str):
        raise FieldError('"test_setup_code" is not text', f"it is a {type(setup).__name__}")
    if style is not None and style not in _TEST_STYLES:
        raise FieldError(
            "unknown test_style", f"the row has {str(style)[:50]!r}; known styles: {', '.join(_TEST_STYLES)}"
        )
    style = style or _style_of("\n".join(scripts))
    if style == "check" and entry_point is None:
        raise FieldError('tests of style "check" need an "entry_point"')
    return CodeTests(style=style, tests=tuple(scripts), entry_point=entry_point or "", setup=setup or "")


def _style_of(source: str) -> TestStyle:
    if re.search(r"^def[ \t]+check[ \t]*\(", source, re.MULTILINE):
        return "check"
    imports = re.search(r"^[ \t]*(?:from|import)[ \t]+solution\b", source, re.MULTILINE)
    functions = re.search(r"^(?:def[ \t]+test|class[ \t]+Test)", source, re.MULTILINE)
    return "pytest" if imports or functions else "asserts"


def parse_id(record: dict[str, Any], name: str) -> str | None:
    """Returns the id of a row as text; None if it has none."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, f'"{name}"')


def json_fields(record: dict[str, Any]) -> ProblemRow:
    """Returns a row with JSON values only. A table may have others: dates and decimal numbers become text.

    Raises:
        FieldError: a field holds bytes.
    """

    def as_text(value: Any) -> str:
        if isinstance(value, bytes):
            raise FieldError("a field holds bytes, which --verify-function cannot get", repr(value[:20]))
        return str(value)

    fields: ProblemRow = json.loads(json.dumps(record, default=as_text))
    return fields
