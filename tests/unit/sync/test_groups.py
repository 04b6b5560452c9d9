"""Update groups: the rendezvous, and whose fault a failed broadcast is."""

import time
from collections.abc import Callable

import pytest
import torch

from megatron_rasft.sync.buckets import Bucket, plan_buckets
from megatron_rasft.sync.groups import GroupFailure, UpdateGroup, is_own_address, local_address
from megatron_rasft.sync.served import ServedFormat
from tests.unit.sync.stand_ins import StandIn
from tests.unit.sync.test_buckets import model


def group(*servers: StandIn, timeout_s: float = 20.0, **options: object) -> UpdateGroup:
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
    (bucket,) = plan_buckets(model(), ServedFormat(torch.bfloat16), 10**9)
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


@pytest.mark.parametrize("agent", ["True", "False"])
def test_the_store_is_made_under_torchrun_too(
    agent: str, servers: tuple[StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun tells torch's rendezvous that a server is there already; at this address there is none."""
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


def test_a_port_in_use_names_its_flag(servers: tuple[StandIn, StandIn]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="--sync-port"):
            group(*servers, port=taken.getsockname()[1])


@pytest.mark.parametrize(
    ("status", "says"), [(400, "out of memory"), (None, "connection reset")], ids=["refuses", "is gone"]
)
def test_a_server_that_fails_is_named_at_once(
    status: int | None, says: str, servers: tuple[StandIn, StandIn], bucket: tuple[Bucket, torch.Tensor]
) -> None:
    joined = group(*servers, timeout_s=10.0)
    servers[1].before["update"] = lambda: servers[1].fail(says, status)
    began = time.monotonic()
    with pytest.raises(GroupFailure, match=says) as caught:
        joined.broadcast(*bucket)
    assert list(caught.value.servers) == ["http://b:1"]
    assert time.monotonic() - began < 9, "the deadline was waited for"


def test_a_stuck_server_is_named_at_the_deadline(
    servers: tuple[StandIn, StandIn], bucket: tuple[Bucket, torch.Tensor]
) -> None:
    joined = group(*servers, timeout_s=2.0)
    servers[0].before["update"] = hang_for(8)
    with pytest.raises(GroupFailure, match=r"stuck .* more than 2 s") as caught:
        joined.broadcast(*bucket)
    assert list(caught.value.servers) == ["http://a:1"]


def test_a_server_that_does_not_join_is_named(servers: tuple[StandIn, StandIn]) -> None:
    servers[1].before["init"] = lambda: servers[1].fail("no NCCL here")
    with pytest.raises(GroupFailure, match="no NCCL here") as caught:
        group(*servers, timeout_s=5.0)
    assert list(caught.value.servers) == ["http://b:1"]


def test_the_address_is_the_one_the_servers_reach() -> None:
    assert local_address(["http://127.0.0.1:30000", "http://localhost:30001"]) == "127.0.0.1"
    with pytest.raises(ValueError, match="--sync-address"):
        local_address(["http://no.such.host.invalid:30000"])


def test_a_named_interface_decides_on_the_address() -> None:
    assert local_address(["http://no.such.host.invalid:30000"], "lo") == "127.0.0.1"
    assert local_address(["http://localhost:30000"], "=lo,lo2") == "127.0.0.1", (
        "a pattern of NCCL's: by the way"
    )


def test_an_address_is_known_for_this_machines() -> None:
    assert is_own_address("127.0.0.1") and is_own_address("localhost")
    assert not is_own_address("192.0.2.1") and not is_own_address("no.such.host.invalid")


def hang_for(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)
