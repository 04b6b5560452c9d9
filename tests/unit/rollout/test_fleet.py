"""Servers that may be sampled: a sync admits them, a fault quarantines them. Also tests runs without servers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecords

A, B = "http://a:1", "http://b:2"
MODEL = {"vocab_size": 100, "hidden_size": 64}


class Network:
    """Answers for every running server. ``info`` overrides fields of a server's /server_info."""

    def __init__(self, *up: str) -> None:
        self.up = set(up)
        self.starting: set[str] = set()
        self.info: dict[str, dict[str, Any]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.host}:{request.url.port}"
        if url not in self.up:
            raise httpx.ConnectError("connection refused")
        if request.method == "OPTIONS":
            return httpx.Response(405)
        if request.url.path == "/health" and url in self.starting:
            return httpx.Response(503)
        return httpx.Response(
            200,
            json={"model_path": "/m", "weight_version": "default", "version": "0", **self.info.get(url, {})},
        )


def fleet_of(network: Callable[[httpx.Request], httpx.Response], said: list[str], **flags: Any) -> Fleet:
    values: dict[str, Any] = {
        "rollout_engine": "sglang",
        "rollout_wait_s": 0.0,
        "rollout_urls": [A, B],
        **flags,
    }
    records = ServerRecords(connect=partial(ServerClient, transport=httpx.MockTransport(network)))
    return Fleet(RolloutConfig(**values), records, say=said.append, model_config=MODEL)


def urls(servers: list[Any]) -> list[str]:
    return [s.url for s in servers]


def test_a_sync_admits_a_server_and_a_fault_quarantines_it() -> None:
    said: list[str] = []
    fleet = fleet_of(Network(A, B), said)
    assert urls(fleet.find()) == [A, B]
    assert fleet.serving(3) == []
    fleet.admit(A, 3)
    fleet.admit(B, 3)
    assert urls(fleet.serving(3)) == [A, B] and fleet.serving(4) == []
    fleet.quarantine(B, "answered with garbage")
    fleet.quarantine(B, "answered with garbage")
    assert urls(fleet.serving(3)) == [A]
    assert said == [f"rollout server {B} answered with garbage: left out for now"]
    assert urls(fleet.find()) == [A, B], "a quarantined server takes part in the next sync"
    assert urls(fleet.serving(3)) == [A], "but is not sampled before it"
    fleet.admit(B, 4)
    assert said[1:] == [f"rollout server {B} is back, with the weights of step 4"]


def test_servers_that_have_the_weights_are_not_synced() -> None:
    network = Network(A, B)
    fleet = fleet_of(network, [])
    assert fleet.lacking(3, fleet.find()) == [A, B]
    for url in (A, B):
        fleet.admit(url, 3)
        network.info[url] = {"weight_version": "3"}
    assert fleet.lacking(3, fleet.find()) == [] and fleet.lacking(4, fleet.find()) == [A, B]
    network.info[B] = {}
    assert fleet.lacking(3, fleet.find()) == [B], "it was restarted"
    network.info[A]["enable_memory_saver"] = True
    assert fleet.lacking(3, fleet.find()) == [A, B], "it may be asleep"
    del network.info[A]["enable_memory_saver"]
    fleet.find()
    fleet.quarantine(A, "answered with garbage")
    assert fleet.lacking(3, fleet.find()) == [A, B], "its weights are not known"


def test_a_dead_server_is_reported_once_and_found_again() -> None:
    said: list[str] = []
    network = Network(A, B)
    fleet = fleet_of(network, said)
    for record in fleet.find():
        fleet.admit(record.url, 1)
    network.up.remove(B)
    assert urls(fleet.find()) == [A]
    assert urls(fleet.find()) == [A]
    assert len(said) == 1 and B in said[0] and "cannot be reached" in said[0]
    network.up.add(B)
    assert urls(fleet.find()) == [A, B] and urls(fleet.serving(1)) == [A]


def test_a_server_that_is_warming_up_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rasft.rollout.fleet._BETWEEN_PROBES_S", 0.0)
    said: list[str] = []
    network = Network(A, B)
    network.starting = {A, B}
    fleet = fleet_of(network, said, rollout_wait_s=600.0)
    assert urls(fleet.find(lambda: network.starting.discard(A))) == [A]
    assert any(B in line and "starting" in line for line in said)
    network.starting.clear()
    assert urls(fleet.find()) == [A, B]


def test_the_first_refresh_waits_for_enough_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rasft.rollout.fleet._BETWEEN_PROBES_S", 0.0)
    said: list[str] = []
    network = Network(A)
    fleet = fleet_of(network, said, rollout_min_servers=2, rollout_wait_s=600.0)
    assert urls(fleet.find(lambda: network.up.add(B))) == [A, B]
    assert any("1 of 2" in line for line in said)
    network.up.remove(B)
    assert urls(fleet.find()) == [A], "later refreshes need one"


@pytest.mark.parametrize("without", ["error", "demonstrations"])
def test_too_few_servers_end_the_run_unless_it_may_go_on_without(without: str) -> None:
    said: list[str] = []
    fleet = fleet_of(Network(A), said, rollout_min_servers=2, rollout_without_servers=without)
    if without == "error":
        with pytest.raises(RolloutError, match=r"1 of 2.*--rollout-min-servers.*http://b:2"):
            fleet.find()
    else:
        assert urls(fleet.find()) == [A]
        assert "1 of 2" in said[-1] and "--rollout-min-servers" in said[-1]


def test_no_server_is_an_error_that_names_all_of_them() -> None:
    said: list[str] = []
    fleet = fleet_of(Network(), said, rollout_wait_s=0.2)
    with pytest.raises(RolloutError) as caught:
        fleet.find()
    for part in (A, B, "cannot be reached", "--rollout-wait-s", "serve_rollouts", "demonstrations"):
        assert part in str(caught.value)


def test_without_servers_the_run_may_go_on_with_demonstrations() -> None:
    said: list[str] = []
    network = Network()
    fleet = fleet_of(network, said, rollout_without_servers="demonstrations")
    assert fleet.find() == []
    assert "training on demonstrations alone" in said[-1]
    network.up.add(A)
    assert urls(fleet.find()) == [A]


def test_find_waits_for_the_first_server(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    fleet = fleet_of(network, [], rollout_wait_s=600.0)
    monkeypatch.setattr("megatron_rasft.rollout.fleet.time.sleep", lambda s: network.up.add(B))
    assert urls(fleet.find()) == [B]


def test_servers_of_the_file_come_and_go(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "servers.txt"
    path.write_text(f"{A}\n")
    fleet = fleet_of(Network(A, B), said, rollout_urls=[], rollout_server_file=str(path))
    assert urls(fleet.find()) == [A]
    path.write_text(f"{B}\n")
    assert urls(fleet.find()) == [B]
    assert said == [f"rollout server {A} has signed off"]


def test_an_address_that_is_given_twice_is_used_once(tmp_path: Path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text(f"{A}\n{A}/\nHTTP://A:1\n{B}")
    named = [f"{A}/", "http://A:1", A, B]
    fleet = fleet_of(Network(A, B), [], rollout_urls=named, rollout_server_file=str(path))
    assert urls(fleet.find()) == [A, B]


def test_a_server_with_two_addresses_is_used_once() -> None:
    said: list[str] = []
    first, second = "http://localhost:1", "http://127.0.0.1:1"
    network = Network(first, second)
    network.info = {first: {"random_seed": 7}, second: {"random_seed": 7}}
    fleet = fleet_of(network, said, rollout_urls=[first, second])
    assert urls(fleet.find()) == urls(fleet.find()) == [first]
    assert len(said) == 1 and first in said[0] and second in said[0]
    network.info[second] = {"random_seed": 8}
    assert urls(fleet.find()) == [first, second], "two servers behind one address"


def test_different_servers_may_have_the_same_seed() -> None:
    network = Network("http://127.0.0.1:1", "http://127.0.0.1:2")
    network.info = {url: {"random_seed": 7} for url in network.up}
    fleet = fleet_of(network, [], rollout_urls=sorted(network.up))
    assert urls(fleet.find()) == sorted(network.up)


def test_a_server_file_that_becomes_unreadable_changes_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "servers.txt"
    flags: dict[str, Any] = {"rollout_urls": [], "rollout_server_file": str(path)}
    path.write_text("not an address\n")
    with pytest.raises(ValueError, match=r"servers.txt:1: 'not an address'"):
        fleet_of(Network(A, B), said, **flags).find()
    path.write_text(f"{A}\n")
    fleet = fleet_of(Network(A, B), said, **flags)
    assert urls(fleet.find()) == [A]
    path.write_text(f"{A}\n{B} # mine\n")
    assert urls(fleet.find()) == urls(fleet.find()) == [A]
    assert len(said) == 1 and "servers.txt:2" in said[0]
    path.unlink()
    path.mkdir()
    assert urls(fleet.find()) == [A]
    path.rmdir()
    path.write_text(f"{A}\n{B}\n")
    assert urls(fleet.find()) == [A, B] and len(said) == 2


@pytest.mark.parametrize(("info", "why"), [({"dp_size": 2}, "--dp-size 2"), ({"pp_size": 2}, "--pp-size 2")])
def test_a_server_that_is_not_tensor_parallel_is_left_out(info: dict[str, Any], why: str) -> None:
    said: list[str] = []
    network = Network(A, B)
    network.info[B] = info
    assert urls(fleet_of(network, said).find()) == [A]
    assert B in said[0] and why in said[0]


def test_a_server_with_another_model_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    network = Network(A, B)
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "hidden_size": 128}')
    network.info[B] = {"model_path": str(tmp_path)}
    assert urls(fleet_of(network, said).find()) == [A]
    assert "hidden_size is 128" in said[0] and "64" in said[0]
