"""The figures of a refresh, from plain rollouts and samples."""

import math
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from megatron_rasft import metrics
from megatron_rasft.config import RunConfig
from megatron_rasft.training.refresh import as_rollouts
from megatron_rasft.training.refresh_report import RefreshReport
from megatron_rasft.types import RolloutGroup, TrainingSample, Verdict
from megatron_rasft.verify.grading_order import GIVEN_UP
from megatron_rasft.verify.own_function import FAILED
from tests.unit.training.stand_ins import config_of, response


def group(problem_id: str, *verdicts: Verdict) -> RolloutGroup:
    """One rollout per verdict, with 1, 2, 3, ... tokens."""
    responses = [response(*range(n + 1)) for n in range(len(verdicts))]
    rollouts = as_rollouts(problem_id, [1], responses, 0, str)
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        rollout.verdict = verdict
    return RolloutGroup(problem_id=problem_id, rollouts=rollouts)


def sample(kind: Any, weight: float) -> TrainingSample:
    return TrainingSample(problem_id="p", kind=kind, prompt_ids=[1], response_ids=[2], weight=weight)


def test_rollouts_are_counted_by_verdict_and_by_problem() -> None:
    groups = [group("a", "correct", "correct", "wrong"), group("b", "wrong"), group("c", "timeout")]
    groups[0].rollouts[1].filtered_by = "too_short"
    groups[1].rollouts[0] = replace(groups[1].rollouts[0], finish_reason="length")
    groups[2].rollouts[0].verdict_reason = f"{GIVEN_UP}others hang"
    report = RefreshReport()
    report.count_rollouts(groups)
    values = report.values()
    assert values[metrics.NUM_ROLLOUTS] == 5
    assert values[metrics.SOLVE_RATE] == 2 / 5
    assert values[metrics.SOLVED_PROBLEMS] == 1 / 3
    assert values[metrics.SAMPLED_PROBLEMS] == 3
    assert values[metrics.FILTERED] == values[metrics.TRUNCATED] == 1 / 5
    assert values[metrics.UNVERIFIABLE] == 0
    assert values[metrics.GIVEN_UP] == 1 / 5
    assert values[metrics.RESPONSE_TOKENS] == (1 + 2 + 3 + 1 + 1) / 5
    verdicts = [values[f"verify/{verdict}_frac"] for verdict in ("correct", "wrong", "timeout")]
    assert verdicts == [0.4, 0.4, 0.2]


def test_weights_are_averaged_by_kind() -> None:
    report = RefreshReport()
    report.count_samples(
        [[sample("demonstration", 1.0), sample("rollout", 0.2)], [], [sample("demonstration", 0.5)]]
    )
    assert report.values()[metrics.LEFT_OUT] == 1 and "1 left out" in report.line(1.0)
    assert report.values()[metrics.DEMONSTRATION_WEIGHT] == 0.75
    assert report.values()[metrics.ROLLOUT_WEIGHT] == 0.2
    assert math.isnan(report.values()[metrics.WRONG_ROLLOUT_WEIGHT])


def test_weights_below_zero_are_averaged_apart() -> None:
    report = RefreshReport()
    report.count_samples([[sample("rollout", 0.5), sample("rollout", -0.25), sample("rollout", -0.75)]])
    assert report.values()[metrics.ROLLOUT_WEIGHT] == 0.5
    assert report.values()[metrics.WRONG_ROLLOUT_WEIGHT] == -0.5


def test_a_refresh_without_rollouts_has_no_rates() -> None:
    report = RefreshReport(num_problems=4)
    report.count_rollouts([])
    report.count_samples([])
    values = report.values()
    assert report.warnings(config_of()) == []
    unknown = (
        *(metrics.SOLVE_RATE, metrics.SOLVED_PROBLEMS, metrics.DIFFICULTY),
        *(metrics.DEMONSTRATION_WEIGHT, metrics.ROLLOUT_WEIGHT),
    )
    assert all(math.isnan(values[name]) for name in unknown)
    assert values[metrics.RESPONSE_TOKENS] == values[metrics.FILTERED] == 0


def test_guided_rollouts_are_counted_apart() -> None:
    report, both = RefreshReport(), group("a", "correct", "wrong")
    both.guided = group("a", "correct", "correct", "correct", "wrong").rollouts
    report.count_rollouts([both, group("b", "wrong")])
    report.guidance = 0.75
    values = report.values()
    assert (values[metrics.GUIDED_SOLVE_RATE], values[metrics.GUIDANCE]) == (0.75, 0.75)
    assert values[metrics.SOLVE_RATE] == pytest.approx(1 / 3)
    assert "75.0%" in report.line(1.0)


def test_the_servers_figures_are_logged_under_their_own_names() -> None:
    assert RefreshReport(servers={metrics.SYNC_S: 2.5}).values()[metrics.SYNC_S] == 2.5


def test_a_timed_block_inside_another_counts_once_and_a_failed_one_counts_too() -> None:
    report = RefreshReport(verify_s=10.0)
    began = time.monotonic()
    with suppress(ZeroDivisionError), report.timed("verify_s"):
        with report.timed("verify_s"):
            time.sleep(0.01)
        raise ZeroDivisionError
    assert 10.01 <= report.verify_s <= 10.0 + time.monotonic() - began


def test_the_line_names_only_phases_that_ran() -> None:
    report = RefreshReport(num_problems=4, reference_s=0.5)
    assert "score" not in report.line(1.0) and "rollouts" not in report.line(1.0)
    report.score_s = 0.25
    report.count_rollouts([group("a", "correct", "wrong")])
    line = report.line(1.0)
    assert (
        "4 problems" in line
        and "score 0.2 s" in line
        and "2 rollouts of 1" in line
        and "50.0% correct" in line
    )


def test_a_share_above_the_flag_is_warned_about_with_the_flags_that_change_it() -> None:
    cut, dropped, unclear = (group(name, *["unverifiable"] * 4) for name in "abc")
    cut.rollouts[:] = [replace(r, finish_reason="length", verdict="wrong") for r in cut.rollouts]
    for rollout in dropped.rollouts:
        rollout.filtered_by, rollout.verdict = "loop_windows", "wrong"
    for rollout in unclear.rollouts:
        rollout.verdict_reason = "no gold answer"
    report = RefreshReport()
    report.count_rollouts([cut, dropped, unclear])
    warnings = report.warnings(config_of(run=RunConfig(rasft_warn_frac=0.33)))
    assert [line.split()[0] for line in warnings] == ["warning:"] * 3
    expected = ("--rollout-max-new-tokens", "--no-verify-filter-loop-windows", "no gold answer")
    assert all(word in line for word, line in zip(expected, warnings, strict=True))
    assert all("33.3%" in line and "--rasft-warn-frac 0.33" in line for line in warnings)
    assert report.warnings(config_of(run=RunConfig(rasft_warn_frac=0.34))) == []


def test_rewards_and_failures_of_an_own_function_are_counted() -> None:
    groups = [group("a", "correct", "wrong", "unverifiable"), group("b", "wrong")]
    groups[0].rollouts[0].reward, groups[0].rollouts[1].reward = 1.0, 0.25
    groups[0].rollouts[2].verdict_reason = f"{FAILED}raised KeyError"
    report = RefreshReport()
    report.count_rollouts(groups)
    assert report.values()[metrics.REWARD] == 0.625, "a rollout without a reward does not count"
    assert report.values()[metrics.FUNCTION_FAILED] == 1 / 4
    assert "mean reward 0.625" in report.line(1.0)
