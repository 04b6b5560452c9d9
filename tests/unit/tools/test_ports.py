"""A chosen port is still free when the server has loaded its model."""

import socket
from pathlib import Path

import pytest

from megatron_rasft.tools import ports
from megatron_rasft.tools.ports import free_port


def test_the_port_is_outside_the_range_of_outgoing_connections() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(15000 <= free_port() < first for _ in range(200))


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "LOWEST_PORT", port)
        monkeypatch.setattr(ports, "first_of_connections", lambda: port + 2)
        assert {free_port() for _ in range(20)} == {port + 1}


def test_the_system_chooses_if_there_is_no_port_below_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "first_of_connections", lambda: 1024)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--host 192\.0\.2\.1"):
        free_port("192.0.2.1")
