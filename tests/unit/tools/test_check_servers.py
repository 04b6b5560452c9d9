"""The checks and the test broadcast of tools/check_servers.py against stand-ins; tests/functional uses real servers."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import torch

from megatron_rasft.errors import ServerError, ServerTimeoutError
from megatron_rasft.rollout.answers import check_generation
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync.buckets import Bucket, plan_buckets
from megatron_rasft.sync.groups import GroupFailure
from megatron_rasft.sync.wire_format import WireFormat
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_buckets import model
from tools import check_servers


class Folder:
    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(())


class Group:
    """A group whose broadcasts do nothing, or raise ``failure``."""

    def __init__(self, failure: GroupFailure | None = None) -> None:
        self.failure = failure
        self.num_sent = 0

    def broadcast(self, bucket: Bucket, memory: torch.Tensor) -> None:
        self.num_sent += 1
        if self.failure is not None:
            raise self.failure


def send(group: Group, *servers: StandIn) -> float:
    buckets = plan_buckets(model(), WireFormat(torch.bfloat16), 10**9)
    given: Any = (group, [server.record() for server in servers], Folder())
    return check_servers.send(*given, buckets, torch.device("cpu"))


@pytest.fixture
def servers() -> tuple[StandIn, StandIn]:
    return StandIn("http://a:1"), StandIn("http://b:1")


def test_servers_are_resumed(servers: tuple[StandIn, StandIn]) -> None:
    group = Group()
    assert send(group, *servers) >= 0 and group.num_sent == 1
    for server in servers:
        assert server.calls == ["pause abort", "begin", "end", "flush", "resume"]


@pytest.mark.parametrize("status", [None, 400], ids=["dies", "refuses"])
@pytest.mark.parametrize("call", ["pause abort", "begin", "broadcast"])
def test_a_server_that_fails_is_named_and_the_other_is_resumed(
    call: str, status: int | None, servers: tuple[StandIn, StandIn]
) -> None:
    bad, good = servers
    for later in ("end", "flush", "resume"):
        bad.before[later] = lambda: bad.fail("and no more", status)
    bad.before[call] = lambda: bad.fail("first", status)
    failure = GroupFailure("first", {bad.url: "first"}) if call == "broadcast" else None
    with pytest.raises(GroupFailure) as caught:
        send(Group(failure), bad, good)
    assert caught.value.servers == {bad.url: "first"}
    assert good.calls[-3:] == ["end", "flush", "resume"] and not good.is_open and not good.is_paused


@pytest.mark.parametrize("call", ["end", "flush", "resume"])
def test_a_failure_to_resume_is_reported(call: str, servers: tuple[StandIn, StandIn]) -> None:
    bad, good = servers
    bad.before[call] = lambda: bad.fail("finalizing failed")
    with pytest.raises(GroupFailure) as caught:
        send(Group(), bad, good)
    assert caught.value.servers == {bad.url: "finalizing failed"}
    assert bad.calls[-1] == "resume" and not good.is_paused


def arguments(*flags: str) -> Any:
    return check_servers.parser().parse_args(["--hf-model", "nowhere", *flags])


def examine(finding: check_servers.Finding, examined: list[str]) -> None:
    examined.append(finding.record.url)
    finding.record.info = StandIn(finding.record.url).info


def test_an_address_that_is_given_twice_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined: list[str] = []
    monkeypatch.setattr(check_servers.HfFolder, "open", lambda path: None)
    monkeypatch.setattr(check_servers, "examine", lambda finding, folder: examine(finding, examined))
    path = tmp_path / "servers.txt"
    path.write_text("http://b:2\nhttp://a:1/\n")
    flags = ["--urls", "http://a:1", "http://a:1/", "HTTP://A:1", "--server-file", str(path)]
    findings = check_servers.check(arguments(*flags, "--broadcast-mib", "0"))
    assert [f.record.url for f in findings] == ["http://a:1", "http://b:2"] and sorted(examined) == [
        "http://a:1",
        "http://b:2",
    ]


def test_a_server_that_does_not_generate_may_be_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    server = StandIn("http://a:1")
    monkeypatch.setattr(
        check_servers,
        "check_generation",
        Mock(side_effect=ServerTimeoutError("http://a:1", "/generate did not answer")),
    )
    folder: Any = SimpleNamespace(config={}, shape=SimpleNamespace(vocab_size=100))
    finding = check_servers.Finding(server.record())
    check_servers.examine(finding, folder)
    assert finding.fault.startswith("/generate did not answer") and "paused" in finding.fault


def test_a_sleeping_server_is_only_probed() -> None:
    server = StandIn("http://a:1")
    server.set_weight_label("asleep weights kv_cache")
    folder: Any = SimpleNamespace(config={}, shape=SimpleNamespace(vocab_size=100))
    finding = check_servers.Finding(server.record())
    check_servers.examine(finding, folder)
    assert "released its memory" in finding.fault and server.calls[1:] == ["probe"]


def test_an_aborted_generation_is_a_failure() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        aborted = {"finish_reason": {"type": "abort"}, "prompt_tokens": 1}
        return httpx.Response(200, json={"output_ids": [], "meta_info": aborted, "weight_version": "default"})

    client = ServerClient("http://a:1", transport=httpx.MockTransport(answer))
    with client, pytest.raises(ServerError, match=r"http://a:1.*aborted"):
        check_generation(client, 10)


def dead_or_alive(request: httpx.Request) -> httpx.Response:
    if request.url.host == "dead":
        raise httpx.ConnectError("connection refused")
    raise httpx.ReadTimeout("slow")


def test_only_servers_that_nothing_answers_for_are_dropped_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "servers.txt"
    file.write_text("# by hand\nhttp://dead:1\nhttp://slow:1\n")
    records = ServerRecords(connect=partial(ServerClient, transport=httpx.MockTransport(dead_or_alive)))
    findings = [
        check_servers.Finding(records.get(url)) for url in ("http://dead:2", "http://dead:1", "http://slow:1")
    ]
    for finding in findings:
        check_servers.examine(finding, Folder())  # type: ignore[arg-type]
    left = check_servers.drop_dead(findings, file)
    assert [f.record.url for f in left] == ["http://dead:2", "http://slow:1"], (
        "the first is not from the file"
    )
    assert file.read_text() == "# by hand\nhttp://slow:1\n"
    assert capsys.readouterr().out.count("http://dead:1") == 1
    with pytest.raises(ValueError, match="--server-file"):
        check_servers.drop_dead(findings, None)
