"""Sampling without a network: every sample is counted exactly once, even if servers fail."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from megatron_rasft.config import RolloutConfig
from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout import sampling
from megatron_rasft.rollout.engine import SglangEngine
from megatron_rasft.rollout.fleet import Fleet
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.types import Request, Response, SamplingParams
from tests.deadlines import Deadlines, deadlines

__all__ = ["deadlines"]

pytestmark = pytest.mark.usefixtures("deadlines")  # no server is slow because the machine is busy

A, B = "http://a:1", "http://b:2"
VERSION = 5
VOCABULARY = 100
STOP = 9


def params(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {
        "num_samples": 2,
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "stop_ids": frozenset({STOP}),
        "max_batch_size": 8,
    }
    return SamplingParams(**{**values, **changes})


def requests_of(num: int, num_samples: int = 2) -> list[Request]:
    return [
        Request(prompt_ids=[10 + i, 11], seeds=[num_samples * i + k for k in range(num_samples)])
        for i in range(num)
    ]


def answer_of(
    body: dict[str, Any], tokens: list[int] | None = None, reason: str = "length"
) -> dict[str, Any]:
    """Returns the answer of a healthy server: as many tokens as allowed, each the length so far, with log-probability -1."""
    if tokens is None:
        start = len(body["input_ids"])
        tokens = list(range(start, start + body["sampling_params"]["max_new_tokens"]))
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": reason},
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": str(VERSION),
            "output_token_logprobs": [[-1.0, token, None] for token in tokens],
        },
    }


def finished(responses: list[list[Response | None]]) -> list[Response]:
    return [r for group in responses for r in group if r is not None]


Generate = Callable[[str, dict[str, Any]], httpx.Response | dict[str, Any]]


class Servers:
    """Two servers whose /generate is ``generate(url, body)``; records the requests to each."""

    def __init__(self, generate: Generate, **flags: Any) -> None:
        self.generate = generate
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []
        self.info: dict[str, Any] = {"max_running_requests": 4}
        self.running: Counter[str] = Counter()
        self.most_running: Counter[str] = Counter()
        values: dict[str, Any] = {"rollout_engine": "sglang", "rollout_urls": [A, B], **flags}
        self.fleet = Fleet(
            RolloutConfig(**values),
            ServerRecords(connect=partial(ServerClient, transport=httpx.MockTransport(self.control))),
            say=self.said.append,
            model_config={"vocab_size": VOCABULARY},
        )

    def sample(self, requests: list[Request], sampling: SamplingParams | None = None) -> Any:
        for record in self.fleet.find():
            self.fleet.admit(record.url, VERSION)
        with SglangEngine(self.fleet, httpx.MockTransport(self.answer)) as engine:
            answers = engine.generate(requests, sampling or params(), VERSION)
        report = answers.report
        assert sum(report.outcomes.values()) == report.num_samples == sum(len(r.seeds) for r in requests)
        assert [len(group) for group in answers.responses] == [len(r.seeds) for r in requests]
        assert len(finished(answers.responses)) == report.num_finished
        return answers

    def control(self, request: httpx.Request) -> httpx.Response:
        if request.method == "OPTIONS":
            return httpx.Response(405)
        return httpx.Response(200, json={"model_path": "/m", "weight_version": str(VERSION), **self.info})

    async def answer(self, request: httpx.Request) -> httpx.Response:
        url = f"http://{request.url.host}:{request.url.port}"
        if request.url.path != "/generate":
            return self.control(request)
        body = json.loads(request.content)
        self.asked.append((url, body))
        self.running[url] += 1
        self.most_running[url] = max(self.most_running[url], self.running[url])
        try:
            await asyncio.sleep(0)
            answer = self.generate(url, body)
            if isinstance(answer, dict) and "is_late" in answer:
                await answer["is_late"].pass_now()
            if isinstance(answer, dict) and answer.get("hangs"):
                await asyncio.sleep(answer["hangs"])
                answer = answer_of(body)
        finally:
            self.running[url] -= 1
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)


def good(url: str, body: dict[str, Any]) -> dict[str, Any]:
    return answer_of(body)


def test_samples_come_back_in_order_from_both_servers() -> None:
    servers = Servers(good)
    responses, report = servers.sample(requests_of(20))
    assert [len(group) for group in responses] == [2] * 20
    assert all(r.token_ids == [2, 3, 4, 5] and r.logprobs == [-1.0] * 4 for g in responses for r in g)
    assert report.outcomes == {"length": 40, "failed": 0, "refused": 0} or report.outcomes["length"] == 40
    assert set(report.samples_by_server) == {A, B} and report.num_tokens == 160
    assert servers.said == []


def test_no_server_gets_more_requests_than_it_runs_at_once() -> None:
    servers = Servers(good)
    servers.sample(requests_of(50))
    assert servers.most_running == {A: 4, B: 4}
    servers = Servers(good, rollout_concurrency=3)
    servers.sample(requests_of(50))
    assert servers.most_running == {A: 3, B: 3}


def limit_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    """Limits the number of files that can still be opened. Returns the limits set later, minus the files already open."""
    num_open = psutil.Process().num_fds()
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(sampling.psutil.Process, "num_fds", lambda self: num_open)
    monkeypatch.setattr(sampling.resource, "getrlimit", lambda which: (num_open + soft, num_open + hard))
    monkeypatch.setattr(
        sampling.resource, "setrlimit", lambda which, to: limits.append((to[0] - num_open, to[1] - num_open))
    )
    return limits


def test_the_limit_of_open_files_is_raised_if_necessary(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = limit_open_files(monkeypatch, 10, 10**6)
    servers = Servers(good)
    servers.sample(requests_of(50))
    assert (
        limits == [(2 * 4 + 2 + 256, 10**6)] and servers.most_running == {A: 4, B: 4} and servers.said == []
    )
    limits = limit_open_files(monkeypatch, 1000, 10**6)
    Servers(good).sample(requests_of(50))
    assert limits == []


def test_fewer_requests_run_if_the_limit_of_open_files_cannot_be_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_open_files(monkeypatch, 10, 10)
    servers = Servers(good)
    _, report = servers.sample(requests_of(50))
    assert report.num_finished == 100 and report.num_quarantined == 0
    assert sum(servers.most_running.values()) == 3 and "ulimit -n" in servers.said[0]


def test_the_sampling_parameters_are_all_sent() -> None:
    servers = Servers(good)
    servers.sample(requests_of(1, 1), params(temperature=0.7, top_p=0.9, repetition_penalty=1.1))
    (_, body) = servers.asked[0]
    assert body == {
        "input_ids": [10, 11],
        "sampling_params": {
            "max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.1, "stop_token_ids": [STOP],
        },
        "return_logprob": True,
    }  # fmt: skip


def test_seeds_are_sent_only_to_servers_that_use_them() -> None:
    servers = Servers(good)
    servers.info["enable_deterministic_inference"] = True
    servers.sample(requests_of(3))
    assert sorted(b["sampling_params"]["sampling_seed"] for _, b in servers.asked) == list(range(6))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda a: a.update(output_ids=[1, 2, VOCABULARY, 3]), "outside the vocabulary"),
        (lambda a: a.update(output_ids=[-1, 2, 3, 4]), "outside the vocabulary"),
        (lambda a: a.update(output_ids=["1", 2, 3, 4]), "outside the vocabulary"),
        (lambda a: a.update(output_ids=[7, 7, 7, 7]), "log-probability of another token"),
        (lambda a: a.update(output_ids=[2, 3, 4]), "numbers of tokens"),
        (lambda a: a.update(output_ids=None), "list of 1 to 4 tokens"),
        (lambda a: a.update(output_ids=[1] * 5), "list of 1 to 4 tokens"),
        (lambda a: a.update(output_ids=[]), "list of 1 to 4 tokens"),
        (lambda a: a.pop("output_ids"), "without a requested field"),
        (lambda a: a["meta_info"].pop("output_token_logprobs"), "without a requested field"),
        (
            lambda a: a["meta_info"]["output_token_logprobs"].__setitem__(0, [0.5, 2, None]),
            "0.5 as the log-probability",
        ),
        (
            lambda a: a["meta_info"]["output_token_logprobs"].__setitem__(0, [None, 2, None]),
            "None as the log-probability",
        ),
        (lambda a: a["meta_info"]["output_token_logprobs"].__setitem__(0, "x"), "log-probability of another"),
        (
            lambda a: a["meta_info"]["output_token_logprobs"].__setitem__(0, [-(10**400), 2, None]),
            "log-probability of token 2",
        ),
        (lambda a: a["meta_info"].update(finish_reason={"type": "tired"}), "finish reason 'tired'"),
        (lambda a: a["meta_info"].update(finish_reason=None), "without a requested field"),
        (lambda a: a["meta_info"].update(prompt_tokens=9), "9 prompt tokens"),
        (lambda a: a["meta_info"].update(weight_version="default"), "weights 'default', not those of step 5"),
        (
            lambda a: a["meta_info"].update(weight_versions=[{"version": "4", "start": 0, "end": 4}]),
            "weights '4', not those of step 5",
        ),
    ],
)
def test_a_server_with_an_impossible_answer_is_left_out(
    spoil: Callable[[dict[str, Any]], None], why: str
) -> None:
    def generate(url: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = answer_of(body)
        if url == B:
            spoil(answer)
        return answer

    servers = Servers(generate)
    responses, report = servers.sample(requests_of(20))
    assert report.num_finished == 40 and set(report.samples_by_server) == {A}
    assert all(r.token_ids == [2, 3, 4, 5] for group in responses for r in group)
    assert len(servers.said) == 1 and B in servers.said[0] and why in servers.said[0]
    assert [m.weight_version for m in servers.fleet.records] == [VERSION, None]


@pytest.mark.parametrize(
    "broken",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, text="[1, 2]"),
        httpx.Response(200, content=b'{"output_ids": [1'),
        httpx.Response(200, content=b"\xff\x00"),
        httpx.Response(200, content=b"[" * 10**6),
        httpx.Response(500, text="Internal Server Error"),
        httpx.Response(401, json={"error": "Unauthorized"}),
    ],
    ids=["html", "no object", "truncated", "binary", "brackets", "500", "401"],
)
def test_a_broken_server_costs_no_sample(broken: httpx.Response) -> None:
    servers = Servers(lambda url, body: broken if url == B else answer_of(body))
    _, report = servers.sample(requests_of(20))
    assert report.num_finished == 40 and report.num_retried >= 1 and report.num_quarantined == 1
    assert len(servers.said) == 1 and B in servers.said[0]


def test_occasional_errors_do_not_quarantine_a_server() -> None:
    count = iter(range(10**6))
    servers = Servers(
        lambda url, body: httpx.Response(500) if next(count) % 7 == 6 else answer_of(body), rollout_attempts=9
    )
    _, report = servers.sample(requests_of(30))
    assert report.num_finished == 60 and report.num_quarantined == 0 and servers.said == []


FULL = httpx.Response(503, json={"error": {"message": "The request queue is full."}})


@pytest.mark.parametrize("urls", [[A, B], [B]], ids=["one of two", "the only one"])
@pytest.mark.parametrize("answer", [FULL, httpx.Response(429)], ids=["503", "429"])
def test_a_full_server_gets_requests_again_later_without_limit(
    monkeypatch: pytest.MonkeyPatch, urls: list[str], answer: httpx.Response
) -> None:
    monkeypatch.setattr(sampling, "MIN_BACKOFF_S", 0.01)
    count = iter(range(10**6))
    servers = Servers(
        lambda url, body: answer if url == B and next(count) % 8 else answer_of(body),
        rollout_urls=urls,
        rollout_attempts=1,
    )
    _, report = servers.sample(requests_of(20))
    assert report.num_finished == 40 and report.num_turned_away >= 3
    assert report.num_quarantined == report.num_retried == 0 and servers.said == []
    assert f"{report.num_turned_away} turned away" in report.describe()


def test_a_full_server_gets_no_request_for_as_long_as_it_asks() -> None:
    asked_s = [
        sampling.backoff_s(httpx.Response(503, headers={"Retry-After": value} if value else {}))
        for value in ("", "0", "7", "900", "-3", "Sat, 28 Nov 2026 12:00:00 GMT")
    ]
    assert asked_s == [1.0, 1.0, 7, 30.0, 1.0, 1.0]


def test_a_server_that_stays_full_is_left_out_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(sampling, "MIN_BACKOFF_S", 0.0)
    monkeypatch.setattr(sampling, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def refuse(url: str, body: dict[str, Any]) -> httpx.Response:
        now[0] += 10.0
        return FULL

    servers = Servers(refuse, rollout_urls=[B], rollout_deadline_s=300.0, rollout_concurrency=1)
    _, report = servers.sample(requests_of(4))
    assert report.outcomes["failed"] == 8 and report.num_quarantined == 1
    assert len(servers.asked) == 32, "the first, those within 300 s, and the one after them"
    assert "The request queue is full" in servers.said[0]


@pytest.mark.parametrize("num_places", [1, 2])
def test_a_server_that_works_for_this_run_is_not_quarantined_as_full(
    monkeypatch: pytest.MonkeyPatch, num_places: int
) -> None:
    """Behaves like a gateway that answers 503 above a number of connections."""
    monkeypatch.setattr(sampling, "MIN_BACKOFF_S", 0.05)
    monkeypatch.setattr(sampling, "ACCEPTED_S", 0.1)
    servers = Servers(
        lambda url, body: FULL if servers.running[url] > num_places else {"hangs": 0.8},
        rollout_urls=[B],
        rollout_watch_s=1.0,
        rollout_deadline_s=2.0,  # shorter than all samples together
    )
    for found in servers.fleet.find():
        servers.fleet.admit(found.url, VERSION)
    servers.control = lambda request: FULL if servers.running[B] >= num_places else httpx.Response(200)  # type: ignore[method-assign]
    with SglangEngine(servers.fleet, httpx.MockTransport(servers.answer)) as engine:
        report = engine.generate(requests_of(3), params(), VERSION).report
    assert report.num_finished == 6 and report.num_turned_away > 0 and servers.said == []


def test_a_sample_that_exceeds_the_servers_time_limit_is_refused() -> None:
    late = httpx.Response(503, json={"error": {"message": "Request running timeout reached."}})
    servers = Servers(lambda url, body: late if body["input_ids"][0] == 10 else answer_of(body))
    _, report = servers.sample(requests_of(5))
    assert report.outcomes["refused"] == 2 and report.num_finished == 8
    assert report.num_quarantined == report.num_turned_away == 0
    assert "Request running timeout reached." in servers.said[0]


def test_a_response_cut_by_a_small_cache_does_not_count_as_too_long() -> None:
    """SGLang lowers max_new_tokens to the size of its KV cache, and then reports ``length``."""

    def generate(url: str, body: dict[str, Any]) -> Any:
        num = 5 if url == B else body["sampling_params"]["max_new_tokens"]
        return answer_of(body, list(range(20, 20 + num)))

    servers = Servers(generate)
    _, report = servers.sample(requests_of(10), params(max_new_tokens=30))
    assert report.num_finished == 20 and set(report.samples_by_server) == {A} and servers.said == []
    servers = Servers(generate, rollout_urls=[B])
    _, report = servers.sample(requests_of(2), params(max_new_tokens=30))
    assert report.outcomes["refused"] == 4
    assert B in servers.said[0] and "5 of 30 tokens" in servers.said[0]
    assert (
        Servers(generate, rollout_urls=[B])
        .sample(requests_of(2), params(max_new_tokens=7))
        .report.num_finished
        == 4
    )


def test_a_gateway_that_answers_503_for_a_dead_server_is_not_treated_as_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "ACCEPTED_S", 0.1)
    servers = Servers(lambda url, body: FULL, rollout_urls=[B], rollout_watch_s=0.2)
    for record in servers.fleet.find():
        servers.fleet.admit(record.url, VERSION)
    servers.control = lambda request: httpx.Response(503)  # type: ignore[method-assign]
    with SglangEngine(servers.fleet, httpx.MockTransport(servers.answer)) as engine:
        report = engine.generate(requests_of(2), params(), VERSION).report
    assert report.outcomes["failed"] == 4 and "answers 503 to everything" in servers.said[0]


def test_a_retry_goes_to_another_server() -> None:
    def generate(url: str, body: dict[str, Any]) -> Any:
        first = [b for _, b in servers.asked if b["input_ids"] == body["input_ids"]]
        return httpx.Response(500) if len(first) == 1 else answer_of(body)

    servers = Servers(generate)
    _, report = servers.sample(requests_of(1, 1))
    assert report.num_finished == 1 and {url for url, _ in servers.asked} == {A, B}


def test_a_sample_waits_for_a_busy_server_instead_of_failing_again_at_a_broken_one() -> None:
    servers = Servers(
        lambda url, body: httpx.Response(500) if url == B else {"hangs": 0.3}, rollout_concurrency=1
    )
    _, report = servers.sample(requests_of(1, 2))
    assert report.num_finished == 2 and report.num_retried == 1


def test_a_hung_server_is_left_out_at_the_deadline_and_its_requests_are_repeated(
    deadlines: Deadlines,
) -> None:
    servers = Servers(
        lambda url, body: {"is_late": deadlines} if url == B else answer_of(body), rollout_deadline_s=300.0
    )
    _, report = servers.sample(requests_of(20))
    assert report.num_finished == 40 and report.num_quarantined == 1
    assert len(servers.said) == 1 and "deadline of 300 s" in servers.said[0]
    assert set(deadlines.limits_s) == {300.0}


def test_a_restarted_server_is_noticed_by_the_watch() -> None:
    servers = Servers(
        lambda url, body: {"hangs": 60} if url == B else answer_of(body),
        rollout_watch_s=0.2,
        rollout_urls=[B],
    )

    def control(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"model_path": "/m", "weight_version": "default"})

    original = servers.control
    servers.fleet.find()
    servers.fleet.admit(B, VERSION)
    servers.control = control  # type: ignore[method-assign]
    with SglangEngine(servers.fleet, httpx.MockTransport(servers.answer)) as engine:
        answers = engine.generate(requests_of(2), params(), VERSION)
    servers.control = original  # type: ignore[method-assign]
    assert answers.report.outcomes["failed"] == 4 and answers.responses == [[None, None]] * 2
    assert "was it restarted?" in servers.said[0]


def test_without_a_server_left_the_remaining_samples_count_as_failed() -> None:
    count = iter(range(10**6))
    servers = Servers(
        lambda url, body: answer_of(body) if next(count) < 10 else httpx.Response(200, text="?")
    )
    responses, report = servers.sample(requests_of(20))
    assert report.outcomes["length"] == 10 and report.outcomes["failed"] == 30
    assert len(finished(responses)) == 10
    assert any("no rollout server is left" in line for line in servers.said)


def test_without_any_server_every_sample_fails() -> None:
    servers = Servers(good)
    with SglangEngine(servers.fleet) as engine:
        responses, report = engine.generate(requests_of(3), params(), VERSION)
    assert responses == [[None, None]] * 3 and report.outcomes["failed"] == 6


def test_a_request_that_two_servers_refuse_is_given_up_and_quoted() -> None:
    def generate(url: str, body: dict[str, Any]) -> Any:
        too_long = body["input_ids"][0] == 10
        return httpx.Response(400, json={"error": {"message": "too long"}}) if too_long else answer_of(body)

    servers = Servers(generate)
    responses, report = servers.sample(requests_of(5))
    assert report.outcomes["refused"] == 2 and report.num_finished == 8 and report.num_quarantined == 0
    assert responses[0] == [None, None] and len(finished(responses[1:])) == 8
    (line,) = servers.said
    assert "2 samples" in line and "too long" in line


def test_a_failed_sample_is_none_and_the_others_keep_their_places() -> None:
    def generate(url: str, body: dict[str, Any]) -> Any:
        seed = body["sampling_params"]["sampling_seed"]
        if seed == 11:
            return httpx.Response(400, json={"error": {"message": "no"}})
        return answer_of(body, [seed, STOP], "stop")

    servers = Servers(generate)
    servers.info["enable_deterministic_inference"] = True
    responses, _ = servers.sample([Request(prompt_ids=[1], seeds=[10, 11, 12, 13])])
    assert [r and r.token_ids[0] for r in responses[0]] == [10, None, 12, 13]


def test_an_aborted_sample_continues_from_its_tokens() -> None:
    def generate(url: str, body: dict[str, Any]) -> Any:
        length = len(body["input_ids"])
        if length < 4:
            return answer_of(body, [length], "abort")
        return answer_of(body)

    servers = Servers(generate)
    responses, report = servers.sample(requests_of(5))
    assert all(r.token_ids == [2, 3, 4, 5] and len(r.logprobs) == 4 for g in responses for r in g)
    assert report.num_resumed == 20 and report.num_retried == 0
    assert {b["sampling_params"]["max_new_tokens"] for _, b in servers.asked} == {4, 3, 2}


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    servers = Servers(lambda url, body: answer_of(body, [2, 3, 4, STOP], "length"))
    responses, _ = servers.sample(requests_of(1))
    assert {r.finish_reason for r in responses[0]} == {"stop"}


@pytest.mark.parametrize(("tokens", "reason"), [([2, 3, 4, 5], "length"), ([2, STOP], "stop")])
def test_an_abort_after_the_last_token_changes_nothing(tokens: list[int], reason: str) -> None:
    servers = Servers(lambda url, body: answer_of(body, tokens, "abort"))
    responses, report = servers.sample(requests_of(2))
    assert {r.finish_reason for g in responses for r in g} == {reason} and report.num_resumed == 0


def test_an_abort_before_the_first_token_may_leave_the_lists_out() -> None:
    aborted = {"meta_info": {"finish_reason": {"type": "abort"}, "prompt_tokens": 0}}
    count = iter(range(10**6))
    servers = Servers(lambda url, body: aborted if next(count) < 6 else answer_of(body))
    _, report = servers.sample(requests_of(5))
    assert report.num_finished == 10 and report.num_resumed == 6


def test_a_sample_that_is_aborted_again_and_again_is_given_up() -> None:
    servers = Servers(lambda url, body: answer_of(body, [], "abort"))
    _, report = servers.sample(requests_of(2))
    assert report.outcomes["failed"] == 4


def test_under_a_repetition_penalty_an_aborted_sample_starts_again() -> None:
    count = iter(range(10**6))
    servers = Servers(lambda url, body: answer_of(body, [7], "abort") if next(count) < 4 else answer_of(body))
    responses, _ = servers.sample(requests_of(5), params(repetition_penalty=1.1))
    assert all(len(b["input_ids"]) == 2 for _, b in servers.asked)
    assert all(r.token_ids == [2, 3, 4, 5] for g in responses for r in g)


@pytest.mark.parametrize("prompt", [[], [VOCABULARY], [-1, 3]])
def test_a_prompt_outside_the_vocabulary_is_never_sent(prompt: list[int]) -> None:
    servers = Servers(good)
    servers.fleet.find()
    with SglangEngine(servers.fleet) as engine, pytest.raises(RolloutError, match="vocabulary of 100"):
        engine.generate([Request(prompt_ids=prompt, seeds=[1])], params(), VERSION)
    assert servers.asked == []


def test_a_thousand_prompts_with_every_fault_at_random() -> None:
    draw = random.Random(3)
    faults: list[Callable[[dict[str, Any]], Any]] = [
        lambda body: httpx.Response(500),
        lambda body: answer_of(body, [], "abort"),
        lambda body: answer_of(body, [len(body["input_ids"])], "abort"),
        lambda body: httpx.Response(400, json={"error": {"message": "no"}}),
    ]
    servers = Servers(
        lambda url, body: draw.choice(faults)(body) if draw.random() < 0.2 else answer_of(body),
        rollout_attempts=4,
    )
    responses, report = servers.sample(requests_of(50, 8) * 5)
    assert report.num_samples == 2000 and report.num_finished > 1500
    assert all(r.token_ids == [2, 3, 4, 5] for r in finished(responses)), "no token lost or taken twice"


def test_sampling_in_the_background_can_be_stopped() -> None:
    servers = Servers(good)
    for record in servers.fleet.find():
        servers.fleet.admit(record.url, VERSION)
    transport = httpx.MockTransport(servers.answer)
    with SglangEngine(servers.fleet, transport) as engine:
        engine.start(requests_of(10), params(), VERSION)
        assert engine.result().report.num_finished == 20
        servers.generate = lambda url, body: {"hangs": 600}
        engine.start(requests_of(10), params(), VERSION)
        while not servers.running[A]:
            pass
    assert servers.running == {A: 0, B: 0}, "leaving the engine ended the requests"
