"""Finds training rows whose prompts contain a benchmark's problem: exact copies, equal ids, and shared n-grams of words."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nltk.util import ngrams

from megatron_rasft.data.records import read_records
from megatron_rasft.errors import DataError

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Characters of scripts that are written without spaces between words."""

_WORD = re.compile(rf"(?=[^\W_])[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_TEXT_FIELDS = ("problem", "question", "text", "prompt", "question_content")

Gram = tuple[str, ...]


@dataclass(kw_only=True)
class BenchmarkOverlap:
    """The overlap of one benchmark with all training rows. Counts refer to benchmark rows unless the name says otherwise."""

    path: Path
    num_rows: int = 0
    num_short: int = 0
    """Rows with fewer words than an n-gram. Only their exact copies and equal ids can be found."""
    sharing: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Benchmark row -> training rows that share an n-gram with it."""
    covered: dict[str, float] = field(default_factory=dict)
    """Benchmark row -> share of its n-grams that occur in training rows; only rows with a share above 0."""
    exact: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Benchmark row -> training rows with the same words in the same order."""
    same_id: dict[str, int] = field(default_factory=dict)
    """Benchmark row -> training row with the same id and any text. Ids that are only numbers are not compared."""

    @property
    def num_half(self) -> int:
        """Number of rows with at least half of their n-grams in the training data."""
        return sum(share >= 0.5 for share in self.covered.values())

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a benchmark row and a training row that share an n-gram."""
        return sum(map(len, self.sharing.values()))

    @property
    def train_rows(self) -> set[int]:
        """Training rows that share an n-gram with any row of the benchmark."""
        return set().union(*self.sharing.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts, and the names of the counted rows, as JSON values."""
        return {
            "benchmark": self.path.name,
            "rows": self.num_rows,
            "short": self.num_short,
            "sharing": len(self.sharing),
            "half": self.num_half,
            "exact": len(self.exact),
            "same_id": len(self.same_id),
            "training_rows_hit": len(self.train_rows),
            "row_pairs": self.num_pairs,
            "covered": dict(sorted(self.covered.items(), key=lambda item: -item[1])),
            "exact_rows": sorted(self.exact),
            "same_id_rows": sorted(self.same_id),
        }


@dataclass(kw_only=True)
class Contamination:
    """The overlaps of a training set with benchmarks, and the training rows to drop."""

    num_train_rows: int
    overlaps: list[BenchmarkOverlap]
    dropped: dict[int, str]
    """Training row -> the reason to drop it: the benchmark row that it repeats, and to which extent."""

    def describe(self) -> str:
        """Returns a table of the counts, and the first ten rows to drop, without a final line break."""
        head = ("benchmark", "rows", "short", "sharing", "half", "exact", "same id", "train rows", "pairs")
        rows = [
            (d["benchmark"], *(str(d[k]) for k in ("rows", "short", "sharing", "half", "exact", "same_id", "training_rows_hit", "row_pairs")))
            for d in (overlap.as_dict() for overlap in self.overlaps)
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            )
            for row in (head, *rows)
        ]
        lines.append(f"training rows   {self.num_train_rows}")
        lines.append(f"contaminated    {len(self.dropped)}")
        lines += [f"  row {row + 1}: {why}" for row, why in list(self.dropped.items())[:10]]
        if len(self.dropped) > 10:
            lines.append(f"  ... and {len(self.dropped) - 10} more")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values. Training rows count from 1, like the lines of their file."""
        return {
            "training_rows": self.num_train_rows,
            "dropped": {str(row + 1): why for row, why in self.dropped.items()},
            "benchmarks": [overlap.as_dict() for overlap in self.overlaps],
        }


def words_of(text: str) -> list[str]:
    """Returns the words of a text: runs of letters and digits, in lower case. The name of a LaTeX command is a word too.

    In scripts that are written without spaces, such as Chinese, Japanese and Thai, each character counts as a word. Full-width
    letters and digits count as the ordinary ones.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def find_contamination(
    problems: Iterable[Sequence[str]], benchmarks: Iterable[Path], n: int = 13, max_share: float = 0.5
) -> Contamination:
    """Compares training problems with benchmarks.

    Args:
        problems: id of each training row, and the text of each of its prompt's messages. The n-grams of all messages count,
            and a copy is exact if one message has the words of the benchmark row.
        benchmarks: files of benchmark rows in any of the usual layouts. Answers and tests are not compared.
        n: words per n-gram.
        max_share: a training row is dropped if it contains at least this share of a benchmark row's n-grams, is an
            exact copy, or has the same id. 0 drops every row that shares any n-gram, even a common phrase.

    Raises:
        DataError: a benchmark row has no text.
    """
    index: dict[Gram, list[tuple[int, str]]] = defaultdict(list)
    by_words: dict[Gram, list[tuple[int, str]]] = defaultdict(list)
    by_id: dict[str, list[tuple[int, str]]] = defaultdict(list)
    sizes: dict[tuple[int, str], int] = {}
    overlaps = []
    for number, path in enumerate(benchmarks):
        overlap = BenchmarkOverlap(path=path)
        overlaps.append(overlap)
        for name, text in _benchmark_rows(path):
            words, row = words_of(text), (number, name)
            grams = set(ngrams(words, n)) if len(words) >= n else set()
            overlap.num_rows += 1
            overlap.num_short += not grams
            sizes[row] = len(grams)
            if words:
                by_words[tuple(words)].append(row)
            if not name.isdigit():
                by_id[name].append(row)
            for gram in grams:
                index[gram].append(row)

    found: dict[tuple[int, str], set[Gram]] = defaultdict(set)
    dropped: dict[int, tuple[float, str]] = {}
    num_train_rows = 0
    for train_row, (train_id, *messages) in enumerate(problems):
        num_train_rows += 1
        turns = [tuple(words_of(message)) for message in messages]
        shared: dict[tuple[int, str], int] = defaultdict(int)
        for gram in {gram for words in turns if len(words) >= n for gram in ngrams(words, n)}:
            for row in index.get(gram, ()):
                shared[row] += 1
                found[row].add(gram)
        for (number, name), count in shared.items():
            overlaps[number].sharing[name].add(train_row)
            share = count / sizes[number, name]
            if share >= max_share and share > dropped.get(train_row, (0.0, ""))[0]:
                why = f"has {share:.0%} of the {n}-grams of {name} ({overlaps[number].path.name})"
                dropped[train_row] = (share, why)
        for number, name in by_id.get(train_id, ()):
            overlaps[number].same_id[name] = train_row
            dropped[train_row] = (1.0, f"has the id of {name} ({overlaps[number].path.name})")
        for number, name in (row for words in turns for row in by_words.get(words, ())):
            overlaps[number].exact[name].add(train_row)
            dropped[train_row] = (1.0, f"is {name} ({overlaps[number].path.name})")
    for (number, name), grams in found.items():
        overlaps[number].covered[name] = len(grams) / sizes[number, name]
    return Contamination(
        num_train_rows=num_train_rows,
        overlaps=overlaps,
        dropped={row: why for row, (_, why) in sorted(dropped.items())},
    )


def _benchmark_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (id, problem text) of each row. The line number replaces a missing id."""
    if not path.is_file():
        raise DataError(f"--decontaminate must name files, but {path} is not a file. Correct the path.")
    for line, record in read_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line} is not a JSON object: {record}. Correct or delete the line.")
        record = {str(name).lower(): value for name, value in record.items()}
        text = next((record[name] for name in _TEXT_FIELDS if record.get(name)), None)
        if not isinstance(text, str):
            raise DataError(
                f"{path}:{line} has no problem text. Its fields are {', '.join(record)}, but one of {', '.join(_TEXT_FIELDS)} is "
                "required."
            )
        name = next((record[k] for k in ("id", "unique_id", "task_id", "question_id") if record.get(k)), line)
        yield str(name), text
