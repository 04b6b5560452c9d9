"""What a run leaves behind at its servers; its syncs and samples are tested with real ones in tests/functional."""

from typing import Any

import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.training.servers import RolloutServers


class Model:
    """A trainer whose sync only notes what it is asked to do, and is itself that sync."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def weight_sync(self, connect: Any) -> Any:
        return self

    def describe(self) -> str:
        return "a sync"

    def make_room(self) -> None:
        self.calls.append("make room")

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
    assert model.calls == (["make room", "wake", "close"] if is_clean else ["wake"]), (
        "the others are collectives"
    )
    assert "http://a:1 could not take its memory back (cannot be reached)" in said[-1]
