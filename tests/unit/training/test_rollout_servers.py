"""What a run leaves behind at its servers; its syncs and samples are tested with real ones in tests/functional."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.errors import ServerError
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.training.rollout_servers import RolloutServers, logprob_gap
from megatron_rasft.training.stopping import Stopped, StopRequest
from megatron_rasft.types import TrainingSample
from tests.unit.sync.stand_ins import StandIn, records_of


class Model:
    """A trainer whose sync only notes what it is asked to do, and is itself that sync."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def weight_sync(self, records: Any) -> Any:
        return self

    def describe(self) -> str:
        return "a sync"

    def empty_cache(self, *, waits: bool = True) -> None:
        self.calls.append("make room with the others" if waits else "make room")

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
    RolloutServers(config, model, {}, ServerRecords(), said.append, is_lead=True).close(is_clean=is_clean)
    assert model.calls == (
        ["make room with the others", "wake", "close"] if is_clean else ["make room", "wake"]
    ), "the rest is collective"
    assert "http://a:1 could not take its memory back (cannot be reached)" in said[-1]


def test_a_server_that_was_left_out_gives_up_its_memory_too() -> None:
    model: Any = Model()
    config = RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1", "http://b:1", "http://c:1"])
    stand_ins = [StandIn(url) for url in config.rollout_urls]
    stand_ins[2].change(has_memory_saver=False)
    servers = RolloutServers(config, model, {}, records_of(*stand_ins), lambda line: None, is_lead=True)
    fleet = servers.engine.fleet
    for record in fleet.find():
        fleet.admit(record.url, 1)
    fleet.quarantine("http://b:1", "failed 3 times in a row")
    servers.rest()
    assert model.calls == ["sleep http://a:1 http://b:1"]


def test_a_run_that_waits_for_a_server_stops_when_it_is_told_to() -> None:
    said: list[str] = []
    model: Any = Model()
    config = RolloutConfig(
        rollout_engine="sglang", rollout_urls=["http://127.0.0.1:1"], rollout_wait_s=3600.0
    )
    servers = RolloutServers(config, model, {}, ServerRecords(), said.append, is_lead=True)
    with pytest.raises(Stopped):
        servers.sync(0, [], StopRequest(lambda: any("waiting up to" in line for line in said)))


class Prober(StandIn):
    """Refuses, as SGLang does, what does not fit its context; finds every token half a nat less likely than -1."""

    def __init__(self, **limits: Any) -> None:
        super().__init__("http://a:1")
        self.change(**limits)
        self.context = min(
            v["max_position_embeddings"] if isinstance(v, dict) else v for v in limits.values()
        )

    def generate(self, body: dict[str, Any]) -> Any:
        ids = json.loads(json.dumps(body))["input_ids"]
        if len(ids) >= self.context - 6:
            raise ServerError(self.url, "Input length exceeds the maximum allowed length", 400)
        return {
            "meta_info": {"input_token_logprobs": [[None, ids[0], None], *([-1.5, i, None] for i in ids[1:])]}
        }


def probe(num_prompt: int, num_response: int) -> TrainingSample:
    return TrainingSample(
        problem_id="a",
        kind="demonstration",
        # views, as the row cache gives them
        prompt_ids=memoryview(np.arange(num_prompt, dtype=np.int32)),  # type: ignore[arg-type]
        response_ids=memoryview(np.arange(100, 100 + num_response, dtype=np.int32)),  # type: ignore[arg-type]
        weight=1.0,
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"context_length": 64},
        {"model_config": {"max_position_embeddings": 64}},
        {"context_length": 4096, "max_total_tokens": 64},
    ],
    ids=["flag", "config.json", "cache"],
)
def test_a_server_is_compared_on_what_its_context_holds(limits: dict[str, Any]) -> None:
    server = Prober(**limits).record()
    probes = [probe(10, 20), probe(10, 54), probe(64, 5)]
    expected = [[-1.0] * len(p.response_ids) for p in probes]
    assert logprob_gap(server, probes, expected) == pytest.approx(0.5)
    assert logprob_gap(server, probes[:1], [[-2.0] * 20]) == pytest.approx(0.5)
    found = logprob_gap(server, probes[2:], expected[2:])
    assert found == "holds none of 1 demonstrations in a context of 64 tokens", "and not that they agree"
