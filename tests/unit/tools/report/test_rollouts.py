"""Statistics of rollouts against a plain count of their lines, and the choice of examples."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.tools.report.rollouts import (
    course_of,
    moves,
    parse,
    pick_examples,
    read_statistics,
    rounded_length,
)
from megatron_rasft.tools.report.texts import reason_of
from megatron_rasft.types import Rollout
from tests.unit.tools.report.synthetic import write_run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return (
        write_run(tmp_path / "run", num_problems=30, num_steps=24, max_tokens=400, lag=2) / "rollouts.jsonl"
    )


def rollouts_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_rollout(problem_id: str, index: int = 0, step: int = 0, **values: Any) -> Rollout:
    kept: dict[str, Any] = {
        "verdict": "wrong",
        "finish_reason": "stop",
        "text": "x",
        "response_ids": [1, 2],
    } | values
    return Rollout(
        problem_id=problem_id,
        sample_index=index,
        weight_version=step,
        prompt_ids=[],
        response_logprobs=[-1.0] * len(kept["response_ids"]),
        **kept,
    )


def test_counts_are_those_of_the_lines(store: Path) -> None:
    rollouts = rollouts_of(store)
    statistics = read_statistics(store)
    assert statistics.num_rollouts == len(rollouts)
    assert list(statistics.refreshes) == sorted({r["weight_version"] + r["policy_age"] for r in rollouts})
    assert statistics.total("outcomes") == Counter((r["verdict"], r["finish_reason"]) for r in rollouts)
    assert statistics.total("reasons") == Counter((r["verdict"], r["verdict_reason"]) for r in rollouts)
    assert statistics.total("ages") == Counter(r["policy_age"] for r in rollouts)
    lengths = Counter(rounded_length(len(r["response_ids"])) for r in rollouts)
    counted: Counter[int] = Counter()
    for (_, length), count in statistics.total("lengths").items():
        counted[length] += count
    assert counted == lengths
    for step, refresh in statistics.refreshes.items():
        of_step = [r for r in rollouts if r["weight_version"] + r["policy_age"] == step]
        assert refresh.num_tokens == sum(len(r["response_ids"]) for r in of_step)
        assert refresh.num_trained == sum(r["weight"] != 0 for r in of_step)
        for problem_id, visit in refresh.visits.items():
            judged = [r for r in of_step if r["problem_id"] == problem_id and r["verdict"] != "timeout"]
            assert visit.num_samples == 4 and visit.num_attempts == len(judged)
            assert visit.num_solved == sum(r["verdict"] == "correct" for r in judged)


def test_guided_rollouts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    own, guided = make_rollout("a"), make_rollout("a", 1, verdict="correct", num_guide_tokens=1)
    RolloutStore(path).append([own, guided, make_rollout("b", verdict="correct")])
    statistics = read_statistics(path)
    assert statistics.num_rollouts == 2
    assert {i: history[0][1].num_solved for i, history in statistics.histories().items()} == {"a": 0, "b": 1}
    assert statistics.num_repeated == statistics.num_unreadable == 0


def test_lengths_are_rounded_by_three_percent_at_most() -> None:
    assert [rounded_length(n) for n in range(64)] == list(range(64))
    assert all(0 <= n - rounded_length(n) < n / 32 for n in range(1, 70_000))
    assert len({rounded_length(n) for n in range(2**20)}) < 600


def test_courses_and_moves_of_problems(tmp_path: Path) -> None:
    outcomes = {
        "never": "0.0",
        "lost": "1.0",
        "newly": "0.2",
        "both": "1.2",
        "once": "1",
        "all": "2.2",
        "less": "2.1",
    }
    path = tmp_path / "rollouts.jsonl"
    for step in range(2):
        lines = []
        for problem_id, solved in outcomes.items():
            by_step = solved.split(".")
            if step < len(by_step):
                lines += [
                    make_rollout(
                        problem_id, i, step, verdict="correct" if i < int(by_step[step]) else "wrong"
                    )
                    for i in range(2)
                ]
        RolloutStore(path).append(lines)
    histories = read_statistics(path).histories()
    assert {problem_id: course_of(history) for problem_id, history in histories.items()} == {
        "never": "never solved",
        "lost": "lost",
        "newly": "newly solved",
        "both": "sometimes solved",
        "once": "sometimes solved",
        "all": "always solved",
        "less": "sometimes solved",
    }
    assert moves(histories.values()) == {
        ("unsolved", "unsolved"): 1,
        ("sometimes", "unsolved"): 1,
        ("unsolved", "always"): 1,
        ("sometimes", "always"): 1,
        ("always", "always"): 1,
        ("always", "sometimes"): 1,
    }


def test_correct_but_cut_or_aborted_samples_solve_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    rollouts = [
        make_rollout("cut", verdict="correct", finish_reason="length"),
        make_rollout("aborted", verdict="correct", finish_reason="abort"),
        make_rollout("empty", response_ids=[]),
        make_rollout("ungraded", verdict=None),  # of sdft
    ]
    RolloutStore(path).append(rollouts)
    statistics = read_statistics(path)
    assert statistics.refreshes[0].visits["cut"].solve_rate == 0
    assert list(statistics.histories()) == ["cut"]


@pytest.mark.parametrize("again_from", [0, 9, 21])
def test_repeated_refresh_counts_once_as_done_last(store: Path, again_from: int) -> None:
    lines = store.read_text().splitlines(keepends=True)
    expected = read_statistics(store)
    again = [
        line
        for line, r in zip(lines, rollouts_of(store))
        if r["weight_version"] + r["policy_age"] >= again_from
    ]
    wrong = [line.replace('"verdict": "correct"', '"verdict": "wrong"') for line in again]
    # The first attempt stopped half-way through its last refresh.
    cut = wrong[: len(wrong) - 7]
    before = lines[: len(lines) - len(again)]
    store.write_text("".join([*before, *cut, *again, lines[0][:100]]))
    statistics = read_statistics(store)
    assert statistics.num_repeated == len(cut) and statistics.num_unreadable == 1
    assert statistics.total("outcomes") == expected.total("outcomes")
    for step, refresh in statistics.refreshes.items():
        solved = {i: (v.num_solved, v.num_attempts) for i, v in refresh.visits.items()}
        assert solved == {
            i: (v.num_solved, v.num_attempts) for i, v in expected.refreshes[step].visits.items()
        }


def test_line_is_parsed_as_json_parses_it(tmp_path: Path) -> None:
    evil = 'x", "response_ids": [1, 2, 3], "response_logprobs": ["'
    rollouts = [
        make_rollout(evil, text=evil, verdict_reason=evil),
        make_rollout("none", response_ids=[]),
        make_rollout("many", response_ids=list(range(1000))),
    ]
    RolloutStore(tmp_path / "rollouts.jsonl").append(rollouts)
    for line in (tmp_path / "rollouts.jsonl").read_bytes().splitlines(keepends=True):
        whole = json.loads(line)
        record, num_tokens = parse(line)
        assert num_tokens == len(whole["response_ids"])
        assert record == whole | {"prompt_ids": [], "response_ids": [], "response_logprobs": []}
        compact = json.dumps(whole, separators=(",", ":")).encode()  # as another program may write it
        assert parse(compact) == (whole, num_tokens)


def test_memory_does_not_grow_with_the_responses(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    texts = "long " * 4000
    for step in range(20):
        group = [make_rollout("p", i, step, text=texts, response_ids=list(range(4000))) for i in range(10)]
        RolloutStore(path).append(group)
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    try:
        statistics = read_statistics(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert statistics.num_rollouts == 200
    assert peak < 1e6


def test_examples_do_not_depend_on_the_order_and_show_each_verdict(store: Path) -> None:
    statistics = read_statistics(store)
    histories = statistics.histories()
    examples = pick_examples(store, histories, num_each=2, num_samples=2)
    other_way = dict(reversed(histories.items()))
    assert [e.problem_id for e in pick_examples(store, other_way, 2, 2)] == [e.problem_id for e in examples]
    by_course = Counter(example.course for example in examples)
    assert by_course == {c: min(2, n) for c, n in Counter(map(course_of, histories.values())).items()}
    for example in examples:
        assert example.course == course_of(histories[example.problem_id])
        first, last = example.history[0][0], example.history[-1][0]
        stored = [
            r
            for r in rollouts_of(store)
            if r["problem_id"] == example.problem_id
            and r["weight_version"] + r["policy_age"] in (first, last)
        ]
        assert len(example.samples) == 4
        for step in (first, last):
            shown = [s for s in example.samples if s.step == step]
            of_step = [r for r in stored if r["weight_version"] + r["policy_age"] == step]
            assert len({s.verdict for s in shown}) == min(2, len({r["verdict"] for r in of_step}))
            for sample in shown:
                (rollout,) = (r for r in of_step if r["sample_index"] == sample.index)
                assert (sample.text, sample.weight, sample.num_tokens) == (
                    rollout["text"],
                    rollout["weight"],
                    len(rollout["response_ids"]),
                )
    assert pick_examples(store, histories, num_each=0) == []


def test_rewards_of_an_own_function_make_the_solve_rate_and_are_shown(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    values = [
        ("correct", 1.0, "exact"),
        ("wrong", 0.25, "reward 0.25"),
        ("wrong", 0.0, "none"),
        ("timeout", None, "late"),
    ]
    store.append(
        make_rollout("a", index, verdict=verdict, reward=reward, verdict_reason=reason)
        for index, (verdict, reward, reason) in enumerate(values)
    )
    histories = read_statistics(store.path).histories()
    ((_, visit),) = histories["a"]
    assert (visit.num_attempts, visit.num_solved, visit.solve_rate) == (3, 1, 1.25 / 3)
    (example,) = pick_examples(store.path, histories, 1)
    reasons = [s.reason for s in example.samples]
    assert reasons == ["reward 1: exact", "reward 0.25", "reward 0: none", "late"]
    assert reason_of({"verdict_reason": "", "reward": 1.0}) == "reward 1"
