"""Tokenized demonstrations in files that are mapped into memory: a million of them take as long to open as ten.

As Python objects they take 17 KB each.
"""

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

from megatron_rasft.data.reading import DataReport, RowFault
from megatron_rasft.types import CodeTests, Demonstration, ProgramCase

FORMAT = 1
_INDEX = "rows.json"
"""Written last: sizes of the other files, and the facts about all rows."""

_COLUMNS: dict[str, tuple[type, int]] = {
    "tokens": (np.int32, 0),
    "token_ends": (np.int64, 2),
    "text": (np.uint8, 0),
    "text_ends": (np.int64, 4),
    "ids": (np.uint8, 0),
    "id_ends": (np.int64, 1),
}
"""File -> type, and numbers a row (0: as many as the ends say).

``token_ends`` says where a row's prompt and its response end, ``text_ends`` where problem, response, source and check end."""


class TokenizedRows(Sequence[Demonstration]):
    """The demonstrations of a folder that ``write_rows`` made; each is made anew when it is asked for.

    Its token ids are views of the file. The folder may be deleted while this is in use.

    Raises:
        ValueError, OSError: the folder holds something else, or less than was written.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"it has format {index['format']}, not {FORMAT}")
        self._num: int = index["num_rows"]
        self.end_ids = frozenset[int](index["end_ids"])
        """Last tokens of the responses."""
        self.num_programs: int = index["num_programs"]
        """Rows whose responses are checked by tests."""
        self.report = _report_from(index["report"])
        self._columns = {
            name: _mapped(folder / name, index["sizes"][name], kind, width)
            for name, (kind, width) in _COLUMNS.items()
        }
        self.ids = _texts(self._columns["ids"], self._columns["id_ends"])
        """Problem ids, in the order of the rows."""

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
        start, (prompt_end, end) = _bounds(self._columns["token_ends"], row)
        tokens = self._columns["tokens"]
        begin, ends = _bounds(self._columns["text_ends"], row)
        problem, response, source, check = _texts(self._columns["text"][begin : ends[-1]], ends - begin)
        answer, tests = json.loads(check)
        return Demonstration(
            problem_id=self.ids[row],
            problem=problem,
            response=response,
            answer=answer,
            prompt_ids=memoryview(tokens[start:prompt_end]),
            response_ids=memoryview(tokens[prompt_end:end]),
            source=source,
            tests=None if tests is None else _tests_from(tests),
        )


class ByProblem[T](Mapping[str, T]):
    """Something about each problem, by its id, made when it is asked for."""

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
    """Write demonstrations one after the other; none is kept in memory.

    Args:
        folder: exists; holds complete rows once this returns.
        report: of the same rows; complete once ``demonstrations`` are used up.
    """
    files = {name: (folder / name).open("wb") for name in _COLUMNS}
    end_ids: set[int] = set()
    num_rows = num_programs = num_tokens = text_end = id_end = 0
    try:
        for d in demonstrations:
            prompt_end = num_tokens + len(d.prompt_ids)
            num_tokens = prompt_end + len(d.response_ids)
            files["tokens"].write(array("i", d.prompt_ids))
            files["tokens"].write(array("i", d.response_ids))
            files["token_ends"].write(array("q", [prompt_end, num_tokens]))
            check = json.dumps([d.answer, None if d.tests is None else asdict(d.tests)])
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
        "report": asdict(report),
    }
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def _mapped(path: Path, size: int, kind: type, width: int) -> NDArray[Any]:
    """A file as an array, [n, width] or flat; pages are read when they are touched."""
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}")
    if not size:  # cannot be mapped
        return np.empty((0, width) if width else 0, kind)
    flat = np.asarray(np.memmap(path, kind, mode="r"))
    return flat.reshape(-1, width) if width else flat


def _bounds(ends: NDArray[np.int64], row: int) -> tuple[int, NDArray[np.int64]]:
    """Where a row begins, and where its parts end."""
    return (int(ends[row - 1, -1]) if row else 0), ends[row]


def _texts(encoded: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    """The texts that lie one after the other."""
    whole = encoded.tobytes()
    bounds = [0, *ends.flatten().tolist()]
    return [whole[start:end].decode("utf-8", "surrogatepass") for start, end in itertools.pairwise(bounds)]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # paths, and so ids, may hold any bytes


def _tests_from(values: dict[str, Any]) -> CodeTests:
    cases = tuple(ProgramCase(**case) for case in values["cases"])
    return CodeTests(**{**values, "tests": tuple(values["tests"]), "cases": cases})


def _report_from(values: dict[str, Any]) -> DataReport:
    rows = {name: [RowFault(**row) for row in values[name]] for name in ("faults", "overlong")}
    return DataReport(**{**{f.name: values[f.name] for f in fields(DataReport)}, **rows})
