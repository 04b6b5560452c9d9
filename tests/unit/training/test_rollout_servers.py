"""Syncs, faults and the end of a run, with stand-ins for the servers. tests/functional uses real servers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft import metrics
from megatron_rasft.config import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.monitoring.stopping import Stopped, StopRequest
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync import SyncReport
from megatron_rasft.training.rollout_servers import RolloutServers
from megatron_rasft.types import TrainingSample
from tests.unit.sync.stand_ins import StandIn, records_of


class Model:
    """A trainer and its weight sync in one object, which records the calls of the sync."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.transfer = SimpleNamespace(num_bytes=0, num_sent_bytes=0)

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

    def score(self, samples: Any, *, with_reference: bool) -> list[list[float]]:
        return [[-1.0] * len(sample.response_ids) for sample in samples]

    @contextmanager
    def parameters_gathered(self) -> Iterator[None]:
        self.calls.append("gather")
        yield
        self.calls.append("free")

    def push(self, weight_version: int, urls: list[str]) -> SyncReport:
        """Reaches every server except those at port 9."""
        self.calls.append(f"push {weight_version} {' '.join(urls)}")
        failed = {url: "does not answer" for url in urls if url.endswith(":9")}
        synced = [url for url in urls if url not in failed]
        return SyncReport(weight_version=weight_version, synced=synced, failed=failed)


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


class Scored(StandIn):
    """A server that gives every token of a probe the same log-probability."""

    def __init__(self, url: str, logprob: float = -1.0) -> None:
        super().__init__(url)
        self.change(has_memory_saver=False)
        self.logprob = logprob

    def generate(self, body: dict[str, Any]) -> Any:
        return {"meta_info": {"input_token_logprobs": [[self.logprob, i, None] for i in body["input_ids"]]}}


def servers_of(said: list[str], *stand_ins: StandIn, **flags: Any) -> tuple[RolloutServers, Any]:
    model: Any = Model()
    config = RolloutConfig(rollout_engine="sglang", rollout_urls=[s.url for s in stand_ins], **flags)
    return RolloutServers(config, model, {}, records_of(*stand_ins), said.append, is_rank_zero=True), model


def probes() -> list[TrainingSample]:
    return [
        TrainingSample(problem_id="p", kind="demonstration", prompt_ids=[1], response_ids=[2, 3], weight=1.0)
    ]


def test_servers_that_agree_with_the_trainer_are_admitted_and_the_others_quarantined() -> None:
    said: list[str] = []
    near, far, gone = Scored("http://a:1", -1.05), Scored("http://b:1", -1.5), Scored("http://c:9")
    servers, _ = servers_of(said, near, far, gone, rollout_max_logprob_gap=0.1)
    values = servers.sync(4, probes(), StopRequest(lambda: False))
    fleet = servers.engine.fleet
    assert [record.url for record in fleet.serving(4)] == [near.url]
    faults = {record.url: record.fault for record in fleet.records}
    assert "--rollout-max-logprob-gap" in faults[far.url] and "does not answer" in faults[gone.url]
    assert values[metrics.LOGPROB_GAP] == pytest.approx(0.05), "of the admitted servers"


def test_a_difference_that_is_not_a_number_is_too_large() -> None:
    broken = Scored("http://a:1", math.nan)
    servers, _ = servers_of([], broken, rollout_without_servers="demonstrations")
    servers.sync(4, probes(), StopRequest(lambda: False))
    assert servers.engine.fleet.serving(4) == []


@pytest.mark.parametrize("without", ["error", "demonstrations"])
def test_a_run_without_any_admitted_server_ends_unless_demonstrations_are_enough(without: str) -> None:
    servers, _ = servers_of([], Scored("http://c:9"), rollout_without_servers=without)
    if without == "error":
        with pytest.raises(RolloutError, match=r"http://c:9.*--rollout-without-servers"):
            servers.sync(4, probes(), StopRequest(lambda: False))
    else:
        assert metrics.LOGPROB_GAP not in servers.sync(4, probes(), StopRequest(lambda: False))


def test_servers_that_have_the_weights_get_none() -> None:
    server = Scored("http://a:1")
    servers, model = servers_of([], server)
    servers.sync(4, probes(), StopRequest(lambda: False))
    server.label = 4
    assert servers.sync(4, probes(), StopRequest(lambda: False)) == {}
    assert model.calls == ["gather", "push 4 http://a:1", "free"]
