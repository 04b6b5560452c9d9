"""What made a result: the flags of a training and its evaluation, their files and the commit, kept in its ``done``."""

import hashlib
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, Any]


def make_record(training: Sequence[str], evaluation: Sequence[str], num_processes: int) -> Record:
    """Of flags in which the result's own folder is ``.``, so that it may be moved."""
    names = [value.rpartition("=")[2] for value in [*training, *evaluation]]
    files = {name: ROOT / name for name in names if os.path.isfile(ROOT / name)}
    return {
        "training": list(training),
        "evaluation": list(evaluation),
        "num_processes": num_processes,
        "files": {name: _checksum(path, path.stat().st_mtime_ns) for name, path in files.items()},
        "commit": _commit(),
    }


def read_record(path: Path) -> Record | None:
    """None where nothing is known: there is no file, or the empty one of earlier versions."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return json.loads(text) if text else None


def describe_difference(stored: Record, now: Record) -> str | None:
    """The first thing in which two records differ, commits left out; None if there is none."""
    for part in ("training", "evaluation"):
        was, is_now = _by_flag(stored[part]), _by_flag(now[part])
        for flag in {**was, **is_now}:
            if was.get(flag) != is_now.get(flag):
                return f"its {part} had {_said(flag, was)}, which is now {_said(flag, is_now)}"
    if stored["num_processes"] != now["num_processes"]:
        return f"num_processes was {stored['num_processes']}, which is now {now['num_processes']}"
    for file, checksum in stored["files"].items():
        if now["files"].get(file, checksum) != checksum:
            return f"{file} had sha256 {checksum[:12]}..., which is now {now['files'][file][:12]}..."
    return None


def notes(folders: Iterable[Path]) -> list[str]:
    """What a reader of the table must know of how its results came about."""
    unknown, by_commit = [], defaultdict(list)
    for folder in folders:
        record = read_record(folder / "done")
        if record is None:
            unknown.append(folder.name)
        elif record["commit"]:
            by_commit[record["commit"]].append(folder.name)
    lines = []
    if len(by_commit) > 1:
        made = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in by_commit.items())
        lines.append(f"Made by different commits of the code: {made}.")
    if unknown:
        lines.append(f"Not known is with which flags, data and code these were made: {', '.join(unknown)}.")
    return lines


def _by_flag(command: Sequence[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for part in command:
        if part.startswith("--"):
            flags[part] = []
        else:
            flags[list(flags)[-1]].append(part)
    return flags


def _said(flag: str, flags: dict[str, list[str]]) -> str:
    return " ".join([flag, *flags[flag]]) if flag in flags else f"without {flag}"


@cache
def _checksum(path: Path, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str:
    """Of the moment: a comparison takes days. Empty where this is no checkout of git's, or git is not there."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
