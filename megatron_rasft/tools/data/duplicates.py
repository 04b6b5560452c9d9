"""Finds rows that repeat the problem of an earlier row."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_rasft.data.reading import Row
from megatron_rasft.data.row_report import RowFault


class Duplicate(NamedTuple):
    """A row with the problem of an earlier row."""

    source: str
    first: str
    """Place of the first row with this problem."""
    difference: str
    """The field in which the rows differ: answer or response; "" for a copy."""

    def __str__(self) -> str:
        if not self.difference:
            return f"{self.source}: repeats {self.first}"
        return f"{self.source}: has the problem of {self.first}, but another {self.difference}"


class _Seen(NamedTuple):
    source: str
    check: bytes
    response: bytes


@dataclass(kw_only=True)
class Duplicates:
    """The rows with the problem of an earlier row. Problems are equal if they differ in white space only."""

    found: list[Duplicate] = field(default_factory=list)
    _first: dict[bytes, _Seen] = field(default_factory=dict)
    """Hash of a problem -> its first row."""

    def watch(self, rows: Iterable[Row | RowFault]) -> Iterator[Row | RowFault]:
        """Yields the rows unchanged, and adds those with the problem of an earlier row to ``found``."""
        for row in rows:
            if isinstance(row, Row):
                self._compare(row)
            yield row

    def describe(self) -> str:
        """Returns the rows as text, without a final line break."""
        return "\n".join([f"duplicates      {len(self.found)}", *(f"  {row}" for row in self.found)])

    def _compare(self, row: Row) -> None:
        check = row.answer if row.tests is None else repr(row.tests)
        seen = _Seen(row.source, _digest([check or ""]), _digest([row.response]))
        first = self._first.setdefault(
            _digest([text for message in row.messages for text in message.values()]), seen
        )
        if first is not seen:
            same_check, same_response = seen.check == first.check, seen.response == first.response
            difference = "" if same_check and same_response else "response" if same_check else "answer"
            self.found.append(Duplicate(row.source, first.source, difference))


def _digest(texts: Sequence[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(" ".join(text.split()).encode("utf-8") + b"\0")
    return digest.digest()
