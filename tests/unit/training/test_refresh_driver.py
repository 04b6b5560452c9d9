"""The order of a refresh's phases on one rank: with the trainer's own weights, with servers, sampled ahead, interrupted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_rasft.config import (
    CurriculumConfig,
    RasftConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
)
from megatron_rasft.data.sample_arrays import BatchQueue
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.objective.families.likelihood import Sft
from megatron_rasft.objective.families.policy_ratio import Psft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.training.refresh import ProblemChoice, sampling_params
from megatron_rasft.training.refresh_driver import RefreshDriver
from megatron_rasft.training.refresh_report import RefreshReport
from megatron_rasft.types import TrainingSample
from tests.unit.training.stand_ins import (
    BAND,
    STOP_IDS,
    PolicyOfNotes,
    ServersOfNotes,
    config_of,
    refresh_of,
)

RUN = RunConfig(rasft_refresh_interval=2)
"""A run with 2 problems per step and 4 per refresh."""


@dataclass
class Parts:
    """A driver with stand-ins that record its calls. The run has 8 problems and 6 steps."""

    driver: RefreshDriver
    policy: PolicyOfNotes
    servers: ServersOfNotes

    def refresh(self, iteration: int) -> tuple[BatchQueue, RefreshReport]:
        """Runs all phases, in the order of pretrain_rasft.py."""
        driver = self.driver
        driver.start(iteration)
        choice = driver.choose_problems()
        driver.sync_weights(choice)
        groups = driver.sample(choice)
        driver.sample_ahead(choice)
        driver.verify(groups)
        samples = driver.weigh(choice, groups)
        driver.score_reference(samples)
        return driver.finish(samples)


def parts_of(config: RasftConfig, *, has_servers: bool = False, **refresh: Any) -> Parts:
    policy, servers = PolicyOfNotes(), ServersOfNotes()
    driver: Any = RefreshDriver(
        config,
        refresh_of(config, total_steps=6, **refresh),
        policy=policy,
        servers=servers if has_servers else None,  # type: ignore[arg-type]
        sampling=sampling_params(config, STOP_IDS, 64),
    )
    return Parts(driver, policy, servers)


def served(lag: int, **rollout: Any) -> Parts:
    engine = RolloutConfig(
        rollout_engine="sglang",
        rollout_urls=["http://a:1"],
        rollout_lag=lag,
        rollout_num_samples=2,
        **rollout,
    )
    return parts_of(config_of(run=RUN, rollout=engine), has_servers=True)


# ---- with the trainer's own weights


def test_a_refresh_samples_its_problems_and_queues_their_batches() -> None:
    parts = parts_of(config_of(run=RUN, rollout=RolloutConfig(rollout_num_samples=2)))
    queue, report = parts.refresh(0)
    assert parts.policy.calls == ["generate 4", "score 8 policy"]
    assert queue.sizes == [(2, 4, 0), (2, 4, 0)], "a demonstration and a correct rollout of each problem"
    assert (report.num_problems, report.num_sampled, report.num_rollouts) == (4, 4, 8)
    assert (report.solve_rate, report.num_solved) == (0.5, 4)
    assert parts.servers.calls == []


def test_demonstrations_of_weight_0_are_neither_scored_nor_queued() -> None:
    config = config_of(run=RUN, rollout=RolloutConfig(rollout_num_samples=3, rollout_guided_samples=1))
    parts = parts_of(config)
    against_imitation = [100.0, -100.0, 100.0]
    decisions = parts.driver.decisions
    decisions.load_state_dict(decisions.state_dict() | {"guidance": against_imitation})
    queue, report = parts.refresh(0)
    assert report.guidance < 0.5 and report.demonstration_weight == 0.0 and report.num_left_out == 0
    assert parts.policy.calls == ["generate 8", "score 4 policy"]
    assert queue.sizes == [(2, 2, 4), (2, 2, 4)], "rollouts, and the tokens of two demonstrations"
    assert all(queue.batch(place).samples.are_rollouts.all() for place in range(2))  # type: ignore[union-attr]


def test_without_rollouts_only_demonstrations_are_trained() -> None:
    config = config_of(
        run=RUN,
        curriculum=CurriculumConfig(curriculum_mode="off"),
        objective=Sft(),
    )
    parts = parts_of(config, verifier=None)
    queue, report = parts.refresh(0)
    assert parts.policy.calls == []
    assert queue.sizes == [(2, 2, 0), (2, 2, 0)]
    assert (report.num_problems, report.num_rollouts, report.demonstration_weight) == (4, 0, 1.0)


def test_the_first_band_is_calibrated_and_every_refresh_scores_its_problems() -> None:
    parts = parts_of(config_of(run=RUN, curriculum=BAND))
    parts.policy.difficulties = {f"p{i}": i / 10 for i in range(8)}
    first = parts.refresh(0)[1]
    second = parts.refresh(2)[1]
    scores = [call for call in parts.policy.calls if call.endswith("policy")]
    assert scores[:2] == ["score 8 policy", "score 4 policy"], (
        "calibration, and the problems of the first refresh"
    )
    assert scores[-1] == "score 4 policy"
    assert (first.mean_difficulty + second.mean_difficulty) / 2 == pytest.approx(0.35)
    assert first.score_s > 0


@pytest.mark.parametrize(("iteration", "weights"), [(0, "policy"), (2, "reference")])
def test_the_reference_is_scored_with_its_own_weights_once_the_policy_differs(
    iteration: int, weights: str
) -> None:
    parts = parts_of(config_of(run=RUN))
    queue, _ = parts.refresh(iteration)
    assert parts.policy.calls[-1].endswith(weights)
    assert queue.arrays()["ref_logprobs"].tolist() == [-1.0] * len(queue.arrays()["ref_logprobs"])


def test_a_ratio_objective_scores_all_samples_under_the_policy_of_now() -> None:
    parts = parts_of(config_of(run=RUN, objective=Psft()))
    queue, _ = parts.refresh(2)
    assert parts.policy.calls[-1] == "score 4 policy"
    assert queue.arrays()["old_logprobs"].tolist() == [-1.0] * 8


# ---- with servers


def test_servers_get_weights_then_prompts_at_each_refresh() -> None:
    parts = served(lag=0)
    _, report = parts.refresh(0)
    parts.refresh(2)
    kinds = [call.split()[0] for call in parts.servers.calls]
    assert kinds == ["sync", "start", "wait", "result"] * 2
    assert [c for c in parts.servers.calls if c.startswith("sync")] == ["sync 0", "sync 2"]
    assert report.servers["sync/servers"] == 1.0
    assert not any(call.startswith("generate") for call in parts.policy.calls)


def test_servers_on_the_trainers_gpus_sleep_while_it_trains() -> None:
    config = config_of(
        run=RUN,
        rollout=RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"]),
        sync=SyncConfig(sync_method="tensor"),
    )
    parts = parts_of(config, has_servers=True)
    parts.refresh(0)
    assert [call.split()[0] for call in parts.servers.calls] == ["sync", "start", "wait", "result", "sleep"]


def test_with_lag_servers_sample_the_next_problems_while_these_are_trained() -> None:
    parts = served(lag=1)
    ages = []
    for iteration in (0, 2, 4):
        parts.driver.start(iteration)
        choice = parts.driver.choose_problems()
        parts.driver.sync_weights(choice)
        groups = parts.driver.sample(choice)
        parts.driver.sample_ahead(choice)
        parts.driver.verify(groups)
        parts.driver.finish(parts.driver.weigh(choice, groups))
        ages += [{r.policy_age for g in groups.values() for r in g.rollouts}]
        assert list(groups) == choice.sampled_ids
    starts = [call for call in parts.servers.calls if call.startswith(("sync", "start"))]
    assert [s[:5] for s in starts] == ["sync ", "start"] * 3, "the last refresh starts nothing"
    assert [s.split()[-1] for s in starts] == ["0", "0", "0", "0", "2", "2"]
    assert ages == [{0}, {2}, {2}]
    kinds = [call.split()[0] for call in parts.servers.calls]
    assert kinds[:6] == ["sync", "start", "wait", "result", "sync", "start"]
    assert kinds[6:10] == ["wait", "result", "sync", "start"], "collected before the weights change"


def test_two_refreshes_with_lag_choose_other_problems() -> None:
    parts = served(lag=1)
    parts.refresh(0)
    parts.refresh(2)
    first, second = (call for call in parts.servers.calls[:6] if call.startswith("start"))
    assert first.split(" with ")[0] != second.split(" with ")[0]


# ---- interrupted and resumed


def test_an_interrupted_refresh_is_repeated_by_the_resumed_run() -> None:
    parts = parts_of(config_of(run=RUN))
    parts.refresh(0)
    before = json.dumps(parts.driver.decisions.state_dict())
    parts.driver.start(2)
    problem_ids = parts.driver.choose_problems().problem_ids
    parts.policy.is_stopped = True
    groups = parts.driver.sample(ProblemChoice(problem_ids=problem_ids, sampled_ids=problem_ids))
    with pytest.raises(Stopped):
        parts.driver.verify(groups)
    assert json.dumps(parts.driver.decisions.state_dict()) == before
    resumed = parts_of(config_of(run=RUN))
    resumed.driver.decisions.load_state_dict(json.loads(before))
    resumed.driver.start(2)
    assert resumed.driver.choose_problems().problem_ids == problem_ids


def test_a_refresh_does_not_begin_once_the_run_is_to_stop() -> None:
    parts = parts_of(config_of(run=RUN))
    before = parts.driver.decisions.state_dict()
    parts.policy.is_stopped = True
    with pytest.raises(Stopped):
        parts.driver.start(0)
    assert parts.driver.decisions.state_dict() == before


def test_a_resumed_run_samples_again_what_servers_were_sampling() -> None:
    parts = served(lag=1)
    parts.refresh(0)
    ahead = parts.servers.calls[-1].split(" with ")[0]
    resumed = served(lag=1)
    resumed.driver.decisions.load_state_dict(json.loads(json.dumps(parts.driver.decisions.state_dict())))
    resumed.refresh(2)
    assert resumed.servers.calls[:2] == ["sync 2", f"{ahead} with 2"]


def test_a_choice_that_servers_sample_already_is_not_sent_again() -> None:
    parts = served(lag=1)
    parts.driver.start(4)
    parts.driver.sync_weights(ProblemChoice(problem_ids=["p0"], sampled_ids=["p0"], weight_version=2))
    assert parts.servers.calls == []


# ---- self-distillation


class PromptReader(PolicyOfNotes):
    """A policy under which every token has the log-probability -(tokens of the prompt)."""

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> list[list[float]]:
        super().score(samples, with_reference=with_reference)
        for sample in samples:
            assert list(sample.prompt_ids)[:3] == [2, 5, 1], "the teacher's prompt"
        return [[-float(len(s.prompt_ids))] * len(s.response_ids) for s in samples]


def distilled(iteration: int, max_tokens: int = 64, **flags: Any) -> tuple[Parts, BatchQueue, RefreshReport]:
    config = config_of(run=RUN, objective=Sdft(**flags), rollout=RolloutConfig(rollout_num_samples=2))
    sampling = sampling_params(config, STOP_IDS, max_tokens)
    parts = parts_of(config, verifier=None, sampling=sampling)
    parts.policy = PromptReader()
    parts.driver._policy = parts.policy
    return parts, *parts.refresh(iteration)


@pytest.mark.parametrize(
    ("iteration", "teacher", "weights"),
    [(0, "reference", "policy"), (2, "reference", "reference"), (2, "refresh", "policy")],
)
def test_every_rollout_is_scored_after_the_teachers_prompt_without_a_verdict(
    iteration: int, teacher: str, weights: str
) -> None:
    parts, queue, report = distilled(iteration, objective_sdft_teacher=teacher)
    assert parts.policy.calls == ["generate 4", f"score 8 {weights}"]
    assert queue.sizes == [(2, 4, 0), (2, 4, 0)]
    arrays = queue.arrays()
    assert arrays["teacher_logprobs"].tolist() == [-4.0] * len(arrays["teacher_logprobs"])
    assert arrays["prompt_lengths"].tolist() == [2] * 8, "the policy is trained on the plain prompt"
    assert "ref_logprobs" not in arrays and "old_logprobs" not in arrays
    values = report.values()
    assert values["rollout/num_rollouts"] == 8 and values["rollout/too_long_frac"] == 0
    assert not [name for name, value in values.items() if name.startswith("verify/") and value > 0]
    assert not parts.driver.decisions.curriculum.solvability, "an ungraded rollout is no evidence"


def test_rollouts_that_are_too_long_for_the_teacher_are_counted() -> None:
    _, queue, report = distilled(0, max_tokens=6)
    assert queue.sizes == [(2, 0, 0), (2, 0, 0)] and report.num_left_out == 4
    assert report.values()["rollout/too_long_frac"] == 1
    assert "8 too long" in report.line(1.0)
    (warning,) = report.warnings(config_of())
    assert "--seq-length" in warning
