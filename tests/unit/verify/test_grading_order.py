"""Which rollouts are given up does not depend on the workers, and follows from the rules applied one rollout at a time."""

import random
from collections import Counter, defaultdict

import pytest

from megatron_rasft.types import Rollout
from megatron_rasft.verify.grading_order import GradingOrder

HANG, SLOW, FAST = "hang", "slow", "fast"


def run(
    rollouts: list[Rollout],
    *,
    in_a_row: int,
    in_call: int,
    num_workers: int,
    seed: int,
    break_share: float = 0,
) -> list[str]:
    """Plays a call with workers that finish in random order. Returns what happened to each rollout."""
    choice = random.Random(seed)
    outcome: dict[int, str] = {}
    order = GradingOrder(rollouts, in_a_row, in_call)
    for is_last in (False, True):
        order.start_round([r for r in rollouts if id(r) not in outcome], is_last)
        in_flight: list[Rollout] = []
        while order or in_flight:
            turn = order.turn(len(in_flight)) if order else "wait"
            assert turn != "wait" or in_flight, "nobody would ever continue"
            if turn == "grade" and len(in_flight) < num_workers:
                in_flight.append(order.take())
            elif turn in ("give up", "give up all"):
                rollout = order.give_up()
                if is_last:
                    outcome[id(rollout)] = turn
            elif choice.random() < break_share:
                order.put_back(in_flight)
                in_flight = []
            else:
                rollout = in_flight.pop(choice.randrange(len(in_flight)))
                is_late = rollout.text == HANG or (rollout.text == SLOW and not is_last)
                order.settle(rollout, is_late)
                if is_last or not is_late:
                    outcome[id(rollout)] = "timeout" if is_late else "graded"
    return [outcome[id(rollout)] for rollout in rollouts]


def one_at_a_time(rollouts: list[Rollout], in_a_row: int) -> list[str]:
    """The rule of a problem, written out: no rounds, no workers, no queue."""
    outcomes = []
    before: defaultdict[str, list[str]] = defaultdict(list)
    for rollout in rollouts:
        last = before[rollout.problem_id][-in_a_row:]
        if len(last) == in_a_row and "graded" not in last:
            outcome = "give up"
        else:
            outcome = "timeout" if rollout.text == HANG else "graded"
        before[rollout.problem_id].append(outcome)
        outcomes.append(outcome)
    return outcomes


@pytest.mark.parametrize("seed", range(60))
def test_given_up_are_those_that_the_rule_names_whatever_the_workers_do(seed: int) -> None:
    choice = random.Random(seed)
    weights = [choice.random() * 3, choice.random(), choice.random()]
    rollouts = [
        Rollout.of_text(f"problem {choice.randrange(5)}", choice.choices([HANG, SLOW, FAST], weights)[0])
        for _ in range(choice.randrange(1, 60))
    ]
    in_a_row = choice.randrange(1, 5)
    wanted = one_at_a_time(rollouts, in_a_row)
    for num_workers in (1, 3, 20):
        for break_share in (0, 0.1):
            happened = run(
                rollouts,
                in_a_row=in_a_row,
                in_call=10**9,
                num_workers=num_workers,
                seed=seed,
                break_share=break_share,
            )
            assert happened == wanted


@pytest.mark.parametrize("seed", range(60))
def test_timeouts_of_a_call_are_bounded_and_the_same_ones_with_any_workers(seed: int) -> None:
    choice = random.Random(seed)
    rollouts = [
        Rollout.of_text(f"problem {choice.randrange(40)}", choice.choice([HANG, HANG, SLOW, FAST]))
        for _ in range(80)
    ]
    first, *others = (
        run(rollouts, in_a_row=3, in_call=7, num_workers=n, seed=seed, break_share=share)
        for n in (1, 4, 50)
        for share in (0, 0.1)
    )
    assert all(other == first for other in others)
    assert Counter(first)["timeout"] <= 7


def test_fast_rollouts_are_graded_however_many_others_hang() -> None:
    rollouts = [Rollout.of_text(str(n), FAST if n % 10 == 0 else HANG) for n in range(1000)]
    happened = run(rollouts, in_a_row=4, in_call=8, num_workers=3, seed=0)
    assert Counter(happened) == {"graded": 100, "timeout": 8, "give up all": 892}


def test_problem_that_hangs_costs_a_few_deadlines_and_no_other_problem() -> None:
    rollouts = [
        Rollout.of_text("hangs" if n % 2 else f"fine {n % 6}", HANG if n % 2 else SLOW) for n in range(400)
    ]
    happened = run(rollouts, in_a_row=4, in_call=64, num_workers=2, seed=0)
    assert Counter(happened) == {"graded": 200, "timeout": 4, "give up": 196}


def test_one_rollout_in_time_keeps_its_problem_graded() -> None:
    texts = [HANG, HANG, HANG, SLOW] * 5
    rollouts = [Rollout.of_text("p", text) for text in texts]
    happened = run(rollouts, in_a_row=4, in_call=64, num_workers=2, seed=0)
    assert happened == ["timeout", "timeout", "timeout", "graded"] * 5
