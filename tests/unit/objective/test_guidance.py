"""``Guidance`` against the mean and the normal distribution of the standard library."""

import itertools
import math
from statistics import NormalDist

import pytest

from megatron_rasft.objective.guidance import Guidance, gain
from megatron_rasft.types import Rollout, RolloutGroup


def group(own: str, guided: str) -> RolloutGroup:
    """A problem whose rollouts are correct (+) or wrong (-)."""
    return RolloutGroup(problem_id="p", rollouts=_rollouts(own), guided=_rollouts(guided))


def _rollouts(signs: str) -> list[Rollout]:
    rollouts = []
    for sign in signs:
        rollout = Rollout.of_text("p", "text")
        rollout.response_ids, rollout.verdict = [1], "correct" if sign == "+" else "wrong"
        rollouts.append(rollout)
    return rollouts


@pytest.mark.parametrize("solved_share", [0, 0.25, 1])
@pytest.mark.parametrize("num", [2, 3, 5])
def test_the_gain_has_no_bias(num: int, solved_share: float) -> None:
    solve_rate, guided_rate = 0.3, 0.6
    expected = 0.0
    for outcomes in itertools.product("+-", repeat=num + 1):
        *own, continued = outcomes
        chance = guided_rate if continued == "+" else 1 - guided_rate
        for outcome in own:
            chance *= solve_rate if outcome == "+" else 1 - solve_rate
        value = gain(group("".join(own), continued), solved_share)
        assert value is not None
        expected += chance * value
    weight = 1 - solve_rate + solved_share * solve_rate
    assert expected == pytest.approx(weight * (guided_rate - solve_rate))


@pytest.mark.parametrize(("own", "continued"), [("+-", ""), ("-", "+"), ("", "+")])
def test_a_problem_with_too_few_attempts_shows_nothing(own: str, continued: str) -> None:
    guidance = Guidance()
    guidance.add([group(own, continued)], memory=0.5, solved_share=0)
    assert gain(group(own, continued), 0) is guidance.confidence is None


def test_confidence_is_that_of_the_mean_gain() -> None:
    guidance = Guidance()
    guidance.add(
        [group("--", "++"), group("+-", "--"), group("+++-", "+"), group("--", "--")],
        memory=0.5,
        solved_share=0,
    )
    gains = [1.0, -0.5, 0.0, 0.0]
    mean = sum(gains) / 4
    variance = sum((value - mean) ** 2 for value in gains) / 4 + 2 / 4
    assert guidance.confidence == pytest.approx(NormalDist().cdf(mean / math.sqrt(variance / 4)))


def test_few_problems_do_not_make_it_certain() -> None:
    guidance = Guidance()
    guidance.add([group("--", "++")], memory=0.5, solved_share=0)
    assert guidance.confidence is not None
    assert 0.5 < guidance.confidence < 0.9
    guidance.add([group("--", "++")] * 100, memory=0.5, solved_share=0)
    assert guidance.confidence > 0.999


@pytest.mark.parametrize(("solved_share", "counts"), [(0, False), (0.25, True)])
def test_what_the_policy_always_solves_counts_by_its_share(solved_share: float, counts: bool) -> None:
    guidance = Guidance()
    guidance.add([group("++", "--")] * 100, memory=0.5, solved_share=solved_share)
    assert guidance.confidence is not None
    assert guidance.confidence < 0.001 if counts else guidance.confidence == 0.5


def test_earlier_refreshes_count_less() -> None:
    guidance, fresh = Guidance(), Guidance()
    guidance.add([group("--", "++")] * 8, memory=0.5, solved_share=0)
    for part in (guidance, fresh):
        part.add([group("+-", "--")] * 16, memory=0.5, solved_share=0)
    assert guidance.confidence is not None
    assert fresh.confidence is not None
    assert fresh.confidence < guidance.confidence < 0.5
    assert Guidance(*guidance.state_dict()) == guidance
