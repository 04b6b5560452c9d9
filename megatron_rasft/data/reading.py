"""Reads the rows of a data set, and reports place and fault of each unusable row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chats import SHAREGPT_FIELD, Message, parse_messages
from megatron_rasft.data.field_names import check_names
from megatron_rasft.data.fields import (
    TESTS_COMPANIONS,
    FieldError,
    is_blank,
    json_fields,
    parse_answer,
    parse_id,
    parse_tests,
    parse_text,
)
from megatron_rasft.data.records import check_files, field_names, read_records
from megatron_rasft.data.row_report import RowFault
from megatron_rasft.errors import DataError
from megatron_rasft.types import Check, CodeTests, ProblemRow, check_of


@dataclass(kw_only=True, slots=True)
class Row:
    """One usable row: problem, response, and gold answer or tests."""

    problem_id: str
    source: str
    """Place of the row: ``file:line``, or ``file:row`` for parquet. Both count from 1."""
    problem: str
    response: str
    answer: str | None
    tests: CodeTests | None = None
    messages: list[Message]
    """The chat messages before the response, unchanged. A row without messages has its problem as one user message."""
    fields: ProblemRow | None = None
    """The whole row, if it is kept for --verify-function."""

    @property
    def check(self) -> Check:
        """The check of responses: see ``check_of``."""
        return check_of(self.answer, self.tests, self.fields)


def read_rows(
    config: DataConfig, require_answer: bool = True, flag: str = "--train-data", keep_fields: bool = False
) -> Iterator[Row | RowFault]:
    """Yields the rows of ``config.train_data`` in order, with a RowFault in place of each row that cannot be used.

    Faulty rows raise no error here; ``DataReport.check`` decides about them.

    Args:
        config: the files, and the names of their fields.
        require_answer: whether a row with neither gold answer nor tests is a fault. False for runs without rollouts.
        flag: the flag that named the files, for messages.
        keep_fields: whether --verify-function grades the rows. Each row then keeps all its fields and needs neither gold answer nor
            tests; the answer may have any type.

    Raises:
        DataError: a file is missing (raised before any row is read), empty or unreadable.
    """
    paths = check_files(config.train_data, flag)
    names = [path.name for path in paths]
    columns = None if keep_fields else _columns(config)
    first_seen: dict[str, str] = {}
    for path in paths:
        # Files in different folders may have the same name. Default ids then contain the complete path, to be unique.
        label = path.name if names.count(path.name) == 1 else str(path)
        num_rows = 0
        check_names(path, field_names(path), config, require_answer and not keep_fields)
        for line, record in read_records(path, columns):
            num_rows += 1
            source = f"{path}:{line}"
            try:
                if isinstance(record, FieldError):
                    raise record
                row = _parse_record(
                    record, config, require_answer, keep_fields, source=source, default_id=f"{label}:{line}"
                )
                if row.problem_id in first_seen:
                    raise FieldError(
                        "duplicate id", f"{row.problem_id!r} is also at {first_seen[row.problem_id]}"
                    )
            except FieldError as fault:
                yield RowFault(source=source, reason=fault.reason, detail=fault.detail)
                continue
            first_seen[row.problem_id] = source
            yield row
        if not num_rows:
            raise DataError(f"{path} has no rows. Write demonstrations to it, or remove it from {flag}.")


def _columns(config: DataConfig) -> set[str]:
    """Returns the names of all fields that are read."""
    named = {value for name, value in vars(config).items() if name.endswith("_field")}
    return {*named, SHAREGPT_FIELD, *TESTS_COMPANIONS}


def _parse_record(
    record: Any,
    config: DataConfig,
    require_answer: bool,
    keep_fields: bool = False,
    *,
    source: str,
    default_id: str,
) -> Row:
    if not isinstance(record, dict):
        raise FieldError("not a JSON object", f"it is a {type(record).__name__}")

    def is_present(name: str) -> bool:
        return record.get(name) is not None

    problem_field, response_field = config.data_problem_field, config.data_response_field
    # Published data sets often have both forms. Problem and response are used if both are present, else the messages.
    is_plain = is_present(problem_field) and is_present(response_field)
    chat_field = next(filter(is_present, (config.data_messages_field, SHAREGPT_FIELD)), None)
    if is_plain or chat_field is None:
        problem = parse_text(record, problem_field)
        response = parse_text(record, response_field)
        messages = [{"role": "user", "content": problem}]
    else:
        messages = parse_messages(record[chat_field], chat_field)
        response = messages.pop()["content"]
        problem = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    answer, tests = (None, None) if keep_fields else _parse_check(record, config, require_answer)
    return Row(
        problem_id=parse_id(record, config.data_id_field) or default_id,
        source=source,
        problem=problem,
        response=response,
        answer=answer,
        tests=tests,
        messages=messages,
        fields=json_fields(record) if keep_fields else None,
    )


def _parse_check(
    record: dict[str, Any], config: DataConfig, require_answer: bool
) -> tuple[str | None, CodeTests | None]:
    """Returns gold answer and tests of a row."""
    tests = parse_tests(record, config.data_tests_field)
    needs_answer = require_answer and tests is None
    if needs_answer and is_blank(record.get(config.data_answer_field)) and config.data_tests_field in record:
        if record[config.data_tests_field] is not None:
            raise FieldError(f'"{config.data_tests_field}" is empty')
    return parse_answer(record, config.data_answer_field, needs_answer), tests
