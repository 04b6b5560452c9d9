"""What can go wrong in the world. What a user typed wrongly is a ValueError instead."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class RasftError(Exception):
    """Base of the errors this package raises for the state of the world; the message is meant to be read."""


@contextlib.contextmanager
def written_to(path: Path, flag: str) -> Iterator[None]:
    """Make a RasftError of what the file system says when a run's own file is written, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise RasftError(
            f"{path} could not be written: {error.strerror or error}. Make room, or name another place with {flag}, and start "
            "again to go on from the last checkpoint."
        ) from error


class DataError(RasftError):
    """A data file is missing, empty or holds rows that cannot be used."""


class ModelFolderError(RasftError):
    """A Hugging Face folder is incomplete, unsupported or does not fit the run."""


class CheckpointError(RasftError):
    """A checkpoint belongs to another run or model, is incomplete, or could not be written."""


class RolloutError(RasftError):
    """A rollout engine could not deliver what the run cannot go on without."""


class ServerError(RolloutError):
    """One rollout server did not answer in time, refused, or said what cannot be true; the message names it.

    Args:
        server: its address.
        reason: what happened, without the address.
        status: the HTTP status, if there was an answer.
    """

    def __init__(self, server: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"rollout server {server}: {reason}")
        self.server = server
        self.reason = reason
        self.status = status


class FailedElsewhere(Exception):
    """Raised on the ranks that only heard of a failure: another one has the message."""
