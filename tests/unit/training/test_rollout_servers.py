"""Syncs, faults and the end of a run at its servers, on stand-ins. tests/functional has real servers."""

from typing import Any

import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.training.rollout_servers import RolloutServers
from megatron_rasft.training.stopping import Stopped, StopRequest
from tests.unit.sync.stand_ins import StandIn, records_of


class Model:
    """A trainer and its weight sync in one object, which notes the calls of the sync."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def weight_sync(self, records: Any) -> Any:
        return self

    def describe(self) -> str:
        return "a sync"

    def empty_cache(self, *, waits: bool = True) -> None:
        self.calls.append("empty cache with the others" if waits else "empty cache")

    def sleep(self, urls: list[str]) -> dict[str, str]:
        self.calls.append(f"sleep {' '.join(urls)}")
        return {}

    def wake(self) -> dict[str, str]:
        self.calls.append("wake")
        return {"http://a:1": "cannot be reached"}

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("is_clean", [True, False])
def test_sleeping_servers_are_woken_however_a_run_ends(is_clean: bool) -> None:
    model: Any = Model()
    said: list[str] = []
    config = RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"])
    RolloutServers(config, model, {}, ServerRecords(), said.append, is_rank_zero=True).close(
        is_clean=is_clean
    )
    assert model.calls == (
        ["empty cache with the others", "wake", "close"] if is_clean else ["empty cache", "wake"]
    ), "after an error nothing may wait for other ranks"
    assert "http://a:1" in said[-1] and "cannot be reached" in said[-1]


def test_a_quarantined_server_frees_its_memory_too() -> None:
    model: Any = Model()
    config = RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1", "http://b:1", "http://c:1"])
    stand_ins = [StandIn(url) for url in config.rollout_urls]
    stand_ins[2].change(has_memory_saver=False)
    servers = RolloutServers(config, model, {}, records_of(*stand_ins), lambda line: None, is_rank_zero=True)
    fleet = servers.engine.fleet
    for record in fleet.find():
        fleet.admit(record.url, 1)
    fleet.quarantine("http://b:1", "failed 3 times in a row")
    servers.sleep()
    assert model.calls == ["sleep http://a:1 http://b:1"]


def test_a_run_that_waits_for_a_server_can_be_stopped() -> None:
    said: list[str] = []
    model: Any = Model()
    config = RolloutConfig(
        rollout_engine="sglang", rollout_urls=["http://127.0.0.1:1"], rollout_wait_s=3600.0
    )
    servers = RolloutServers(config, model, {}, ServerRecords(), said.append, is_rank_zero=True)
    with pytest.raises(Stopped):
        servers.sync(0, [], StopRequest(lambda: any("waiting up to" in line for line in said)))
