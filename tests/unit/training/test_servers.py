"""What a run leaves behind at its servers; its syncs and samples are tested with real ones in tests/functional."""

from typing import Any

import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.training.servers import RolloutServers
from megatron_rasft.training.stopping import Stopped, StopRequest


class Model:
    """A trainer whose sync only notes what it is asked to do, and is itself that sync."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def weight_sync(self, connect: Any) -> Any:
        return self

    def describe(self) -> str:
        return "a sync"

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
    RolloutServers(config, model, {}, (None, None), said.append, is_lead=True).close(is_clean=is_clean)
    assert model.calls == (["wake", "close"] if is_clean else ["wake"]), "the second is a collective"
    assert "http://a:1 could not take its memory back (cannot be reached)" in said[-1]


def test_a_run_that_waits_for_a_server_stops_when_it_is_told_to() -> None:
    said: list[str] = []
    model: Any = Model()
    config = RolloutConfig(
        rollout_engine="sglang", rollout_urls=["http://127.0.0.1:1"], rollout_wait_s=3600.0
    )
    servers = RolloutServers(config, model, {}, (None, None), said.append, is_lead=True)
    with pytest.raises(Stopped):
        servers.sync(0, [], StopRequest(lambda: any("waiting up to" in line for line in said)))
