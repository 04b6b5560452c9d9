"""What can go wrong in the world. What a user typed wrongly is a ValueError instead."""


class RasftError(Exception):
    """Base of the errors this package raises for the state of the world; the message is meant to be read."""


def first_line(error: BaseException, if_empty: str | None = None) -> str:
    """The first line of an error's message that is not blank: libraries append pages of context that hide a run's own message.

    Args:
        error: any exception.
        if_empty: returned for an error without a message; None: the name of its class.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), if_empty or type(error).__name__)


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
