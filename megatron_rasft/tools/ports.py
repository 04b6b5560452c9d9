"""Chooses ports for servers that take minutes to start before they bind the port."""

import errno
import random
import socket
from pathlib import Path

_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 15000
"""Lowest port to choose. Ports below it are the well-known ports of other services."""


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port on which no process listens, below the range that the system uses for outgoing connections.

    A server binds its port only after it has loaded its model. A port chosen by the system (port 0) comes from that range, so an
    outgoing connection could get it in the meantime.

    Raises:
        ValueError: ``host`` is not an address of this machine.
    """
    low = first_of_connections()
    tries = (
        [random.SystemRandom().randrange(LOWEST_PORT, low) for _ in range(64)] if low > LOWEST_PORT else []
    )
    for port in [*tries, 0]:
        with socket.socket(_family(host)) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if port == 0:
                    raise _no_address(host, error) from error
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 either binds or raises")


def check_port(host: str, port: int) -> None:
    """Checks that a server can listen on a port.

    Raises:
        ValueError: a process listens on it, or ``host`` is not an address of this machine.
    """
    with socket.socket(_family(host)) as probe:
        # ignores an ended server's connections, which the kernel keeps for a minute
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _no_address(host, error) from error
            raise ValueError(
                f"--port {port} is in use. Give another port, or leave the flag out to use a free one."
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _no_address(host: str, error: OSError) -> ValueError:
    return ValueError(f"--host {host} is not an address of this machine ({error.strerror}).")


def first_of_connections() -> int:
    """Returns the lowest port that the system gives to outgoing connections."""
    try:
        return int(_CONNECTIONS.read_text().split()[0])
    except OSError:
        return 32768  # Linux's default; the range of other systems starts higher
