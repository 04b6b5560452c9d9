"""Errors of files, models and servers. A wrong flag or value raises ValueError instead."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path


class RasftError(Exception):
    """Base of this package's errors. Its message is written for the user, and tools print it without a traceback."""


def first_line(error: BaseException, if_empty: str | None = None) -> str:
    """The first line of an error's message that is not blank. Libraries append pages of context, which would hide it.

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


class WeightsError(RasftError):
    """Weights contain NaN or infinity, or values beyond the range of the type to which they are converted."""


class RolloutError(RasftError):
    """The rollouts that a run needs could not be obtained."""


class ServerError(RolloutError):
    """A rollout server did not answer in time, refused a request, or returned an invalid answer. The message names the server.

    Args:
        server: the address of the server.
        reason: the fault, without the address.
        status: the HTTP status of the answer; None without an answer.
    """

    def __init__(self, server: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"rollout server {server}: {reason}")
        self.server = server
        self.reason = reason
        self.status = status


class ServerTimeoutError(ServerError):
    """A rollout server did not answer a request in time. The reason begins with the path of the request."""


class ServerUnreachableError(ServerError):
    """Nothing accepted a connection at the address of a rollout server: its process has ended, or its machine is gone."""


class FailedElsewhere(Exception):
    """Raised on all other ranks when a rank fails. The failing rank raises its own error."""


def tell_launcher(message: str) -> None:
    """Gives torchrun the message that its last lines show for this process. Does nothing without torchrun.

    The format is that of torch.distributed.elastic, whose own function would import torch and add a traceback.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": message, "extraInfo": extra}})
        with suppress(OSError):  # a full disk must not hide the error itself
            Path(path).write_text(text, encoding="utf-8")


def is_first_of_node() -> bool:
    """Returns whether this process is the one that prints for its node while torch.distributed is not initialized."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0
