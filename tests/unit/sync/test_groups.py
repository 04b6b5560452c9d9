"""Update groups: the rendezvous, and which server a failed broadcast names."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_rasft.sync.broadcaster import Broadcaster, prepare_nccl
from megatron_rasft.sync.buckets import Bucket, plan_buckets
from megatron_rasft.sync.groups import (
    GroupFailure,
    UpdateGroup,
    error_with_cause,
    is_own_address,
    listening_address,
    local_address,
)
from megatron_rasft.sync.wire_format import WireFormat
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_buckets import model


def group(*servers: StandIn, timeout_s: float = 600.0, **options: object) -> UpdateGroup:
    values = {"address": "127.0.0.1", "port": 0, "interface": None, **options}
    return UpdateGroup(
        servers,
        [1] * len(servers),
        name=f"test-{time.monotonic_ns()}",
        backend="gloo",
        device=torch.device("cpu"),
        timeout_s=timeout_s,
        **values,  # type: ignore[arg-type]
    )


@pytest.fixture
def servers() -> tuple[StandIn, StandIn]:
    return StandIn("http://a:1", False), StandIn("http://b:1", False)


@pytest.fixture
def bucket() -> tuple[Bucket, torch.Tensor]:
    (bucket,) = plan_buckets(model(), WireFormat(torch.bfloat16), 10**9)
    return bucket, torch.randint(0, 256, (bucket.num_bytes,), dtype=torch.uint8)


def test_every_server_gets_the_bytes(
    servers: tuple[StandIn, StandIn], bucket: tuple[Bucket, torch.Tensor]
) -> None:
    joined = group(*servers)
    joined.broadcast(*bucket)
    joined.broadcast(*bucket)
    for server in servers:
        for name, view in bucket[0].views(bucket[1]).items():
            assert torch.equal(server.weights[name].view(torch.uint8), view.contiguous().view(torch.uint8))
    joined.close()
    assert [server.calls[-1] for server in servers] == ["destroy", "destroy"]


def test_servers_and_trainer_leave_a_group_together(
    servers: tuple[StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one node a server's NCCL may be unable to leave before the trainer's does."""
    joined = group(*servers)
    has_left = threading.Event()
    abort = joined.abort
    monkeypatch.setattr(joined, "abort", lambda: (abort(), has_left.set()))
    found = []
    servers[0].before["destroy"] = lambda: found.append(has_left.wait(600))
    joined.close()
    assert found == [True]


@pytest.mark.parametrize("agent", ["True", "False"])
def test_the_store_is_created_under_torchrun_too(
    agent: str, servers: tuple[StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun makes torch's own rendezvous expect an existing store, but this address has no store."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    group(*servers).close()


def test_an_interface_can_be_named(
    servers: tuple[StandIn, StandIn], bucket: tuple[Bucket, torch.Tensor]
) -> None:
    joined = group(*servers, interface="lo")
    joined.broadcast(*bucket)
    joined.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_the_store_listens_on_its_address_alone(servers: tuple[StandIn, StandIn], address: str) -> None:
    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("tcp")
        return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}

    before = listening()
    joined = group(*servers, address=address)
    opened = listening() - before
    joined.close()
    assert opened and {ip for ip, _ in opened} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("address", "resolved", "host"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "::1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("node1", "10.0.0.7", "10.0.0.7"),
        ("node1", "127.0.1.1", ""),
    ],
)
def test_a_machines_own_name_is_reachable_from_other_machines(
    monkeypatch: pytest.MonkeyPatch, address: str, resolved: str, host: str
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (resolved, 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: found)
    assert listening_address(address) == (socket.AF_INET, host)


@pytest.mark.parametrize(
    ("status", "says"), [(400, "out of memory"), (None, "connection reset")], ids=["refuses", "is gone"]
)
def test_a_server_that_fails_is_named_at_once(
    status: int | None, says: str, servers: tuple[StandIn, StandIn], bucket: tuple[Bucket, torch.Tensor]
) -> None:
    joined = group(*servers, timeout_s=10_000.0)  # longer than a test may take
    servers[1].before["update"] = lambda: servers[1].fail(says, status)
    with pytest.raises(GroupFailure, match=says) as caught:
        joined.broadcast(*bucket)
    assert list(caught.value.servers) == ["http://b:1"]


def test_a_stuck_server_is_named_at_the_deadline(
    servers: tuple[StandIn, StandIn], bucket: tuple[Bucket, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = group(*servers)
    has_ended = threading.Event()
    servers[0].before["update"] = lambda: (has_ended.wait(900), servers[0].fail())
    monkeypatch.setattr(joined, "_timeout_s", 4.0)  # joining must succeed, so it has more time
    with pytest.raises(GroupFailure, match="within 4 s") as caught:
        joined.broadcast(*bucket)
    has_ended.set()
    assert list(caught.value.servers) == ["http://a:1"]


def test_a_server_that_does_not_join_is_named(servers: tuple[StandIn, StandIn]) -> None:
    servers[1].before["init"] = lambda: servers[1].fail("no NCCL here")
    with pytest.raises(GroupFailure, match="no NCCL here") as caught:
        group(*servers)
    assert list(caught.value.servers) == ["http://b:1"]


STUCK = """
import time
import torch
from megatron_rasft.sync.broadcaster import Broadcaster
from megatron_rasft.sync.groups import GroupFailure
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_groups import group
from tests.unit.sync.test_buckets import model
from megatron_rasft.sync.buckets import plan_buckets
from megatron_rasft.sync.wire_format import WireFormat

server = StandIn("http://a:1", False)
joined = group(server)
Broadcaster.send = lambda self, memory: time.sleep(3600)  # like NCCL while it connects: no abort ends it
server.before["update"] = lambda: server.fail("is gone", None)
(bucket,) = plan_buckets(model(), WireFormat(torch.bfloat16), 10**9)
try:
    joined.broadcast(bucket, torch.zeros(bucket.num_bytes, dtype=torch.uint8))
except GroupFailure as failure:
    print(failure)
"""


def test_a_collective_that_never_ends_does_not_keep_the_process_alive() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", STUCK],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=900,  # otherwise the process would run for an hour
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "is gone" in done.stdout


class NcclStandIn:
    """Replaces torch's NCCL group. Its broadcast is complete after ``looks`` checks. It records how it was created and used."""

    Options = type("Options", (), {})

    def __init__(self, *arguments: Any) -> None:
        self.environment = dict(os.environ)
        self.events: list[str] = []
        self.stream = "the trainer's"
        self.looks = 3

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> "NcclStandIn":
        self.events.append(f"broadcast on {self.stream} stream")
        return self

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def wait(self) -> None:
        self.events.append("wait, done" if self.looks <= 0 else "wait")
        raise RuntimeError("remote process exited")


@pytest.fixture
def over_nccl(monkeypatch: pytest.MonkeyPatch) -> tuple[Broadcaster, NcclStandIn]:
    """A broadcaster over NCCL without a GPU, and the stand-in that it uses."""
    created: list[NcclStandIn] = []

    def create(*arguments: Any) -> NcclStandIn:
        created.append(NcclStandIn(*arguments))
        return created[0]

    @contextmanager
    def use(stream: str) -> Iterator[None]:
        created[0].stream = stream
        yield
        created[0].stream = "the trainer's"

    create.Options = NcclStandIn.Options  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "ProcessGroupNCCL", create)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "its own")
    monkeypatch.setattr(torch.cuda, "stream", use)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    device = torch.device("cuda", 0)
    return Broadcaster("nccl", store, "test", 2, "eth7", device, timedelta(seconds=5)), created[0]


def test_an_error_of_nccl_does_not_end_the_trainer(
    over_nccl: tuple[Broadcaster, NcclStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's watchdog would end the process.

    It starts unless waits block, and ends the process unless its error handling is off.
    """
    made_with = over_nccl[1].environment
    assert (
        made_with["TORCH_NCCL_BLOCKING_WAIT"] == "1" and made_with["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    )
    assert (
        "TORCH_NCCL_BLOCKING_WAIT" not in os.environ and "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
    )


def test_over_nccl_no_stream_of_the_trainer_waits_for_the_servers(
    over_nccl: tuple[Broadcaster, NcclStandIn],
) -> None:
    broadcaster, backend = over_nccl
    with pytest.raises(RuntimeError, match="remote process exited"):
        broadcaster.send(torch.zeros(1))
    assert backend.events == ["broadcast on its own stream", "wait, done"]


def test_nccl_gets_the_settings_of_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "eth0"})
    prepare_nccl()
    assert os.environ["NCCL_CUMEM_ENABLE"] == "0" and os.environ["NCCL_SOCKET_IFNAME"] == "eth0"
    os.environ["NCCL_CUMEM_ENABLE"] = "1"
    prepare_nccl("eth1")
    assert os.environ["NCCL_CUMEM_ENABLE"] == "1" and os.environ["NCCL_SOCKET_IFNAME"] == "eth1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "NCCL error in: NCCLUtils.cpp:94, invalid usage, NCCL version 2.30.7\nncclInvalidUsage: This usually reflects "
            "invalid usage of NCCL library.\nLast error:\nMismatched NCCL version detected : rank 1 version 22809\n",
            "NCCL error in: NCCLUtils.cpp:94, invalid usage, NCCL version 2.30.7: Mismatched NCCL version detected : rank 1 "
            "version 22809",
        ),
        ("Connection closed by peer\nraised at gloo", "Connection closed by peer"),
        ("", "RuntimeError"),
    ],
    ids=["NCCL", "gloo", "nothing"],
)
def test_an_error_of_torch_is_one_line_with_its_cause(text: str, says: str) -> None:
    assert error_with_cause(RuntimeError(text)) == says


def test_the_address_is_that_of_the_route_to_the_servers() -> None:
    assert local_address(["http://127.0.0.1:30000", "http://localhost:30001"]) == "127.0.0.1"
    with pytest.raises(ValueError, match="--sync-address"):
        local_address(["http://no.such.host.invalid:30000"])


def test_a_named_interface_decides_on_the_address() -> None:
    assert local_address(["http://no.such.host.invalid:30000"], "lo") == "127.0.0.1"
    assert local_address(["http://localhost:30000"], "=lo,lo2") == "127.0.0.1", (
        "a pattern of NCCL's: by the way"
    )


def test_addresses_of_this_machine_are_recognised() -> None:
    assert is_own_address("127.0.0.1") and is_own_address("localhost")
    assert not is_own_address("192.0.2.1") and not is_own_address("no.such.host.invalid")
