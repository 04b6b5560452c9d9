"""Reads rows of the user's own benchmarks: in the layout of training with its field names, or in a usual layout of benchmarks."""

from typing import Any

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chats import SHAREGPT_FIELD, parse_prompt
from megatron_rasft.data.fields import FieldError, is_blank, parse_id, parse_tests, parse_text
from megatron_rasft.tools.evaluation.benchmark_rows import TEST_FIELDS, Problem, parse_row
from megatron_rasft.tools.evaluation.known_sets import Kind

FIELDS = (
    "data_problem_field",
    "data_answer_field",
    "data_tests_field",
    "data_messages_field",
    "data_id_field",
)
"""Flags with the names of the fields that an evaluation reads."""

_USUAL_NAMES = {
    "problem": {"question", "text", "prompt", "question_content"},
    "tests": set(TEST_FIELDS),
}
"""Kind of a field -> names that give way to a field that a flag names."""


def kind_of(record: Any, config: DataConfig) -> Kind:
    """Returns ``code`` if a set's first row has tests."""
    fields = record.items() if isinstance(record, dict) else ()
    names = {config.data_tests_field.lower(), *TEST_FIELDS}
    return "code" if any(value and str(name).lower() in names for name, value in fields) else "math"


def parse_own_row(record: dict[str, Any], kind: Kind, default_id: str, config: DataConfig) -> Problem:
    """Returns the problem of a row.

    Raises:
        FieldError: a field is missing or cannot be used.
    """
    record = _with_question(_with_default_names(record, config), config)
    tests = record.get("tests")
    if kind != "code" or is_blank(tests) or (isinstance(tests, list) and isinstance(tests[0], dict)):
        return parse_row(record, kind, default_id)
    checks = parse_tests(record, "tests")
    assert checks is not None, "the tests are not blank"
    return Problem(
        problem_id=parse_id(record, "id") or default_id,
        text=parse_text(record, "problem"),
        tests={
            "tests": list(checks.tests),
            "test_style": checks.style,
            "entry_point": checks.entry_point,
            "test_setup_code": checks.setup,
        },
    )


def _with_default_names(record: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Returns the row with the default names of the fields that flags name."""
    for name in FIELDS:
        kind, field = name.removeprefix("data_").removesuffix("_field"), getattr(config, name)
        if field != kind and record.get(field) is not None:
            others = {kind, field, *_USUAL_NAMES.get(kind, ())}
            kept = {key: value for key, value in record.items() if key not in others}
            record = {**kept, kind: record[field]}
    return record


def _with_question(record: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Adds the problem of a row that has a chat in its place.

    Raises:
        FieldError: the chat has more than one question, or a system message.
    """
    texts = {"problem", *_USUAL_NAMES["problem"]}
    name = next((name for name in ("messages", SHAREGPT_FIELD) if record.get(name) is not None), None)
    if name is None or any(not is_blank(value) for key, value in record.items() if key.lower() in texts):
        return record
    messages = parse_prompt(record[name], name)
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise FieldError(f'"{name}" is not one question', f"its roles are {', '.join(roles) or 'missing'}")
    return {**record, "problem": messages[0]["content"]}
