"""The records of servers, and calls to several servers at once."""

import threading

import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.keys import ServerKeys
from megatron_rasft.servers.record import ServerRecords, call_all
from tests.unit.sync.stand_ins import StandIn, records_of


def test_a_server_has_one_record_and_one_client() -> None:
    connected: list[tuple[str, str | None, str | None]] = []

    def connect(url: str, *, api_key: str | None, admin_api_key: str | None) -> ServerClient:
        connected.append((url, api_key, admin_api_key))
        return ServerClient(url)

    records = ServerRecords(ServerKeys("reader", "admin"), connect)
    assert records.get("http://a:1") is records.get("http://a:1")
    records.get("http://b:1")
    assert connected == [("http://a:1", "reader", "admin"), ("http://b:1", "reader", "admin")]
    assert [record.url for record in records] == ["http://a:1", "http://b:1"]


def test_update_sessions_are_used_only_if_the_server_has_them() -> None:
    for has_update_session, calls in ((True, ["begin", "end"]), (False, [])):
        server = StandIn("http://a:1", has_update_session)
        record = server.record()
        record.begin_update()
        record.end_update()
        assert server.calls == calls


def test_closing_the_records_closes_every_client() -> None:
    servers = [StandIn("http://a:1"), StandIn("http://b:1")]
    records = records_of(*servers)
    for server in servers:
        records.get(server.url)
    records.close()
    assert [server.calls for server in servers] == [["close"], ["close"]]


def test_servers_are_called_at_the_same_time_and_failures_are_returned() -> None:
    barrier = threading.Barrier(3, timeout=600)
    servers = [StandIn(f"http://{name}:1") for name in "abc"]

    def call(server: StandIn) -> None:
        barrier.wait()
        if server is servers[1]:
            raise ServerError(server.url, "out of order")

    assert call_all(servers, call) == {"http://b:1": "out of order"}
    assert call_all([], call) == {}


def test_any_other_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        call_all([StandIn("http://a:1")], lambda server: 1 / 0)
