"""Ports for servers that take long to start."""

import errno
import random
import socket
from pathlib import Path

_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 15000
"""Below it are the well-known ports of services that may start later."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on, and that the system gives to no connection.

    A server binds its ports only when it has loaded its model. One that the system picks (port 0) comes from the range
    that outgoing connections are given meanwhile, and is then taken; so it is drawn from below that range.

    Raises:
        ValueError: ``host`` is no address of this machine.
    """
    low = _first_of_connections()
    tries = [random.SystemRandom().randrange(_LOWEST, low) for _ in range(64)] if low > _LOWEST else []
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
    """Refuse a port that a server could not listen on.

    Raises:
        ValueError: somebody listens there, or ``host`` is no address of this machine.
    """
    with socket.socket(_family(host)) as probe:
        # connections of a server that ended do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _no_address(host, error) from error
            raise ValueError(
                f"--port {port}: somebody listens there already. Give another one, or leave it out for a free one."
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _no_address(host: str, error: OSError) -> ValueError:
    return ValueError(f"--host {host} is no address of this machine ({error.strerror}).")


def _first_of_connections() -> int:
    """The lowest port that the system gives to outgoing connections."""
    try:
        return int(_CONNECTIONS.read_text().split()[0])
    except OSError:
        return 32768  # Linux's default; elsewhere they start higher
