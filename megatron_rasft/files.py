"""Files that are replaced in one step: after a crash a file holds its old content or its new content, never a part."""

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rasft.errors import ModelFolderError, RasftError, first_line


@contextlib.contextmanager
def replacing(path: Path, *, is_synced: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file, and renames that file to ``path`` when the block ends without an error.

    After an error ``path`` is unchanged and the temporary file is deleted. A new file takes over the permissions of the file
    it replaces.

    Args:
        path: the file to write; its folder must exist, because a rename needs both files on one file system.
        is_synced: write the content to the disk before the rename. Without it a power failure can leave an empty file under the
            new name, so everything that a resumed run trusts needs it. It costs one disk flush.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        if is_synced:
            _flush_to_disk(temporary)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, *, is_synced: bool = False) -> None:
    """Replaces a file's content in one step; see ``replacing``."""
    with replacing(path, is_synced=is_synced) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, is_synced: bool = False) -> None:
    """Replaces a file's content in one step, encoded as UTF-8; see ``replacing``."""
    write_bytes(path, text.encode(), is_synced=is_synced)


def write_json(path: Path, value: Any, *, indent: int | None = 1, is_synced: bool = False) -> None:
    """Replaces a file's content by ``value`` as JSON and a newline in one step; see ``replacing``."""
    # json.dumps runs in C, json.dump in Python at half its speed: a run's state is tens of megabytes
    write_text(path, json.dumps(value, indent=indent) + "\n", is_synced=is_synced)


def similar_file(path: Path) -> Path | None:
    """Returns the file beside ``path`` that has the most similar name; None if no name is similar."""
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return path.with_name(similar[0]) if similar else None


def read_json_object(path: Path, missing: str | None = None) -> dict[str, Any]:
    """Reads the object in a JSON file of a model folder.

    Raises:
        ModelFolderError: one line with the file's name, or ``missing`` if the file does not exist.
    """
    try:
        # a FIFO or a device would block, or never end
        if path.exists() and not path.is_file():
            raise ModelFolderError(f"{path.name} is not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFolderError(missing or f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ModelFolderError(f"{path.name} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path.name} is not a JSON object")
    return content


@contextlib.contextmanager
def written_to(path: Path, flag: str) -> Iterator[None]:
    """Turns an OSError in the block, such as a full disk, into a RasftError that names the file and its flag."""
    try:
        yield
    except OSError as error:
        raise RasftError(
            f"{path} could not be written: {error.strerror or error}. Free some disk space or choose another location with "
            f"{flag}, then start again to continue from the last checkpoint."
        ) from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
