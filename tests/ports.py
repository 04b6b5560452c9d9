"""Ports for the servers and process groups that tests start."""

import fcntl
import os
import socket
import tempfile
from pathlib import Path

from megatron_rasft.tools.ports import LOWEST_PORT

_LAST = Path(tempfile.gettempdir()) / f"rasft-tests-last-port-{os.getuid()}"


def new_port() -> int:
    """Returns a free port that no other test has got before.

    Several pytest processes run side by side, and a process binds its port seconds after its test has chosen it. A random free port
    would be chosen twice now and then, so the ports are taken in order. They are below those that the product chooses at random.
    """
    with _LAST.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = _next_free(int(file.read() or 0))
        file.truncate(0)
        file.write(str(port))
    return port


def _next_free(last: int) -> int:
    ports = range(10_000, LOWEST_PORT)
    start = ports.index(last) + 1 if last in ports else 0
    return next(port for port in (*ports[start:], *ports[:start]) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
