"""The append-only record of every rollout: replays, reports and crashes all go through it."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_rasft.errors import RolloutError
from megatron_rasft.files import written_to
from megatron_rasft.types import Rollout

_CHUNK = 2**16


class RolloutStore:
    """One JSON object per rollout and line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def offset(self) -> int:
        """Bytes in the store now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, rollouts: Iterable[Rollout]) -> None:
        """Write rollouts and wait until they are on disk.

        Raises:
            RasftError: they cannot be written.
        """
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rollouts)
        with (
            written_to(self.path, "--rollout-store"),
            self.path.open("a", encoding="utf-8", newline="\n") as file,
        ):
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, offset: int) -> None:
        """Cut away what lies beyond ``offset``."""
        assert offset <= self.offset, f"{self.path} has {self.offset} bytes, {offset} are to be left"
        if self.path.exists():
            os.truncate(self.path, offset)


def whole_lines(path: Path) -> int:
    """Bytes to the end of the last finished line, 0 without one: a run that is killed may leave half a line."""
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
    """Every rollout of a store, in the order it was written.

    Raises:
        RolloutError: the file is missing or a line is not a rollout.
    """
    for _, rollout in scan_rollouts(path):
        yield rollout


def scan_rollouts(path: str | Path) -> Iterator[tuple[int, Rollout]]:
    """``read_rollouts``, each with the place of its line, for ``read_rollout``."""
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
                    f"{path}:{number} is not a rollout ({error}). Cut the line out to go on."
                ) from error
            offset += len(line)


def read_rollout(path: Path, offset: int) -> Rollout:
    """The rollout whose line begins there."""
    with path.open("rb") as file:
        file.seek(offset)
        return Rollout(**json.loads(file.readline()))
