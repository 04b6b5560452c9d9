"""Bearer keys of rollout servers. They come from environment variables, never from flags, because flags are logged."""

import os
from typing import NamedTuple


class ServerKeys(NamedTuple):
    """The keys that all servers of a run share."""

    api_key: str | None = None
    """The value of the servers' --api-key."""
    admin_api_key: str | None = None
    """The value of the servers' --admin-api-key, for control requests."""


def read_key(flag: str, name: str | None) -> str | None:
    """Returns the key in the environment variable that a flag names; None if the flag was not given.

    Raises:
        ValueError: the variable is not set, or an HTTP header cannot carry its value. The message does not quote the value.
    """
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ValueError(
            f"{flag} {name}: this environment variable is not set. Export it with the key, or leave the flag out."
        )
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(
            f"{flag} {name}: the key has spaces at an end, line breaks, control characters or non-ASCII characters, which a "
            "bearer key cannot have. Export it without them."
        )
    return key
