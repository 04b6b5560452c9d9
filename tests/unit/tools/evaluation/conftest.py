"""Engines, graders and servers with known answers."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.server_engine import Servers
from megatron_rasft.types import Request, Response, Rollout, SamplingParams

URLS = ["http://a:1", "http://b:2"]
MODEL = {"vocab_size": 100, "hidden_size": 8}


class CountingEngine:
    """An engine whose response is the prompt and the seed.

    Args:
        fails_after: raise KeyboardInterrupt after this number of batches.
    """

    max_positions = 100

    def __init__(self, fails_after: int | None = None) -> None:
        self.seeds: list[int] = []
        self.num_prompts: list[int] = []
        self._fails_after = fails_after

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        if self._fails_after is not None and len(self.num_prompts) == self._fails_after:
            raise KeyboardInterrupt
        self.num_prompts.append(len(requests))
        self.seeds += [seed for request in requests for seed in request.seeds]
        return [
            [Response(token_ids=[*r.prompt_ids, seed], logprobs=[], finish_reason="stop") for seed in r.seeds]
            for r in requests
        ]


def grade_even(rollouts: list[Rollout], problems: dict[str, Problem]) -> None:
    """Grades a response as correct if its seed is even."""
    for rollout in rollouts:
        assert rollout.problem_id in problems
        is_right = rollout.response_ids[-1] % 2 == 0
        rollout.verdict, rollout.verdict_reason = ("correct" if is_right else "wrong"), "by parity"


class World:
    """Servers that answer, each with a label for its weights."""

    def __init__(
        self, labels: list[str], refuses: Callable[[dict[str, Any]], bool] = lambda body: False
    ) -> None:
        self.labels = dict(
            zip((url.removeprefix("http://").partition(":")[0] for url in URLS), labels, strict=False)
        )
        self.refuses = refuses
        self.info: dict[str, Any] = {"version": "0.5", "context_length": 50}
        self.paths = dict.fromkeys(self.labels, "/far")
        self.down: set[str] = set()
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name, path = request.url.host, request.url.path
        body = json.loads(request.content) if request.content else {}
        if name in self.down:
            raise httpx.ConnectError("refused")
        if path in ("/server_info", "/model_info"):
            return httpx.Response(
                200, json={"model_path": self.paths[name], "weight_version": self.labels[name], **self.info}
            )
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

    def open(self, num: int = 1, **options: Any) -> Servers:
        transport = httpx.MockTransport(self)
        options |= {"wait_s": 0.0, "transport": transport, "async_transport": transport}
        return Servers(URLS[:num], MODEL, 4096, **options)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()
