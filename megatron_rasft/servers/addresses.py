"""The server file, with one address per line: written by tools/serve_rollouts.py and read by the trainer."""

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil

from megatron_rasft.config.rollout import check_address


def read_addresses(path: str | Path) -> list[str]:
    """Returns the addresses in the file, in order and without repeats; [] if the file does not exist.

    Raises:
        ValueError: a line is not an address, or the file cannot be read; the message names file and line.
    """
    try:
        with _locked(Path(path), "r", fcntl.LOCK_SH) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a file of server addresses ({error}).") from error
    found = {
        check_address(line.strip(), f"{path}:{number}"): None
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    return list(found)


def endpoints(address: str) -> set[str]:
    """Returns the endpoints of an address, as ``IP:port``; empty if its host name does not resolve.

    The IP is left out if it is one of this machine's, so that all names of this machine compare equal.

    Args:
        address: as ``check_address`` returns it.
    """
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    port = urlsplit(address).port
    return {f"{'' if host in own or host.startswith('127.') else host}:{port}" for host in resolved(address)}


def resolved(address: str) -> list[str]:
    """Returns the IPs of an address's host, in the order in which a client tries them; [] if it does not resolve."""
    parts = urlsplit(address)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: not a valid host name
        return []
    return [str(target[0]) for *_, target in found]


def check_writable(path: str | Path) -> None:
    """Creates the file and its folder. Called before a server starts, which can take half an hour.

    Raises:
        ValueError: they cannot be created, written or locked.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(path), "a+", fcntl.LOCK_EX):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written and locked ({error.strerror}). Name a writable file."
        ) from error


def add_address(path: str | Path, address: str) -> None:
    """Adds the address of a server that is ready. Creates the file and its folder if necessary."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _locked(Path(path), "a+", fcntl.LOCK_EX) as file:
        file.seek(0)
        lines = file.read().splitlines()
        if address not in lines:
            _rewrite(file, [*lines, address])


def remove_address(path: str | Path, address: str) -> None:
    """Removes an address, if it is in the file."""
    try:
        with _locked(Path(path), "r+", fcntl.LOCK_EX) as file:
            _rewrite(file, [line for line in file.read().splitlines() if line.strip() != address])
    except FileNotFoundError:
        return


def _rewrite(file: IO[str], lines: Sequence[str]) -> None:
    # Written in place: a rename would leave other processes waiting for the lock of the old file
    file.seek(0)
    file.truncate()
    file.write("".join(f"{line}\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(path: Path, mode: str, kind: int) -> Iterator[IO[str]]:
    """Opens the file under a lock. POSIX locks also hold between machines that share the file over NFS."""
    with path.open(mode, encoding="utf-8") as file:
        fcntl.lockf(file, kind)
        yield file
