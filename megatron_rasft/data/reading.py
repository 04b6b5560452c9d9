"""Rows of .jsonl, .jsonl.gz and .parquet files, each with its place, each fault named."""

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
"""Rows of a kind that a message names one by one; the rest is a count, and where they are named."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One usable row: what the prompt is made of, the response and the gold answer."""

    problem_id: str
    source: str
    """``file:line``; in parquet the row number. Both count from 1."""
    problem: str
    response: str
    answer: str | None
    tests: CodeTests | None = None
    messages: list[Message]
    """The chat before the response, as it stands in the row; a plain row is one user message."""


@dataclass(kw_only=True, slots=True)
class RowFault:
    """One row that cannot be used, and why."""

    source: str
    """``file:line``."""
    reason: str
    """Short and the same for all rows of a kind: the report counts by it."""
    detail: str = ""
    """What only this row says."""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(kw_only=True, slots=True)
class DataReport:
    """What became of every row that was read."""

    num_rows: int = 0
    num_demonstrations: int = 0
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    max_tokens_found: int = 0
    """Tokens of the longest sequence, over-long ones included."""
    num_plain_endings: int = 0
    """Rows whose response the chat template changes: tokenised as it stands and closed by hand."""
    faults: list[RowFault] = field(default_factory=list)
    overlong: list[RowFault] = field(default_factory=list)
    """Rows with more tokens than fit; not faults."""
    all_named_by: str = "tools/prepare_data.py validate"
    """What names every row that is left out, for messages."""

    @property
    def num_faults_by_reason(self) -> dict[str, int]:
        """Faulty rows per reason, the most frequent first."""
        return dict(Counter(fault.reason for fault in self.faults).most_common())

    def check(self, config: DataConfig) -> None:
        """Raise DataError if ``config`` refuses what is in the report, or if nothing is left to train on."""
        if self.faults and config.data_bad_rows == "refuse":
            raise DataError(
                f"{len(self.faults)} of {self.num_rows} rows cannot be used:\n{self._named(self.faults)}\n"
                "Correct them, or train without them: --data-bad-rows skip."
            )
        if self.overlong and config.data_overlong == "refuse":
            raise DataError(
                f"{len(self.overlong)} of {self.num_rows} rows are too long:\n{self._named(self.overlong)}\n"
                "Raise --seq-length, or train without them: --data-overlong drop."
            )
        if not self.num_demonstrations:
            raise DataError(
                f"none of the {self.num_rows} rows can be trained on: {len(self.faults)} faulty, "
                f"{len(self.overlong)} too long:\n{self._named(self.faults + self.overlong)}\n"
                "Check --data-problem-field, --data-response-field, --data-answer-field, --data-tests-field and --seq-length."
            )

    def write_left_out(self, path: Path) -> None:
        """Name every row that is not trained on, one a line; messages refer to ``path`` from now on."""
        left_out = self.faults + self.overlong
        if left_out:
            path.write_text("".join(f"{row}\n" for row in left_out), encoding="utf-8")
            self.all_named_by = str(path)
        else:
            path.unlink(missing_ok=True)

    def _named(self, rows: list[RowFault], num_named: int | None = _NUM_NAMED) -> str:
        lines = [f"  {row}" for row in rows[:num_named]]
        if len(lines) < len(rows):
            lines.append(f"  ... and {len(rows) - len(lines)} more: {self.all_named_by} names all")
        return "\n".join(lines)

    def describe(self, num_named: int | None = _NUM_NAMED) -> str:
        """The report as lines of text, without a final line break.

        Args:
            num_named: most rows of a kind that are named; None names all.
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
                f"closed by hand  {self.num_plain_endings} (the chat template changes their response)"
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
    """Stream the rows of ``config.train_data``, a RowFault in the place of each that cannot be used.

    Nothing is refused here, ``DataReport.check`` decides; only a file that is missing, empty or unreadable
    raises DataError, the missing ones before any row is read.

    Args:
        config: the files and the names of their fields.
        require_answer: a row with neither gold answer nor tests is a fault; False is for runs without any rollouts.
        flag: that named the files, for messages.
    """
    paths = check_files(config.train_data, flag)
    names = [path.name for path in paths]
    first_seen: dict[str, str] = {}
    for path in paths:
        # Two folders may hold files of one name: their rows are then called by the whole path.
        label = path.name if names.count(path.name) == 1 else str(path)
        num_rows = 0
        for line, record in _read_records(path, config):
            num_rows += 1
            source = f"{path}:{line}"
            try:
                if isinstance(record, _Fault):
                    raise record
                row = _parse_record(
                    record, config, require_answer, source=source, default_id=f"{label}:{line}"
                )
                if row.problem_id in first_seen:
                    raise _Fault(
                        "duplicate id", f"{row.problem_id!r} is also at {first_seen[row.problem_id]}"
                    )
            except _Fault as fault:
                yield RowFault(source=source, reason=fault.reason, detail=fault.detail)
                continue
            first_seen[row.problem_id] = source
            yield row
        if not num_rows:
            raise DataError(f"{path} holds no rows. Write the demonstrations to it or take it out of {flag}.")


class _Fault(Exception):
    """Why the row being parsed cannot be used; never leaves this module."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def check_files(files: list[str], flag: str) -> list[Path]:
    """The files as paths, after every one of them was found to be there, not empty and named once."""
    if not files:
        raise DataError(f"there is no data. Name at least one file: {flag} FILE.jsonl")
    paths: dict[Path, Path] = {}
    for file in files:
        path = Path(file)
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(
                f"{flag} must name files, {path} {kind} (seen from {Path.cwd()}). Correct the path."
            )
        if not path.stat().st_size:
            raise DataError(f"{path} is empty. Write the demonstrations to it or take it out of {flag}.")
        real_path = path.resolve()
        if real_path in paths:
            raise DataError(f"{path} and {paths[real_path]} are one file. Take one of them out of {flag}.")
        paths[real_path] = path
    return list(paths.values())


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row as it stands) of any .jsonl, .jsonl.gz or .parquet file; what is no JSON comes as an exception."""
    if path.suffix == ".parquet":
        yield from _read_table(path, lambda names: names)
    else:
        yield from _read_lines(path)


def _read_records(path: Path, config: DataConfig) -> Iterator[tuple[int, Any]]:
    """(line, parsed JSON or _Fault) of each row; lines count from 1 and blank ones are no rows."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, config)
    else:
        yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    is_gzip = path.suffix == ".gz"
    line = 0
    try:
        # Bytes, so that only a line feed ends a row and bad UTF-8 spoils one row, not the file.
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as stream:
            for raw in stream:
                line += 1
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield line, _parse_json(raw)
    except (OSError, EOFError, zlib.error) as error:
        kind = "gzip file" if is_gzip else "file"
        raise DataError(
            f"{path} is not a readable {kind} after line {line}: {error}. Copy or make it again."
        ) from error


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
                f"{path} has neither a column {config.data_problem_field!r} nor "
                f"{config.data_messages_field!r}; its columns are {', '.join(names)}. Name one with "
                "--data-problem-field or --data-messages-field."
            )
        return [name for name in names if name in wanted]

    yield from _read_table(path, choose)


def _read_table(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, its fields) of a parquet file; ``choose`` picks the columns that are read."""
    # Only parquet files need pyarrow, and importing it takes longer than reading a small .jsonl.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024, columns=choose(table.schema_arrow.names)):
                for record in batch.to_pylist():
                    line += 1
                    yield line, record
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable parquet file after row {line}: {error}. Copy or make it again."
        ) from error


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Fault("not UTF-8", f"byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return _Fault("not JSON", f"{error.msg}, character {error.colno} of the line")
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
        return _Fault("not JSON", "a number or a nesting beyond Python's limits")


def _parse_record(record: Any, config: DataConfig, require_answer: bool, source: str, default_id: str) -> Row:
    if not isinstance(record, dict):
        raise _Fault("not a JSON object", f"it is a {type(record).__name__}")

    def is_present(name: str) -> bool:
        return record.get(name) is not None

    problem_field, response_field = config.data_problem_field, config.data_response_field
    # Published sets often carry both forms; the plain one is taken where it is complete.
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
    return Row(
        problem_id=_parse_id(record, config.data_id_field) or default_id,
        source=source,
        problem=problem,
        response=response,
        answer=_parse_answer(record, config.data_answer_field, require_answer and tests is None),
        tests=tests,
        messages=messages,
    )


def _parse_text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise _Fault(f'no "{name}"', f"the row has {', '.join(map(str, record)) or 'no fields'}")
    return _check_text(value, f'"{name}"')


def _check_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Fault(f"{what} is not text", f"it is a {type(value).__name__}")
    if not value.strip():
        raise _Fault(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, a tokenizer cannot read it
        raise _Fault(f"{what} is not valid Unicode", f"character {error.start}") from None
    return value


def _parse_answer(record: dict[str, Any], name: str, require_answer: bool) -> str | None:
    value = record.get(name)
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    if is_blank and not require_answer:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return _parse_text(record, name)


def _parse_tests(record: dict[str, Any], name: str) -> CodeTests | None:
    value = record.get(name)
    if value is None:
        return None
    scripts = value if isinstance(value, list) else [value]
    if not scripts:
        raise _Fault(f'"{name}" is empty')
    scripts = [_check_text(script, f'"{name}"') for script in scripts]
    entry_point, setup, style = (record.get(field) for field in _TESTS_COMPANIONS)
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise _Fault('"entry_point" is no name of a function', repr(entry_point)[:50])
    if setup is not None and not isinstance(setup, str):
        raise _Fault('"test_setup_code" is not text', f"it is a {type(setup).__name__}")
    if style is not None and style not in _TEST_STYLES:
        raise _Fault(
            "unknown test_style", f"the row has {str(style)[:50]!r}, known are {', '.join(_TEST_STYLES)}"
        )
    style = style or _style_of("\n".join(scripts))
    if style == "check" and entry_point is None:
        raise _Fault('tests of style check need an "entry_point"')
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
    return _check_text(value, f'"{name}"')


def _parse_messages(value: Any, name: str) -> list[Message]:
    """The whole chat, checked: at least one user message, an assistant message last."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _Fault(f'"{name}" is not a list of messages')
    for index, message in enumerate(value):
        role = message.get("role")
        if role not in CHAT_ROLES:
            raise _Fault(
                "unknown chat role", f"message {index} has {role!r}, known are {', '.join(CHAT_ROLES)}"
            )
        try:
            _check_text(message.get("content"), f'content of a message in "{name}"')
        except _Fault as fault:
            raise _Fault(fault.reason, f"message {index}") from None
    if not value or value[-1]["role"] != "assistant":
        raise _Fault(f'"{name}" does not end with an assistant message')
    if all(message["role"] != "user" for message in value):
        raise _Fault(f'"{name}" has no user message')
    return [{"role": message["role"], "content": message["content"]} for message in value]
