"""Servers as the engine of an evaluation, without a network: labels, equal weights, lost samples."""

import io

import httpx
import pytest
from rich.console import Console

from megatron_rasft.errors import RolloutError
from megatron_rasft.monitoring import live
from megatron_rasft.tools.evaluation.server_engine import Servers
from megatron_rasft.types import Request, SamplingParams
from tests.deadlines import Deadlines, deadlines
from tests.unit.tools.evaluation.conftest import MODEL, URLS, World

__all__ = ["deadlines"]

PARAMS = SamplingParams(
    num_samples=2, max_new_tokens=3, temperature=1.0, top_p=1.0, repetition_penalty=1.0, stop_ids=frozenset({9}),
    max_batch_size=8,
)  # fmt: skip


def test_unlabelled_server_is_labelled_and_sampled() -> None:
    world = World(["default"])
    with world.open() as servers:
        assert world.labels == {"a": "0"} and servers.max_positions == 50
        groups = servers.generate(
            [Request(prompt_ids=[1, 2], seeds=[5, 6]), Request(prompt_ids=[3], seeds=[7])], PARAMS
        )
    assert [[r.token_ids for r in group] for group in groups] == [[[7, 8, 9]] * 2, [[7, 8, 9]]]
    assert {r.finish_reason for group in groups for r in group} == {"stop"}
    assert sorted(body["input_ids"] for body in world.bodies) == [[1, 2], [1, 2], [3]]


def test_label_of_a_trainer_is_kept() -> None:
    world = World(["12", "12"])
    with world.open(2) as servers:
        assert servers.weight_version == 12 and servers.weights == "step 12 of /far"
    assert set(world.labels.values()) == {"12"}


def test_servers_with_different_weights_are_refused() -> None:
    with pytest.raises(RolloutError, match=r"\(http://a:1 step 12 of /far, http://b:2 step 13 of /far\)"):
        World(["12", "13"]).open(2)


def test_servers_with_different_models_are_refused() -> None:
    world = World(["default", "default"])
    world.paths["b"] = "/near"
    with pytest.raises(RolloutError, match=r"a:1 step 0 of /far, http://b:2 step 0 of /near"):
        world.open(2)


def test_lost_samples_are_marked() -> None:
    with World(["1"], refuses=lambda body: body["input_ids"] == [3]).open() as servers:
        groups = servers.generate(
            [Request(prompt_ids=[1], seeds=[5, 6]), Request(prompt_ids=[3], seeds=[7, 8])], PARAMS
        )
    assert [[r.finish_reason for r in group] for group in groups] == [["stop"] * 2, ["abort"] * 2]


def test_a_lost_sample_keeps_its_place() -> None:
    world = World(["1"], refuses=lambda body: body["sampling_params"]["sampling_seed"] == 11)
    world.info["enable_deterministic_inference"] = True
    with world.open() as servers:
        (group,) = servers.generate([Request(prompt_ids=[1], seeds=[10, 11, 12, 13])], PARAMS)
    assert [r.finish_reason for r in group] == ["stop", "abort", "stop", "stop"]


def drawn(engine: Servers) -> list[str]:
    (group,) = engine.generate([Request(prompt_ids=[1], seeds=[5, 6])], PARAMS)
    return [r.finish_reason for r in group]


def test_a_failed_server_is_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(["12", "12"])
    with world.open(2, probe_interval_s=3600.0) as servers:
        world.down = {"b"}
        assert drawn(servers) == ["stop", "stop"]
        world.down = {"a"}
        assert drawn(servers) == ["abort", "abort"], "b was probed a moment ago"
        assert drawn(servers) == ["stop", "stop"], "all have failed, so they are probed at once"
    world.down = set()
    with world.open(2, probe_interval_s=0.0) as servers:
        world.down = {"a"}
        assert drawn(servers) == ["stop", "stop"]
        world.down = set()
        assert drawn(servers) == ["stop", "stop"]
    said = capsys.readouterr().out
    assert "a:1 is back" in said and "b:2 is back" in said and "sync" not in said


def test_a_server_that_hung_is_used_again(capsys: pytest.CaptureFixture[str], deadlines: Deadlines) -> None:
    world = World(["12"])
    is_hung = True

    async def answer(request: httpx.Request) -> httpx.Response:
        if is_hung:
            await deadlines.pass_now()
        return world(request)

    transports = {"transport": httpx.MockTransport(world), "async_transport": httpx.MockTransport(answer)}
    with Servers(URLS[:1], MODEL, 4096, deadline_s=300.0, wait_s=0.0, **transports) as servers:
        assert drawn(servers) == ["abort", "abort"]
        is_hung = False
        assert drawn(servers) == ["stop", "stop"]
    said = capsys.readouterr().out
    assert "deadline of 300 s" in said and "is back" in said


@pytest.mark.parametrize(("label", "path"), [("default", "/far"), ("13", "/far"), ("12", "/near")])
def test_a_server_that_comes_back_with_other_weights_is_not_sampled(label: str, path: str) -> None:
    world = World(["12"])
    with world.open() as servers:
        world.down = {"a"}
        assert drawn(servers) == ["abort", "abort"]
        world.down, world.labels["a"], world.paths["a"] = set(), label, path
        with pytest.raises(RolloutError, match=f"http://a:1 has the weights '{label}' of {path}"):
            drawn(servers)
    assert world.bodies == []


def test_no_answering_server_is_an_error() -> None:
    def nobody(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(RolloutError, match=r"--server.* http://a:1 cannot be reached.*; http://b:2"):
        Servers(URLS, MODEL, 4096, wait_s=0.0, transport=httpx.MockTransport(nobody))


def test_finished_samples_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    line = live.LiveLine(Console(file=text, soft_wrap=True), interval_s=0.0)
    monkeypatch.setattr(live, "_live", line)
    with World(["1"], refuses=lambda body: bool(line.look())).open() as servers:
        servers.generate([Request(prompt_ids=[1], seeds=[5, 6])], PARAMS)
    assert "sampling: 0 of 2 rollouts" in text.getvalue()
