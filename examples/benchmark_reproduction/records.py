"""Provenance of a result: the flags of its training and evaluation, checksums of their files, and the commit.

The file ``done`` in a result's folder holds it.
"""

import hashlib
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, Any]
"""Provenance of one result, as ``make_record`` returns it."""


def make_record(flags: Mapping[str, Sequence[str]], num_processes: int) -> Record:
    """Returns the provenance of a result.

    Args:
        flags: ``training``, or the name of an evaluation -> its flags, with ``.`` for the result's folder, so that the folder can
            be moved.
        num_processes: processes of the training and of the evaluations.
    """
    return {
        "flags": {name: list(values) for name, values in flags.items()},
        "num_processes": num_processes,
        "files": checksums_of(flags),
        "commit": current_commit(),
    }


def checksums_of(flags: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Returns the files that flags name, with their SHA-256."""
    names = [value.rpartition("=")[2] for values in flags.values() for value in values]
    return {name: checksum(ROOT / name) for name in names if os.path.isfile(ROOT / name)}


def read_record(path: Path) -> Record | None:
    """Reads a record, or returns None if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def describe_difference(stored: Record, now: Record) -> str | None:
    """Names the first difference of two records, or returns None. Commits may differ."""
    for part in {**stored["flags"], **now["flags"]}:
        was, is_now = (_by_flag(record["flags"].get(part, ())) for record in (stored, now))
        for flag in {**was, **is_now}:
            if was.get(flag) != is_now.get(flag):
                return f"the {part} had {_text(flag, was)} and now has {_text(flag, is_now)}"
    if stored["num_processes"] != now["num_processes"]:
        return f"num_processes was {stored['num_processes']} and is now {now['num_processes']}"
    for file, checksum in stored["files"].items():
        if now["files"].get(file, checksum) != checksum:
            return f"the SHA-256 of {file} was {checksum[:12]}... and is now {now['files'][file][:12]}..."
    return None


def notes(folders: Iterable[Path]) -> list[str]:
    """Returns notes for the readers of the table: results of different commits."""
    by_commit = defaultdict(list)
    for folder in folders:
        record = read_record(folder / "done")
        if record and record["commit"]:
            by_commit[record["commit"]].append(folder.name)
    if len(by_commit) < 2:
        return []
    results = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in by_commit.items())
    return [f"The results come from different commits of the code: {results}."]


def _by_flag(command: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> its values on a command line."""
    flags: dict[str, list[str]] = {}
    for part in command:
        if part.startswith("--"):
            flags[part] = []
        else:
            flags[list(flags)[-1]].append(part)
    return flags


def _text(flag: str, flags: dict[str, list[str]]) -> str:
    return " ".join([flag, *flags[flag]]) if flag in flags else f"without {flag}"


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file, which is read only once if it does not change."""
    return _checksum(path, path.stat().st_mtime_ns)


@cache
def _checksum(path: Path, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def current_commit() -> str:
    """Returns the current commit, or an empty text without git or a repository.

    It is read for each result, because a comparison takes days and the checkout can change meanwhile.
    """
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
