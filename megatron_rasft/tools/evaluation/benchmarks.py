"""Finds the file of a benchmark, reads it, and compares it with the published set."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.field_names import check_names
from megatron_rasft.data.fields import FieldError, json_fields
from megatron_rasft.data.records import check_files, field_names, files_of, read_records
from megatron_rasft.errors import DataError
from megatron_rasft.tools.evaluation.benchmark_rows import Problem, parse_row
from megatron_rasft.tools.evaluation.known_sets import KNOWN_SETS, Kind, KnownSet
from megatron_rasft.tools.evaluation.own_sets import kind_of, parse_own_row
from megatron_rasft.wording import counted

_SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
_DEFAULT_FIELDS = DataConfig()


@dataclass(kw_only=True, slots=True)
class Benchmark:
    """A benchmark that was read and compared with the published set."""

    name: str
    title: str
    kind: Kind
    path: Path
    problems: list[Problem]
    sha256: str
    """Checksum of the uncompressed file, or of the problems of the user's own set."""
    is_verified: bool
    """Whether the checksum of the file, or of its content, matches the published set."""
    rel_tolerance: float = 0.0


def find_file(known: KnownSet, folder: Path) -> Path:
    """Returns the file of a set in ``folder``, or in a clone of its Hugging Face data set there.

    Raises:
        DataError: there is no file, or more than one.
    """
    names = {_plain(known.name), *known.also_called}
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and _plain(_stem(p)) in names]
    if not found:
        clones = [p for p in sorted(folder.iterdir()) if p.is_dir() and _plain(p.name) in names]
        found = [p for clone in clones for p in _split_to_evaluate(clone)]
    if not found:
        raise DataError(
            f"{folder} does not hold {known.name}.jsonl.gz, .jsonl or .parquet. Put the file there, or give its path: "
            f"--benchmarks {known.name}=FILE"
        )
    if len(found) > 1:
        raise DataError(
            f"{folder} holds several files of {known.name}: {found[0].relative_to(folder)} and "
            f"{found[1].relative_to(folder)}. Choose one: --benchmarks {known.name}=FILE"
        )
    return found[0]


def read_benchmark(
    known: KnownSet,
    path: Path,
    accept_unknown: bool = False,
    fields: DataConfig = _DEFAULT_FIELDS,
    keep_fields: bool = False,
) -> Benchmark:
    """Reads a set and compares it with the published set.

    Args:
        known: the set that the file should hold.
        path: a file in this project's layout or in the layout of the set's Hugging Face data set.
        accept_unknown: also accept other content and another number of rows; ``is_verified`` is then False.
        fields: names of the fields of the user's own sets.
        keep_fields: whether each problem keeps its whole row, for --verify-function.

    Raises:
        DataError: a row cannot be used, or the content differs from the set's.
    """
    problems = list(_read_problems(known, path, fields, keep_fields))
    sha256 = text_checksum(path) if known.name in KNOWN_SETS else fingerprint(problems, with_fields=True)
    is_verified = sha256 == known.text_sha256 or fingerprint(problems) == known.content_sha256
    if not problems:
        raise DataError(
            f"{path} is empty. Write the problems to it, or leave {known.name} out of --benchmarks."
        )
    if known.num_rows and not accept_unknown:
        _check_content(known, path, len(problems), sha256, is_verified)
    return Benchmark(
        name=known.name,
        title=known.title,
        kind=known.kind,
        path=path,
        problems=problems,
        sha256=sha256,
        is_verified=is_verified,
        rel_tolerance=known.rel_tolerance,
    )


def _read_problems(known: KnownSet, path: Path, fields: DataConfig, keep_fields: bool) -> Iterator[Problem]:
    seen: set[str] = set()
    for line, record in read_records(path):
        try:
            if isinstance(record, FieldError):
                raise record
            if not isinstance(record, dict):
                raise FieldError("not a JSON object", f"it is a {type(record).__name__}")
            default_id = f"{known.name}/{line}"
            problem = (
                parse_row(record, known.kind, default_id)
                if known.name in KNOWN_SETS
                else parse_own_row(record, known.kind, default_id, fields)
            )
            problem.fields = json_fields(record) if keep_fields else None
        except FieldError as error:
            if known.name not in KNOWN_SETS:
                needs_answer = not keep_fields
                check_names(path, field_names(path), fields, needs_answer, texts=("problem",))
            raise DataError(f"{path}:{line} is not a row of {known.name}: {error}.") from error
        if problem.problem_id in seen:
            raise DataError(
                f"{path}:{line}: the id {problem.problem_id} occurs twice. Remove one of the rows."
            )
        seen.add(problem.problem_id)
        yield problem


def _check_content(known: KnownSet, path: Path, num_rows: int, sha256: str, is_verified: bool) -> None:
    way_out = "Download the set again, or give --unknown-data accept, which marks its results as unverified."
    if num_rows != known.num_rows:
        raise DataError(
            f"{path} has {counted(num_rows, 'row')}, but {known.title} has {known.num_rows}. {way_out}"
        )
    if not is_verified:
        raise DataError(
            f"{path} is not the published {known.title}: its sha256 is {sha256[:12]}..., not {known.text_sha256[:12]}..., "
            f"and its problems or answers differ. {way_out}"
        )


def text_checksum(path: Path) -> str:
    """Returns the sha256 of a file or of the files of a saved data set. A .gz file is uncompressed."""
    digest = hashlib.sha256()
    for file in files_of(path):
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fingerprint(problems: list[Problem], with_fields: bool = False) -> str:
    """Returns the sha256 of problems with their answers or tests.

    Ignores the order of rows, ids, white space, and thousands separators and leading zeros of integers, so that every
    layout of a set has the same fingerprint.

    Args:
        problems: the problems.
        with_fields: whether the rows that --verify-function receives are included, if they are kept.
    """
    lines = sorted(
        json.dumps(
            [
                *(_squeeze(p.text), _whole(p.answer), _squeeze(json.dumps(p.tests, sort_keys=True))),
                *([p.fields] if with_fields and p.fields is not None else []),
            ],
            sort_keys=True,
        )
        for p in problems
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _whole(answer: str) -> str:
    answer = _squeeze(answer)
    return str(int(answer.replace(",", ""))) if re.fullmatch(r"\d[\d,]{0,30}", answer) else answer


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _stem(path: Path) -> str:
    name = path.name
    return next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), "")


def _split_to_evaluate(clone: Path) -> list[Path]:
    """Returns the files of the test split, or the only file: a data set with one split may call it train."""
    files = [p for p in sorted(clone.rglob("*")) if p.name.endswith(_SUFFIXES) and ".git" not in p.parts]
    tests = [p for p in files if re.match(r"test(?![a-z])", p.name)]
    return tests or (files if len(files) == 1 else [])


def chosen(
    names: list[str], folder: Path | None, fields: DataConfig = _DEFAULT_FIELDS, by_function: bool = False
) -> Iterator[tuple[KnownSet, Path]]:
    """Yields set and file of each NAME or NAME=FILE. An unknown name with a file is the user's own set.

    Args:
        names: the values of --benchmarks.
        folder: --data-folder.
        fields: names of the fields of the user's own sets.
        by_function: whether --verify-function grades, so that the user's own sets need neither answers nor tests.

    Raises:
        ValueError: a name without a file is unknown, or there is no folder to look in.
        DataError: the file or folder does not exist.
    """
    for entry in names:
        name, _, file = entry.partition("=")
        if name not in KNOWN_SETS and not file:
            raise ValueError(
                f"--benchmarks: {name!r} is unknown. Known sets: {', '.join(KNOWN_SETS)}. For a set of your own give "
                "NAME=FILE."
            )
        if file:
            (path,) = check_files([file], f"--benchmarks {entry}")
            _, first = next(iter(read_records(path)), (0, None))
            kind: Kind = "own" if by_function else kind_of(first, fields)
            yield KNOWN_SETS.get(name) or KnownSet(name=name, title=name, kind=kind), path
        elif folder is None:
            raise ValueError(
                f"--benchmarks {name} needs --data-folder DIR, or its file: --benchmarks {name}=FILE"
            )
        elif not folder.is_dir():
            raise DataError(f"--data-folder {folder} does not exist or is not a folder.")
        else:
            yield KNOWN_SETS[name], find_file(KNOWN_SETS[name], folder)
