"""Bearer keys of servers: out of environment variables, never out of flags, which are logged."""

import os


def read_key(flag: str, name: str | None) -> str | None:
    """The key in the environment variable that a flag names; None where the flag was not given.

    Raises:
        ValueError: the variable is not set, or holds what no HTTP header carries; the message does not quote it.
    """
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ValueError(
            f"{flag} {name}: there is no such environment variable. Export it with the key in it, or leave the flag out."
        )
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(
            f"{flag} {name}: the key in it ends or begins with a blank, or has line breaks, control or non-ASCII characters, "
            "which a bearer key cannot have. Export it without them."
        )
    return key
