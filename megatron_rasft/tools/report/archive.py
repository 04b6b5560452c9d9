"""All rollouts of a run and the texts of their problems, as compressed blocks that the page's search opens.

Blocks wait in a temporary file until the page is written. So memory grows with the number of blocks, and not with the texts.
"""

import base64
import json
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rasft.tools.report.mathematics import Formulas
from megatron_rasft.tools.report.texts import printable, reason_of, shortened

MAX_BLOCK_ROWS = 256
"""Rollouts or problems of one block. The browser decompresses whole blocks, so small ones show a single rollout faster."""
MAX_BLOCK_CHARS = 2_000_000
MAX_FORMULAS = 10_000
"""Different formulas that are drawn in the rollouts of a run, and as many in its problems."""
_END_OF_TEXT = "\0"
"""Separates texts. ``printable`` removes it from them."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of the temporary file."""

    group: int
    """Steps before the refresh of the block's rollouts; 0 for problems."""
    num_rows: int
    offset: int
    size: int


@dataclass
class Blocks:
    """A sequence of blocks. Every block holds rows of one group."""

    file: Any
    """The temporary file, to which all sequences of an archive append."""
    max_rows: int | None = None
    """Number of rows to keep; None for all. The oldest blocks are left out first."""
    blocks: deque[Block] = field(default_factory=deque)
    num_rows: int = 0
    """Rows in ``blocks``."""
    formulas: Formulas = field(default_factory=lambda: Formulas(MAX_FORMULAS))
    """The formulas of the texts."""
    _group: int = 0
    _rows: list[Sequence[Any]] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _formulas: list[list[int]] = field(default_factory=list)
    _num_chars: int = 0

    def add(self, group: int, row: Sequence[Any], texts: Sequence[str]) -> None:
        """Appends a row and its texts. Every row of a sequence must have the same number of texts."""
        is_full = len(self._rows) >= MAX_BLOCK_ROWS or self._num_chars >= MAX_BLOCK_CHARS
        if self._rows and (group != self._group or is_full):
            self.flush()
        self._group = group
        self._rows.append([printable(cell) for cell in row])
        self._texts += [printable(str(shortened(text))) for text in texts]
        added = self._texts[-len(texts) :]
        self._formulas += [self.formulas.numbers(text) for text in added]
        self._num_chars += sum(map(len, added))

    def flush(self) -> None:
        """Writes the rows that were added last."""
        if not self._rows:
            return
        rows, formulas = (json.dumps(part, ensure_ascii=False) for part in (self._rows, self._formulas))
        content = " ".join(packed(part) for part in (rows, _END_OF_TEXT.join(self._texts), formulas)).encode()
        self.blocks.append(
            Block(self._group, len(self._rows), self.file.seek(0, 2), self.file.write(content))
        )
        self.num_rows += len(self._rows)
        self._rows, self._texts, self._formulas, self._num_chars = [], [], [], 0
        while self.max_rows is not None and self.num_rows > self.max_rows and len(self.blocks) > 1:
            self.num_rows -= self.blocks.popleft().num_rows

    def discard_from(self, group: int) -> None:
        """Leaves out the rows of this group and of later ones."""
        self.flush()
        self.blocks = deque(block for block in self.blocks if block.group < group)
        self.num_rows = sum(block.num_rows for block in self.blocks)

    def contents(self) -> Iterator[tuple[Block, str]]:
        """Yields each block with its content: rows, texts and numbers of formulas. Each is ``packed``; spaces separate them."""
        self.flush()
        for block in self.blocks:
            self.file.seek(block.offset)
            yield block, self.file.read(block.size).decode("ascii")


def packed(text: str) -> str:
    """Compresses a text, and writes it in base64."""
    return base64.b64encode(zlib.compress(text.encode())).decode("ascii")


class Archive:
    """The rollouts and problems of one run.

    Args:
        folder: the folder of the temporary file, which takes about as much space as the page.
        max_rollouts: number of rollouts to keep, the newest ones.
    """

    def __init__(self, folder: Path, max_rollouts: int) -> None:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - deleted by the system when the archive is
        self.rollouts = Blocks(file, max_rollouts)
        self.problems = Blocks(file)

    def add_rollout(self, step: int, record: dict[str, Any], num_tokens: int, is_solved: bool | None) -> None:
        """Appends a rollout.

        Args:
            step: steps before the refresh.
            record: line of the file, as ``rollouts.parse`` returns it.
            num_tokens: length of the response.
            is_solved: whether it is complete and correct; None if it does not count as an attempt.
        """
        row = (
            record["problem_id"],
            int(record["sample_index"]),
            str(record["verdict"] or "unverified"),
            reason_of(record),
            str(record["finish_reason"]),
            str(record.get("filtered_by", "")),
            num_tokens,
            float(record.get("weight", 0.0)),
            int(record.get("policy_age", 0)),
            is_solved,
        )
        self.rollouts.add(step, row, [str(record.get("text", ""))])

    def add_problem(
        self, problem_id: str, course: str, history: Sequence[Sequence[float]], texts: Sequence[str] | None
    ) -> None:
        """Appends a problem.

        Args:
            problem_id: its id.
            course: its course over the refreshes.
            history: (step, number of samples, attempts, solved, solve rate) of each refresh.
            texts: problem, answer or tests, and demonstration; None if they were not found.
        """
        row = (problem_id, course, history, texts is not None)
        self.problems.add(0, row, texts or ("", "", ""))
