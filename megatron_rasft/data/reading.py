"""Reads rows of .jsonl, .jsonl.gz and .parquet files, and reports place and fault of each unusable row."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_rasft.config.data import DataConfig
from megatron_rasft.errors import DataError
from megatron_rasft.types import CodeTests, TestStyle

Message = dict[str, str]

CHAT_ROLES = ("system", "user", "assistant")
_TESTS_COMPANIONS = ("entry_point", "test_setup_code", "test_style")
_TEST_STYLES: tuple[TestStyle, ...] = ("asserts", "check", "pytest")
_NUM_NAMED = 10
"""Maximum number of rows of one kind that a message lists. It only counts the rest and names a complete list."""


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


@dataclass(kw_only=True, slots=True)
class RowFault:
    """One row that cannot be used, with the reason."""

    source: str
    """Place of the row: ``file:line``."""
    reason: str
    """Short text that is the same for all rows with this fault. The report counts rows by it."""
    detail: str = ""
    """Details that apply to this row only."""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(kw_only=True, slots=True)
class DataReport:
    """Counts of all rows that were read, and the rows that are not trained on."""

    num_rows: int = 0
    num_demonstrations: int = 0
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    max_tokens_found: int = 0
    """Tokens of the longest sequence, including sequences that are too long to train on."""
    num_plain_endings: int = 0
    """Rows whose response the chat template would change. Their response is tokenized unchanged, and the end token is
    appended without the template."""
    num_continued: int = 0
    """Rows whose response begins with the tag that opens its reasoning, in a prompt that ends with this tag. They are trained
    without the tag."""
    faults: list[RowFault] = field(default_factory=list)
    overlong: list[RowFault] = field(default_factory=list)
    """Rows with more tokens than --seq-length. They do not count as faults."""
    complete_list: str = "tools/prepare_data.py validate"
    """File or command that lists every row that is not trained on, for messages."""

    @property
    def num_faults_by_reason(self) -> dict[str, int]:
        """Reason -> number of rows with this fault, the most frequent first."""
        return dict(Counter(fault.reason for fault in self.faults).most_common())

    def check(self, config: DataConfig) -> None:
        """Raises DataError if ``config`` refuses rows of the report, or if no rows are left to train on."""
        if self.faults and config.data_bad_rows == "refuse":
            raise DataError(
                f"{len(self.faults)} of {self.num_rows} rows cannot be used:\n{self._named(self.faults)}\n"
                "Correct them, or leave them out with --data-bad-rows skip."
            )
        if self.overlong and config.data_overlong == "refuse":
            raise DataError(
                f"{len(self.overlong)} of {self.num_rows} rows are too long:\n{self._named(self.overlong)}\n"
                "Raise --seq-length, or leave them out with --data-overlong drop."
            )
        if not self.num_demonstrations:
            raise DataError(
                f"none of the {self.num_rows} rows can be trained on: {len(self.faults)} faulty, "
                f"{len(self.overlong)} too long:\n{self._named(self.faults + self.overlong)}\n"
                "Check --data-problem-field, --data-response-field, --data-answer-field, --data-tests-field and --seq-length."
            )

    def write_left_out(self, path: Path) -> None:
        """Writes the rows that are not trained on to ``path``, one per line. Later messages refer to this file."""
        left_out = self.faults + self.overlong
        if left_out:
            path.write_text("".join(f"{row}\n" for row in left_out), encoding="utf-8")
            self.complete_list = str(path)
        else:
            path.unlink(missing_ok=True)

    def _named(self, rows: list[RowFault], num_named: int | None = _NUM_NAMED) -> str:
        lines = [f"  {row}" for row in rows[:num_named]]
        if len(lines) < len(rows):
            lines.append(f"  ... and {len(rows) - len(lines)} more: {self.complete_list} lists all")
        return "\n".join(lines)

    def describe(self, num_named: int | None = _NUM_NAMED) -> str:
        """Returns the report as text, without a final line break.

        Args:
            num_named: maximum number of rows of one kind to list; None lists all.
        """
        lines = [f"rows            {self.num_rows}"]
        if self.num_demonstrations:
            lines.append(f"usable          {self.num_demonstrations}")
        if self.max_tokens_found:
            lines.append(f"prompt tokens   {self.num_prompt_tokens}")
            lines.append(f"response tokens {self.num_response_tokens} (trained)")
            lines.append(f"longest row     {self.max_tokens_found} tokens")
        if self.num_plain_endings:
            lines.append(
                f"kept as they are {self.num_plain_endings} (the chat template would change their response)"
            )
        if self.num_continued:
            lines.append(
                f"continued       {self.num_continued} (the prompt already opens their reasoning, so its first tag is left out)"
            )
        lines.append(f"too long        {len(self.overlong)}")
        if self.overlong:
            lines.append(self._named(self.overlong, num_named))
        lines.append(f"faulty          {len(self.faults)}")
        lines.extend(f"  {num} x {reason}" for reason, num in self.num_faults_by_reason.items())
        if self.faults:
            lines.append(self._named(self.faults, num_named))
        return "\n".join(lines)


def read_rows(
    config: DataConfig, require_answer: bool = True, flag: str = "--train-data"
) -> Iterator[Row | RowFault]:
    """Yields the rows of ``config.train_data`` in order, with a RowFault in place of each row that cannot be used.

    Faulty rows raise no error here; ``DataReport.check`` decides about them.

    Args:
        config: the files, and the names of their fields.
        require_answer: whether a row with neither gold answer nor tests is a fault. False for runs without rollouts.
        flag: the flag that named the files, for messages.

    Raises:
        DataError: a file is missing (raised before any row is read), empty or unreadable.
    """
    paths = check_files(config.train_data, flag)
    names = [path.name for path in paths]
    first_seen: dict[str, str] = {}
    for path in paths:
        # Files in different folders may have the same name. Default ids then contain the complete path, to be unique.
        label = path.name if names.count(path.name) == 1 else str(path)
        num_rows = 0
        for line, record in _read_records(path, config):
            num_rows += 1
            source = f"{path}:{line}"
            try:
                if isinstance(record, FieldError):
                    raise record
                row = _parse_record(
                    record, config, require_answer, source=source, default_id=f"{label}:{line}"
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


class FieldError(ValueError):
    """A row, or one of its fields, cannot be used. ``read_rows`` turns it into a RowFault."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_files(files: list[str], flag: str) -> list[Path]:
    """Returns the files as paths.

    Raises:
        DataError: there are no files, or one does not exist, is empty, or occurs twice.
    """
    if not files:
        raise DataError(f"{flag} names no files. Name at least one: {flag} FILE.jsonl")
    paths: dict[Path, Path] = {}
    for file in files:
        path = Path(file)
        if not path.is_file():
            kind = (
                "is a folder"
                if path.is_dir()
                else "is not a regular file"
                if path.exists()
                else "does not exist"
            )
            raise DataError(
                f"{flag} must name files, but {path} {kind} (current folder: {Path.cwd()}). Correct the path."
            )
        if not path.stat().st_size:
            raise DataError(f"{path} is empty. Write demonstrations to it, or remove it from {flag}.")
        real_path = path.resolve()
        if real_path in paths:
            raise DataError(
                f"{path} and {paths[real_path]} are the same file. Remove one of them from {flag}."
            )
        paths[real_path] = path
    return list(paths.values())


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, row) of any .jsonl, .jsonl.gz or .parquet file. Lines that are not JSON yield an exception object."""
    if path.suffix == ".parquet":
        yield from _read_table(path, lambda names: names)
    else:
        yield from _read_lines(path)


def _read_records(path: Path, config: DataConfig) -> Iterator[tuple[int, Any]]:
    """Yields (line, parsed JSON or FieldError) of each row. Lines count from 1; blank lines are skipped."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, config)
    else:
        yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    is_gzip = path.suffix == ".gz"
    line = 0
    try:
        # Binary mode: only a line feed ends a row, and invalid UTF-8 makes one row faulty instead of the whole file.
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as stream:
            first = b""
            for raw in stream:
                line += 1
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    record = _parse_json(raw)
                    _refuse_other_layout(path, first, raw, record)
                    first = first or raw.strip()
                    yield line, record
    except (OSError, EOFError, zlib.error) as error:
        kind = "gzip file" if is_gzip else "file"
        raise DataError(
            f"{path} is not a readable {kind} after line {line}: {error}. Copy it again, or create it again."
        ) from error


def _refuse_other_layout(path: Path, first: bytes, raw: bytes, record: Any) -> None:
    """Refuses a file that is a JSON array, or objects over several lines, instead of naming a fault of each line.

    Args:
        path: the file.
        first: the first line that is not blank; empty while ``raw`` is this line.
        raw: a line, and ``record`` what it holds as JSON.
    """
    line = raw.strip()
    if not first and _begins_array(line, record):
        kind, rows = "a JSON array", ".[]"
    elif first == b"{" and raw[:1] in (b" ", b"\t", b'"'):  # the first field, usually indented
        kind, rows = "JSON over several lines", "."
    else:
        return
    raise DataError(
        f"{path} is {kind}, but a file needs one row a line. Convert it: jq -c '{rows}' FILE > ROWS.jsonl"
    )


def _begins_array(line: bytes, record: Any) -> bool:
    if isinstance(record, FieldError):
        return line == b"[" or line.startswith((b"[{", b"[ {"))
    return isinstance(record, list) and any(isinstance(row, dict) for row in record)


def _read_parquet(path: Path, config: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = [
        config.data_problem_field,
        config.data_response_field,
        config.data_answer_field,
        config.data_tests_field,
        *_TESTS_COMPANIONS,
        config.data_messages_field,
        config.data_id_field,
    ]

    def choose(names: list[str]) -> list[str]:
        if not {config.data_problem_field, config.data_messages_field}.intersection(names):
            raise DataError(
                f"{path} has neither a column {config.data_problem_field!r} nor {config.data_messages_field!r}. Name one of "
                f"its columns with --data-problem-field or --data-messages-field: {', '.join(names)}."
            )
        return [name for name in names if name in wanted]

    yield from _read_table(path, choose)


def _read_table(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, fields) of each row of a parquet file. ``choose`` selects the columns to read."""
    # Imported here because it takes longer than reading a small .jsonl file, which does not need it.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024, columns=choose(table.schema_arrow.names)):
                for record in batch.to_pylist():
                    line += 1
                    yield line, record
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise DataError(
            f"{path} is not a readable parquet file after row {line}: {error}. Copy it again, or create it again."
        ) from error


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return FieldError("not UTF-8", f"byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return FieldError("not JSON", f"{error.msg}, character {error.colno} of the line")
    # raised for numbers with more than 4,300 digits and for deep nesting
    except (ValueError, RecursionError):
        return FieldError("not JSON", "a number or nesting exceeds Python's limits")


def _parse_record(record: Any, config: DataConfig, require_answer: bool, source: str, default_id: str) -> Row:
    if not isinstance(record, dict):
        raise FieldError("not a JSON object", f"it is a {type(record).__name__}")

    def is_present(name: str) -> bool:
        return record.get(name) is not None

    problem_field, response_field = config.data_problem_field, config.data_response_field
    # Published data sets often have both forms. Problem and response are used if both are present, else the messages.
    is_plain = is_present(problem_field) and is_present(response_field)
    if is_plain or not is_present(config.data_messages_field):
        problem = _parse_text(record, problem_field)
        response = _parse_text(record, response_field)
        messages = [{"role": "user", "content": problem}]
    else:
        messages = _parse_messages(record[config.data_messages_field], config.data_messages_field)
        response = messages.pop()["content"]
        problem = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    tests = _parse_tests(record, config.data_tests_field)
    needs_answer = require_answer and tests is None
    if needs_answer and _is_blank(record.get(config.data_answer_field)) and config.data_tests_field in record:
        if record[config.data_tests_field] is not None:
            raise FieldError(f'"{config.data_tests_field}" is empty')
    return Row(
        problem_id=_parse_id(record, config.data_id_field) or default_id,
        source=source,
        problem=problem,
        response=response,
        answer=_parse_answer(record, config.data_answer_field, needs_answer),
        tests=tests,
        messages=messages,
    )


def _parse_text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise FieldError(f'no "{name}"', f"the row has {', '.join(map(str, record)) or 'no fields'}")
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


def _is_blank(value: Any) -> bool:
    """Returns whether a field holds nothing. In a table, rows without a value often have an empty text or list."""
    if isinstance(value, list):
        return all(_is_blank(item) for item in value)
    return value is None or (isinstance(value, str) and not value.strip())


def _parse_answer(record: dict[str, Any], name: str, require_answer: bool) -> str | None:
    value = record.get(name)
    if not require_answer and not isinstance(value, list) and _is_blank(value):
        return None
    return gold_text(value, name) if value is not None else _parse_text(record, name)


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


def _parse_tests(record: dict[str, Any], name: str) -> CodeTests | None:
    value = record.get(name)
    if _is_blank(value):
        return None
    items = value if isinstance(value, list) else [value]
    scripts = [check_text(item, f'"{name}"') for item in items]
    entry_point, setup, style = (
        None if _is_blank(record.get(field)) else record[field] for field in _TESTS_COMPANIONS
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


def _parse_id(record: dict[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, f'"{name}"')


def _parse_messages(value: Any, name: str) -> list[Message]:
    """Returns the chat after checking it: it needs a user message, and an assistant message at its end."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise FieldError(f'"{name}" is not a list of messages')
    for index, message in enumerate(value):
        role = message.get("role")
        if role not in CHAT_ROLES:
            raise FieldError(
                "unknown chat role", f"message {index} has {role!r}; known roles: {', '.join(CHAT_ROLES)}"
            )
        try:
            check_text(message.get("content"), f'content of a message in "{name}"')
        except FieldError as fault:
            raise FieldError(fault.reason, f"message {index}") from None
    if not value or value[-1]["role"] != "assistant":
        raise FieldError(f'"{name}" does not end with an assistant message')
    if all(message["role"] != "user" for message in value):
        raise FieldError(f'"{name}" has no user message')
    return [{"role": message["role"], "content": message["content"]} for message in value]
