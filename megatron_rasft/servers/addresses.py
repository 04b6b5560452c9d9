"""The file in which servers announce themselves: one address a line, written by serve_rollouts, read by the trainer."""

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
    """Every address in the file, in order and once each; none while the file does not exist.

    Raises:
        ValueError: a line is no address, or the file cannot be read; the message names file and line.
    """
    try:
        with _locked(Path(path), "r", fcntl.LOCK_SH) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of addresses ({error}).") from error
    found = {
        check_address(line.strip(), f"{path}:{number}"): None
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    return list(found)


def endpoints(address: str) -> set[str]:
    """Where an address leads, ``IP:port``; without IP where that is this machine; empty if its host is not known.

    Args:
        address: as ``check_address`` gives it.
    """
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    port = urlsplit(address).port
    return {f"{'' if host in own or host.startswith('127.') else host}:{port}" for host in resolved(address)}


def resolved(address: str) -> list[str]:
    """The IPs of an address's host, in the order in which they are tried; empty if it is not known."""
    parts = urlsplit(address)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the second: of a name that no resolver takes
        return []
    return [str(target[0]) for *_, target in found]


def check_writable(path: str | Path) -> None:
    """Make the file and its folder, so that a server need not start to find out that it cannot be entered.

    Raises:
        ValueError: they cannot be made, written or locked.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(path), "a+", fcntl.LOCK_EX):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written and locked ({error.strerror}). Name a file that can."
        ) from error


def add_address(path: str | Path, address: str) -> None:
    """Enter a server that is ready; the file and its folder are made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _locked(Path(path), "a+", fcntl.LOCK_EX) as file:
        file.seek(0)
        lines = file.read().splitlines()
        if address not in lines:
            _rewrite(file, [*lines, address])


def remove_address(path: str | Path, address: str) -> None:
    """Take a server out; nothing happens if it is not there."""
    try:
        with _locked(Path(path), "r+", fcntl.LOCK_EX) as file:
            _rewrite(file, [line for line in file.read().splitlines() if line.strip() != address])
    except FileNotFoundError:
        return


def _rewrite(file: IO[str], lines: Sequence[str]) -> None:
    file.seek(0)
    file.truncate()
    file.write("".join(f"{line}\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(path: Path, mode: str, kind: int) -> Iterator[IO[str]]:
    """Open the file while nobody else writes it; the lock also holds between machines that share it over NFS."""
    with path.open(mode, encoding="utf-8") as file:
        fcntl.lockf(file, kind)
        yield file
