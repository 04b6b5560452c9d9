"""Rollouts from real SGLang servers, healthy and faulty: frozen, paused, aborted at random, or with corrupted answers."""

import math
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_rasft.rollout.sampling import _Sampling
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecord
from megatron_rasft.types import Request
from tests.servers.faulty_proxy import FAULTS, FaultyProxy
from tests.servers.rollouts import (
    EOS,
    VERSION,
    Rollouts,
    check_accounting,
    in_mid_rollout,
    params,
    requests_of,
)
from tests.servers.running import NEWEST, OLDEST, VERSIONS, ServerPool


@pytest.mark.parametrize("version", VERSIONS)
def test_logprobs_are_those_of_transformers_under_the_temperature(
    server_pool: ServerPool, served_model: Path, version: str
) -> None:
    server = server_pool.get(version, served_model)
    temperature = 0.7
    requests = requests_of(4)
    with Rollouts(server.url) as rollouts:
        answers = rollouts.generate(requests, params(temperature=temperature, top_p=0.9))
    model = transformers.LlamaForCausalLM.from_pretrained(served_model).double().eval()
    for request, group in zip(requests, answers.responses, strict=True):
        assert len(group) == 2
        for response in group:
            ids = torch.tensor([request.prompt_ids + response.token_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
            wanted = torch.log_softmax(logits / temperature, -1)
            wanted = wanted.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            # The server computes in the folder's fp32, but attention and sampling round differently.
            assert torch.allclose(wanted, torch.tensor(response.logprobs, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_samples_and_stop_ids(server_pool: ServerPool, served_model: Path, version: str) -> None:
    server = server_pool.get(version, served_model)
    (request,) = requests_of(1)
    with Rollouts(server.url) as rollouts:
        (first, second), = rollouts.generate([request], params(temperature=0.0)).responses  # fmt: skip
        assert first.token_ids == second.token_ids
        stop = first.token_ids[3]
        cut = rollouts.engine.generate(
            [request], params(temperature=0.0, stop_ids=frozenset({stop, EOS})), VERSION
        )
        where = first.token_ids.index(stop)
        assert [r.token_ids for r in cut.responses[0]] == [first.token_ids[: where + 1]] * 2
        assert {r.finish_reason for r in cut.responses[0]} == {"stop"}


@pytest.mark.parametrize("version", VERSIONS)
def test_samples_of_one_prompt_differ_and_follow_the_policy(
    server_pool: ServerPool, served_model: Path, version: str
) -> None:
    """Compares the first tokens of many samples with the probabilities that the server reports for them."""
    server = server_pool.get(version, served_model)
    num = 400
    request = Request(prompt_ids=[3, 4, 5], seeds=list(range(num)))
    with Rollouts(server.url) as rollouts:
        (group,), _ = rollouts.generate([request], params(max_new_tokens=1))
    assert len(group) == num
    by_token = {r.token_ids[0]: math.exp(r.logprobs[0]) for r in group}
    counts = {t: sum(r.token_ids[0] == t for r in group) for t in by_token}
    chi_squared = sum((counts[t] - num * p) ** 2 / (num * p) for t, p in by_token.items())
    assert len(by_token) > 20 and chi_squared < 70, "26 tokens: above 70 once in 300,000 runs"


@contextmanager
def faulty_pair(pool: ServerPool, model: Path, **flags: Any) -> Iterator[tuple[Rollouts, FaultyProxy]]:
    """Yields the engine on a healthy server and a proxy of another, and that proxy."""
    good, bad = pool.pair(OLDEST, NEWEST, model)
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultyProxy(bad.url))
        yield stack.enter_context(Rollouts(good.url, proxy.url, **flags)), proxy


def watch_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches the watch of other servers off: on a busy machine a healthy one may be late as well."""
    watch_one = _Sampling._watch_one

    async def watch(self: _Sampling, client: Any, server: ServerRecord) -> str:
        return await watch_one(self, client, server) if server.url == url else ""

    monkeypatch.setattr(_Sampling, "_watch_one", watch)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupted_answer_costs_no_sample_and_quarantines_the_server(
    server_pool: ServerPool, served_model: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_pair(server_pool, served_model, rollout_watch_s=8.0) as (rollouts, proxy):
        watch_only(proxy.url, monkeypatch)
        proxy.fault = fault
        answers = rollouts.generate(requests_of(10))
        assert answers.report.num_finished == 20 and set(answers.report.samples_by_server) != {proxy.url}
        assert proxy.num_faults > 0 and proxy.url not in answers.report.samples_by_server
        assert len(rollouts.said) == 1 and proxy.url in rollouts.said[0] and "left out" in rollouts.said[0]

        proxy.fault = None
        rollouts.fleet.config.rollout_watch_s = 600.0
        assert [r.url for r in rollouts.fleet.find()][1] == proxy.url
        assert len(rollouts.fleet.serving(VERSION)) == 1
        again = rollouts.generate(requests_of(10)).report
        assert proxy.url not in again.samples_by_server, "it is not sampled before a full sync"
        rollouts.fleet.admit(proxy.url, VERSION)
        again = rollouts.generate(requests_of(10)).report
        assert again.num_finished == 20 and proxy.url in again.samples_by_server


def test_a_server_that_freezes_while_sampling_is_quarantined(
    server_pool: ServerPool, served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = server_pool.pair(OLDEST, NEWEST, served_model)
    watch_only(first.url, monkeypatch)
    with Rollouts(first.url, second.url, rollout_watch_s=10.0) as rollouts:
        in_mid_rollout(rollouts, (first.url, second.url), requests_of(80))
        first.freeze()
        try:
            _, report = rollouts.engine.result()
        finally:
            first.thaw()
        assert report.num_finished == 160 and report.num_quarantined == 1
        assert len(rollouts.said) == 1 and first.url in rollouts.said[0] and "10 s" in rollouts.said[0]


def test_a_prompt_too_long_for_the_server_is_refused_and_quoted(
    server_pool: ServerPool, served_model: Path
) -> None:
    server = server_pool.get(NEWEST, served_model)
    requests = [Request(prompt_ids=[1] * 200, seeds=[1, 2]), *requests_of(3)]
    with Rollouts(server.url) as rollouts:
        responses, report = rollouts.generate(requests)
    assert report.outcomes["refused"] == 2 and responses[0] == [None, None]
    assert not any(None in group for group in responses[1:])
    assert "2 samples" in rollouts.said[0] and "128 tokens" in rollouts.said[0]


def test_samples_of_a_paused_server_continue_where_they_were(
    server_pool: ServerPool, served_model: Path
) -> None:
    server = server_pool.get(NEWEST, served_model)
    with Rollouts(server.url) as rollouts, ServerClient(server.url) as control:
        in_mid_rollout(rollouts, (server.url, server.url), requests_of(40))
        control.pause("abort")
        control.flush_cache()
        control.resume()
        _, report = rollouts.engine.result()
    assert report.num_finished == 80 and report.num_resumed > 0 and rollouts.said == []


def test_samples_are_returned_once_despite_random_aborts(server_pool: ServerPool, served_model: Path) -> None:
    """All of 800 samples are returned exactly once, and aborted ones continue from their tokens."""
    first, second = server_pool.pair(OLDEST, NEWEST, served_model)
    requests = requests_of(100, 8)
    stop = threading.Event()

    def abort_at_random(rollouts: Rollouts) -> None:
        """Aborts about thirty times, so that the number of aborts does not depend on the machine's speed."""
        draw, due = random.Random(2), 0
        with ServerClient(first.url) as a, ServerClient(second.url) as b:
            while not stop.wait(0.02):
                num = sum(record.num_samples for record in rollouts.fleet.records)
                if num >= due:
                    draw.choice((a, b)).abort_all()
                    due = num + draw.randrange(10, 40)

    with Rollouts(first.url, second.url) as rollouts:
        aborting = threading.Thread(target=abort_at_random, args=(rollouts,))
        aborting.start()
        try:
            answers = rollouts.generate(requests, params(num_samples=8, max_new_tokens=4))
        finally:
            stop.set()
            aborting.join()
    assert answers.report.num_finished == 8 * 100
    assert answers.report.num_resumed > 0 and set(answers.report.samples_by_server) == {first.url, second.url}
    assert rollouts.said == []
    print(answers.report.describe())


def test_two_runs_that_share_a_full_server_get_every_sample(
    server_pool: ServerPool, served_model: Path
) -> None:
    server = server_pool.get(
        NEWEST, served_model, "--max-running-requests", "4", "--max-queued-requests", "1"
    )
    requests = requests_of(20)
    with Rollouts(server.url) as one, Rollouts(server.url) as other:
        one.engine.start(requests, params(max_new_tokens=40), VERSION)
        answers = [other.generate(requests, params(max_new_tokens=40)), one.engine.result()]
    for found in answers:
        check_accounting(requests, found)
        assert found.report.num_finished == 40 and found.report.num_quarantined == 0
    assert sum(found.report.num_turned_away for found in answers) > 0
    assert one.said == other.said == []
