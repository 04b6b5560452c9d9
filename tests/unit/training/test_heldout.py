"""The held-out measurement: the requested samples, and the counts."""

from typing import Any

import pytest

from megatron_rasft import metrics
from megatron_rasft.config import HeldoutConfig, RolloutConfig
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.training.heldout import Heldout, heldout_values
from megatron_rasft.training.refresh import as_rollouts
from megatron_rasft.types import Request, Response, SamplingParams
from tests.unit.training.stand_ins import (
    STOP_IDS,
    FirstTokenVerifier,
    PolicyOfNotes,
    config_of,
    decode,
    demonstrations,
    response,
)


class HeldoutProblems:
    """Three problems with the interface of ``Problems``."""

    demonstrations = demonstrations(3)
    num = 3

    def decode(self, ids: list[int]) -> str:
        return decode(ids)


class Recorder(PolicyOfNotes):
    """A policy that records the requests for samples."""

    def generate(self, requests: Any, params: SamplingParams) -> list[list[Response]]:
        self.requests: list[Request] = list(requests)
        self.params = params
        return super().generate(requests, params)


def heldout_of(policy: PolicyOfNotes, num_samples: int = 4) -> Heldout:
    config = config_of(
        heldout=HeldoutConfig(
            heldout_data=["a.jsonl"], heldout_num_samples=num_samples, heldout_temperature=0.5
        ),
        rollout=RolloutConfig(rollout_max_new_tokens=7, rollout_top_p=0.9),
    )
    problems: Any = HeldoutProblems()
    return Heldout(config, problems, policy, STOP_IDS, FirstTokenVerifier())


def test_half_of_the_responses_are_correct() -> None:
    heldout = heldout_of(PolicyOfNotes())
    values = heldout.measure(0)
    assert values == {metrics.HELDOUT_SOLVE_RATE: 0.5, metrics.HELDOUT_TRUNCATED: 0.0}
    line = heldout.line(4, values, 1.0)
    assert "50.0%" in line and "3 problems" in line and "step 4" in line


def test_every_measurement_draws_from_the_same_seeds() -> None:
    policy = Recorder()
    heldout = heldout_of(policy)
    heldout.measure(0)
    seeds = [request.seeds for request in policy.requests]
    assert len({seed for row in seeds for seed in row}) == 3 * 4
    heldout.measure(8)
    assert [request.seeds for request in policy.requests] == seeds


def test_sampling_has_its_own_flags() -> None:
    policy = Recorder()
    heldout_of(policy, num_samples=2).measure(0)
    params = policy.params
    assert (params.num_samples, params.temperature, params.top_p, params.max_new_tokens) == (2, 0.5, 1.0, 7)


def test_truncated_responses_are_counted() -> None:
    cut = Response(token_ids=[5], logprobs=[-1.0], finish_reason="length")
    rollouts = as_rollouts("p", [1], [response(5, 9), cut, response(6, 9), response(7, 9)], 0, decode)
    rollouts[0].verdict = "correct"
    assert heldout_values(rollouts) == {metrics.HELDOUT_SOLVE_RATE: 0.25, metrics.HELDOUT_TRUNCATED: 0.25}


def test_a_measurement_ends_when_the_run_is_to_stop() -> None:
    policy = PolicyOfNotes(is_stopped=True)
    with pytest.raises(Stopped):
        heldout_of(policy).measure(0)


def test_rewards_of_an_own_function_are_averaged() -> None:
    rollouts = as_rollouts("p", [1], [response(5, 9), response(6, 9), response(7, 9)], 0, decode)
    rollouts[0].verdict, rollouts[0].reward, rollouts[1].reward = "correct", 1.0, 0.5
    values = heldout_values(rollouts)
    assert values[metrics.HELDOUT_REWARD] == 0.75
    assert values[metrics.HELDOUT_SOLVE_RATE] == 1 / 3
