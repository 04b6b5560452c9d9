"""Servers as an engine: labelled if nobody did, all of one step, lost samples marked; without a network."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from megatron_rasft.errors import RolloutError
from megatron_rasft.evaluation.servers import Servers
from megatron_rasft.types import Request, SamplingParams

URLS = ["http://a:1", "http://b:2"]
MODEL = {"vocab_size": 100, "hidden_size": 8}
PARAMS = SamplingParams(
    num_samples=2, max_new_tokens=3, temperature=1.0, top_p=1.0, repetition_penalty=1.0, stop_ids=frozenset({9}),
    max_batch_size=8,
)  # fmt: skip


class World:
    """Servers that answer, each with a label for its weights."""

    def __init__(
        self, labels: list[str], refuses: Callable[[dict[str, Any]], bool] = lambda body: False
    ) -> None:
        self.labels = dict(
            zip((url.removeprefix("http://").partition(":")[0] for url in URLS), labels, strict=False)
        )
        self.refuses = refuses
        self.info: dict[str, Any] = {"version": "0.5", "model_path": "/far", "context_length": 50}
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name, path = request.url.host, request.url.path
        body = json.loads(request.content) if request.content else {}
        if path in ("/server_info", "/model_info"):
            return httpx.Response(200, json={**self.info, "weight_version": self.labels[name]})
        if path == "/update_weight_version":
            self.labels[name] = body["new_version"]
            return httpx.Response(200, json={"success": True})
        if path != "/generate":
            return httpx.Response(404)
        self.bodies.append(body)
        if self.refuses(body):
            return httpx.Response(400, json={"error": {"message": "no"}})
        tokens = [7, 8, 9]
        return httpx.Response(
            200,
            json={
                "output_ids": tokens,
                "meta_info": {
                    "finish_reason": {"type": "stop"},
                    "prompt_tokens": len(body["input_ids"]),
                    "weight_version": self.labels[name],
                    "output_token_logprobs": [[-1.0, token, None] for token in tokens],
                },
            },
        )

    def open(self, num: int = 1) -> Servers:
        transport = httpx.MockTransport(self)
        return Servers(URLS[:num], MODEL, 4096, transport=transport, async_transport=transport)


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
        assert servers.weight_version == 12
    assert set(world.labels.values()) == {"12"}


def test_servers_with_different_weights_are_refused() -> None:
    with pytest.raises(RolloutError, match=r"different weights \(http://a:1 step 12, http://b:2 step 13\)"):
        World(["12", "13"]).open(2)


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


def test_silence_is_an_error() -> None:
    def nobody(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(RolloutError, match="no rollout server answered"):
        Servers(URLS, MODEL, 4096, transport=httpx.MockTransport(nobody))
