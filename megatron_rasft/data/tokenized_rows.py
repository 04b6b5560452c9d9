"""Tokenized demonstrations in memory-mapped files.

As Python objects they would take 17 KB each. Opening a file of a million takes as long as opening a file of ten.
"""

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megatron_rasft.data.row_report import DataReport, RowFault
from megatron_rasft.types import CodeTests, Demonstration, ProgramCase

FORMAT = 3
_INDEX = "rows.json"
"""Index file with the sizes of the other files and the totals of all rows. It is written last."""

_COLUMNS: dict[str, tuple[type, int]] = {
    "tokens": (np.int32, 0),
    "token_ends": (np.int64, 3),
    "text": (np.uint8, 0),
    "text_ends": (np.int64, 4),
    "ids": (np.uint8, 0),
    "id_ends": (np.int64, 1),
}
"""File -> type of its numbers, and how many a row has (0 if this varies).

``token_ends`` has the end of each row's prompt, response and teacher's prompt in ``tokens``. ``text_ends`` has the ends of its problem,
response, source and check in ``text``, and ``id_ends`` the end of its id in ``ids``.
"""


class TokenizedRows(Sequence[Demonstration]):
    """The demonstrations in a folder written by ``write_rows``. Each access creates a new Demonstration.

    Token ids are views of the mapped file. On a local file system the folder may be deleted while it is in use.

    Raises:
        ValueError, OSError: the folder is incomplete or has another format.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"{folder} has format {index['format']}, not {FORMAT}")
        self._num: int = index["num_rows"]
        self.end_ids = frozenset[int](index["end_ids"])
        """The token ids that end a response."""
        self.num_programs: int = index["num_programs"]
        """Number of rows whose responses are checked by tests."""
        self.fingerprint: str = index["fingerprint"]
        """Hash of all rows; see ``fingerprint_of``."""
        self.report = _report_from(index["report"])
        self._columns = {
            name: _mapped(folder / name, index["sizes"][name], kind, width)
            for name, (kind, width) in _COLUMNS.items()
        }
        self.ids = _texts(self._columns["ids"], self._columns["id_ends"])
        """The problem id of each row."""

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, place: int) -> Demonstration: ...
    @overload
    def __getitem__(self, place: slice) -> list[Demonstration]: ...
    def __getitem__(self, place: int | slice) -> Demonstration | list[Demonstration]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._num))]
        row = range(self._num)[place]
        start, (prompt_end, response_end, end) = _bounds(self._columns["token_ends"], row)
        tokens = self._columns["tokens"]
        begin, ends = _bounds(self._columns["text_ends"], row)
        problem, response, source, check = _texts(self._columns["text"][begin : ends[-1]], ends - begin)
        answer, tests, *fields = json.loads(check)
        return Demonstration(
            problem_id=self.ids[row],
            problem=problem,
            response=response,
            answer=answer,
            prompt_ids=memoryview(tokens[start:prompt_end]),
            response_ids=memoryview(tokens[prompt_end:response_end]),
            source=source,
            tests=None if tests is None else _tests_from(tests),
            fields=fields[0] if fields else None,
            teacher_prompt_ids=memoryview(tokens[response_end:end]),
        )


class ByProblem[T](Mapping[str, T]):
    """Problem id -> a value that ``make`` computes from the problem's demonstration at each access."""

    def __init__(self, demonstrations: Sequence[Demonstration], make: Callable[[Demonstration], T]) -> None:
        self._demonstrations = demonstrations
        self._make = make
        if isinstance(demonstrations, TokenizedRows):
            ids = demonstrations.ids
        else:
            ids = [d.problem_id for d in demonstrations]
        self._places = {problem_id: place for place, problem_id in enumerate(ids)}

    def __getitem__(self, problem_id: str) -> T:
        return self._make(self._demonstrations[self._places[problem_id]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_rows(folder: Path, demonstrations: Iterable[Demonstration], report: DataReport) -> None:
    """Writes demonstrations to files one by one, without keeping them in memory.

    Args:
        folder: an existing folder.
        demonstrations: consumed once.
        report: the report of the same rows. It is read after ``demonstrations`` are consumed, when it is complete.
    """
    files = {name: (folder / name).open("wb") for name in _COLUMNS}
    end_ids: set[int] = set()
    digest = hashlib.sha256()
    num_rows = num_programs = num_tokens = text_end = id_end = 0
    try:
        for d in demonstrations:
            prompt_end = num_tokens + len(d.prompt_ids)
            response_end = prompt_end + len(d.response_ids)
            num_tokens = response_end + len(d.teacher_prompt_ids)
            for ids in (d.prompt_ids, d.response_ids, d.teacher_prompt_ids):
                files["tokens"].write(array("i", ids))
            files["token_ends"].write(array("q", [prompt_end, response_end, num_tokens]))
            check = _check_of(d)
            _add_row(digest, d, check)
            text_ends = []
            for text in (d.problem, d.response, d.source, check):
                text_end += files["text"].write(_encoded(text))
                text_ends.append(text_end)
            files["text_ends"].write(array("q", text_ends))
            id_end += files["ids"].write(_encoded(d.problem_id))
            files["id_ends"].write(array("q", [id_end]))
            end_ids.add(d.response_ids[-1])
            num_programs += d.tests is not None
            num_rows += 1
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    index = {
        "format": FORMAT,
        "num_rows": num_rows,
        "sizes": {name: (folder / name).stat().st_size for name in _COLUMNS},
        "end_ids": sorted(end_ids),
        "num_programs": num_programs,
        "fingerprint": digest.hexdigest(),
        "report": asdict(report),
    }
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def fingerprint_of(demonstrations: Sequence[Demonstration]) -> str:
    """Returns a hash of all rows in their order: ids, texts, checks and tokens, but not the names of their files."""
    if isinstance(demonstrations, TokenizedRows):
        return demonstrations.fingerprint
    digest = hashlib.sha256()
    for demonstration in demonstrations:
        _add_row(digest, demonstration, _check_of(demonstration))
    return digest.hexdigest()


def _check_of(d: Demonstration) -> str:
    parts = [d.answer, None if d.tests is None else asdict(d.tests)]
    # Rows without fields have the text, and so the fingerprint, of the time before --verify-function
    return json.dumps(parts if d.fields is None else [*parts, d.fields])


def _add_row(digest: "hashlib._Hash", d: Demonstration, check: str) -> None:
    for text in (d.problem_id, d.problem, d.response, check):
        encoded = _encoded(text)
        # each part is preceded by its length, so that two rows cannot give the same bytes
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    for ids in (d.prompt_ids, d.response_ids):
        digest.update(len(ids).to_bytes(8, "big") + array("i", ids).tobytes())


def _mapped(path: Path, size: int, kind: type, width: int) -> NDArray[Any]:
    """Maps a file into memory as an array, [n, width] or flat for width 0. Pages are read at their first access."""
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}")
    if not size:  # an empty file cannot be mapped
        return np.empty((0, width) if width else 0, kind)
    flat = np.asarray(np.memmap(path, kind, mode="r"))
    return flat.reshape(-1, width) if width else flat


def _bounds(ends: NDArray[np.int64], row: int) -> tuple[int, NDArray[np.int64]]:
    """Returns the start of a row, and the ends of its parts."""
    return (int(ends[row - 1, -1]) if row else 0), ends[row]


def _texts(encoded: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    """Decodes concatenated texts that end at ``ends``."""
    whole = encoded.tobytes()
    bounds = [0, *ends.flatten().tolist()]
    return [whole[start:end].decode("utf-8", "surrogatepass") for start, end in itertools.pairwise(bounds)]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # ids may contain file names, which can contain any bytes


def _tests_from(values: dict[str, Any]) -> CodeTests:
    cases = tuple(ProgramCase(**case) for case in values["cases"])
    return CodeTests(**{**values, "tests": tuple(values["tests"]), "cases": cases})


def _report_from(values: dict[str, Any]) -> DataReport:
    rows = {name: [RowFault(**row) for row in values[name]] for name in ("faults", "overlong")}
    return DataReport(**{**{f.name: values[f.name] for f in fields(DataReport)}, **rows})
