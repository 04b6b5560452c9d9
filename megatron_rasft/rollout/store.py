"""rollouts.jsonl: every rollout of a run, one JSON object per line. Replay, reports and resumed evaluations read it."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_rasft.errors import RolloutError
from megatron_rasft.files import written_to
from megatron_rasft.types import Rollout

_CHUNK = 2**16
"""Number of bytes that ``whole_lines`` reads at once."""


class RolloutStore:
    """A file to which rollouts are appended. The constructor creates its folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def offset(self) -> int:
        """Length of the file in bytes; 0 before the first rollout."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, rollouts: Iterable[Rollout]) -> None:
        """Writes rollouts and waits until they are on disk.

        Raises:
            RasftError: the file cannot be written.
        """
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rollouts)
        with (
            written_to(self.path, "--rollout-store"),
            self.path.open("a", encoding="utf-8", newline="\n") as file,
        ):
            file.write(lines)
            # The next checkpoint stores the file's length, so the lines must not be lost if the machine fails later.
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, offset: int) -> None:
        """Truncates the file to its first ``offset`` bytes."""
        assert offset <= self.offset, (
            f"{self.path} has {self.offset} bytes and cannot be truncated to {offset}"
        )
        if self.path.exists():
            os.truncate(self.path, offset)


def whole_lines(path: Path) -> int:
    """Number of bytes up to the end of the last complete line. A killed run can leave an incomplete line at the end."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def read_rollouts(path: str | Path) -> Iterator[Rollout]:
    """Yields every rollout of a store, in the order of the file.

    Raises:
        RolloutError: the file is missing, or a line is not a rollout.
    """
    for _, rollout in scan_rollouts(path):
        yield rollout


def scan_rollouts(path: str | Path) -> Iterator[tuple[int, Rollout]]:
    """Yields the same rollouts as ``read_rollouts``, each with the offset of its line, for ``read_rollout``."""
    path = Path(path)
    if not path.is_file():
        raise RolloutError(f"rollout store {path} does not exist. Check --rollout-replay.")
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield offset, Rollout(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise RolloutError(
                    f"{path}:{number} is not a rollout ({error}). Delete the line to continue."
                ) from error
            offset += len(line)


def read_rollout(path: Path, offset: int) -> Rollout:
    """The rollout whose line begins at ``offset``."""
    with path.open("rb") as file:
        file.seek(offset)
        return Rollout(**json.loads(file.readline()))
