"""Servers that die while they sample. These tests run last of the server tests, because later ones would restart the servers."""

from pathlib import Path

from tests.servers.rollouts import VERSION, Rollouts, in_mid_rollout, params, requests_of
from tests.servers.running import NEWEST, OLDEST, ServerPool

NUM_PROBLEMS = 240
"""So many that a server cannot answer all of them between the check that it samples and its end, a few seconds later."""


def test_a_server_that_is_killed_while_sampling_and_restarted_has_old_weights(
    server_pool: ServerPool, served_model: Path
) -> None:
    first, second = server_pool.pair(OLDEST, NEWEST, served_model)
    requests = requests_of(NUM_PROBLEMS)
    with Rollouts(first.url, second.url) as rollouts:
        in_mid_rollout(rollouts, (first.url, second.url), requests)
        second.kill()
        _, report = rollouts.engine.result()
        assert sum(report.outcomes.values()) == report.num_finished == 2 * NUM_PROBLEMS
        assert report.num_retried > 0 and report.num_quarantined == 1
        assert len(rollouts.said) == 1 and second.url in rollouts.said[0]

        second.start()
        second.wait_until_ready()
        assert [r.url for r in rollouts.fleet.find()] == [first.url, second.url]
        assert [r.url for r in rollouts.fleet.serving(VERSION)] == [first.url]
        rollouts.said.clear()
        # The restarted server has its initial weights. Sampling notices it even if the trainer admits the server.
        rollouts.fleet.admit(second.url, VERSION)
        _, report = rollouts.engine.generate(requests_of(10), params(), VERSION)
        assert report.num_finished == 20 and set(report.samples_by_server) == {first.url}
        assert "is back" in rollouts.said[0] and "was it restarted?" in rollouts.said[1]


def test_a_run_whose_servers_die_gets_the_finished_samples(
    server_pool: ServerPool, served_model: Path
) -> None:
    first, second = server_pool.pair(OLDEST, NEWEST, served_model)
    flags = {"rollout_wait_s": 0.0, "rollout_without_servers": "demonstrations"}
    with Rollouts(first.url, second.url, **flags) as rollouts:
        in_mid_rollout(rollouts, (first.url, second.url), requests_of(NUM_PROBLEMS))
        first.kill()
        second.kill()
        responses, report = rollouts.engine.result()
        assert 0 < report.num_finished < 2 * NUM_PROBLEMS == sum(report.outcomes.values())
        assert sum(r is not None for group in responses for r in group) == report.num_finished
        assert "no rollout server is left" in rollouts.said[-1]
        assert rollouts.fleet.find() == []
        assert "training on demonstrations alone" in rollouts.said[-1]
