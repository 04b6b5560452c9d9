"""Reads the records of .jsonl, .jsonl.gz and .parquet files, and of Hugging Face data sets that were saved to disk."""

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rasft.data.fields import FieldError
from megatron_rasft.errors import DataError
from megatron_rasft.files import similar_file

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

STATE_FILE = "state.json"
"""A folder with this file is a data set that ``datasets.Dataset.save_to_disk`` wrote. The file lists the data files."""
SPLITS_FILE = "dataset_dict.json"
"""A folder with this file has one folder for each split."""

_NUM_SAMPLED = 100
"""Rows from which ``field_names`` collects the names."""
_BATCH_ROWS = 1024


def check_files(files: list[str], flag: str) -> list[Path]:
    """Returns the files, and the folders of saved data sets, as paths.

    Raises:
        DataError: there are no files, or one does not exist, is empty, or occurs twice.
    """
    if not files:
        raise DataError(f"{flag} names no files. Name at least one: {flag} FILE.jsonl")
    paths: dict[Path, Path] = {}
    for file in files:
        path = Path(file)
        _check_file(path, flag)
        real_path = path.resolve()
        if real_path in paths:
            raise DataError(
                f"{path} and {paths[real_path]} are the same file. Remove one of them from {flag}."
            )
        paths[real_path] = path
    return list(paths.values())


def _check_file(path: Path, flag: str) -> None:
    if (path / SPLITS_FILE).is_file():
        splits = [str(folder.parent) for folder in sorted(path.glob(f"*/{STATE_FILE}"))]
        raise DataError(f"{path} is a data set with splits. Name one of them: {flag} {' or '.join(splits)}")
    for file in files_of(path) if (path / STATE_FILE).is_file() else [path]:
        if not file.is_file():
            kind = (
                f"is a folder without {STATE_FILE} of a saved data set"
                if file.is_dir()
                else "is not a regular file"
                if file.exists()
                else "does not exist"
            )
            similar = similar_file(file) if not file.exists() else None
            advice = f"Did you mean {similar}?" if similar else "Correct the path."
            raise DataError(
                f"{flag} must name files or saved data sets, but {file} {kind} (current folder: {Path.cwd()}). {advice}"
            )
        if not file.stat().st_size:
            raise DataError(f"{file} is empty. Write demonstrations to it, or remove it from {flag}.")


def files_of(path: Path) -> list[Path]:
    """Returns the files with the rows of ``path``: the path itself, or the files of a saved data set in their order.

    Raises:
        DataError: the folder is not a saved data set.
    """
    if not path.is_dir():
        return [path]
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names:
            raise ValueError("it names no file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path / STATE_FILE} does not list the files of a saved data set ({error!r}). Save it again with save_to_disk."
        ) from error
    return [path / name for name in names]


def read_records(path: Path, columns: Collection[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (line, row) of each row. Lines that are not JSON yield an exception object.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file, or the folder of a saved data set.
        columns: the columns to read of a table, as far as it has them; None reads all.
    """
    if not is_table(path):
        yield from _read_lines(path)
        return
    line = 0
    for batch in _read_batches(path, columns):
        for record in batch.to_pylist():
            line += 1
            yield line, record


def is_table(path: Path) -> bool:
    """Returns whether all rows of ``path`` have the same fields, as columns."""
    return path.suffix == ".parquet" or path.is_dir()


def field_names(path: Path) -> list[str]:
    """Returns the columns of a table, or the fields that have a value in one of the first rows of a .jsonl file."""
    if is_table(path):
        with _naming(path):
            return _column_names(files_of(path)[0], is_stream=path.is_dir())
    rows = (record for _, record in islice(_read_lines(path), _NUM_SAMPLED) if isinstance(record, dict))
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def _column_names(file: Path, is_stream: bool) -> list[str]:
    """Reads the names without any row, because a first row of pictures can be large."""
    # Imported here and below because it takes longer than reading a small .jsonl file, which does not need it.
    import pyarrow.parquet  # type: ignore[import-untyped]

    if not is_stream:
        with pyarrow.parquet.ParquetFile(file) as table:
            return list(table.schema_arrow.names)
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        return list(reader.schema.names)


@contextmanager
def _naming(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns the errors of reading a table into a DataError that names it, and the place in it."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        kind = "saved data set" if path.is_dir() else "parquet file"
        raise DataError(
            f"{path} is not a readable {kind}{place()}: {error}. Copy it again, or create it again."
        ) from error


def _read_batches(path: Path, columns: Collection[str] | None) -> "Iterator[pyarrow.RecordBatch]":
    """Yields the rows of a parquet file or a saved data set in batches."""
    num_rows = 0
    with _naming(path, lambda: f" after row {num_rows}"):
        for file in files_of(path):
            for batch in _read_stream(file, columns) if path.is_dir() else _read_parquet(file, columns):
                yield batch
                num_rows += batch.num_rows


def _read_parquet(path: Path, columns: Collection[str] | None) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        chosen = _existing(table.schema_arrow.names, columns)
        yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=chosen)


def _read_stream(path: Path, columns: Collection[str] | None) -> "Iterator[pyarrow.RecordBatch]":
    """Yields the batches of an Arrow stream, which is the format of saved data sets."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        chosen = _existing(reader.schema.names, columns)
        for batch in reader:
            yield batch.select(chosen)


def _existing(names: list[str], columns: Collection[str] | None) -> list[str]:
    return [name for name in names if columns is None or name in columns]


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


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return FieldError("not UTF-8", f"byte {error.start} of the line")
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        return FieldError("not JSON", f"{problem} at character {error.colno} of the line")
    # raised for numbers with more than 4,300 digits and for deep nesting
    except (ValueError, RecursionError):
        return FieldError("not JSON", "a number or nesting exceeds Python's limits")
