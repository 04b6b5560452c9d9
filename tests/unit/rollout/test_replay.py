"""Stored rollouts are returned in turn, and only for the prompts that they answer."""

from pathlib import Path

import pytest

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.types import Rollout


def rollout(problem_id: str, token: int, prompt_ids: list[int]) -> Rollout:
    return Rollout(
        problem_id=problem_id,
        sample_index=7,
        weight_version=3,
        prompt_ids=prompt_ids,
        response_ids=[token],
        response_logprobs=[-1.0],
        finish_reason="stop",
        text="",
    )


def store_of(path: Path, *rollouts: Rollout) -> Path:
    RolloutStore(path).append(rollouts)
    return path


def tokens(rollouts: list[Rollout]) -> list[int]:
    return [r.response_ids[0] for r in rollouts]


def test_each_visit_gets_the_next_rollouts_and_starts_over_at_the_end(tmp_path: Path) -> None:
    path = store_of(tmp_path / "a.jsonl", *(rollout("a", token, [1]) for token in range(5)))
    engine = ReplayEngine([path], {"a": [1]})
    assert [tokens(engine.take("a", 2, visit)) for visit in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_rollouts_are_numbered_within_their_group_and_keep_their_weight_version(tmp_path: Path) -> None:
    path = store_of(tmp_path / "a.jsonl", *(rollout("a", token, [1]) for token in range(3)))
    taken = ReplayEngine([path], {"a": [1]}).take("a", 2, 1)
    assert [(r.sample_index, r.weight_version) for r in taken] == [(0, 3), (1, 3)]


def test_no_rollout_is_handed_out_twice_in_one_visit(tmp_path: Path) -> None:
    path = store_of(tmp_path / "a.jsonl", rollout("a", 0, [1]), rollout("a", 1, [1]))
    assert tokens(ReplayEngine([path], {"a": [1]}).take("a", 4, 0)) == [0, 1]


def test_stores_are_read_in_the_order_of_the_flag(tmp_path: Path) -> None:
    paths = [store_of(tmp_path / f"{i}.jsonl", rollout("a", i, [1])) for i in (1, 0)]
    assert tokens(ReplayEngine(paths, {"a": [1]}).take("a", 2, 0)) == [1, 0]


def test_rollouts_of_other_problems_and_other_prompts_are_left_out(tmp_path: Path) -> None:
    rows = rollout("a", 0, [1]), rollout("a", 1, [2]), rollout("b", 2, [1]), rollout("c", 3, [1])
    engine = ReplayEngine([store_of(tmp_path / "a.jsonl", *rows)], {"a": [1], "b": [1]})
    assert engine.num_problems == 2
    assert tokens(engine.take("a", 4, 0)) == [0]
    assert engine.take("b", 4, 3)[0].problem_id == "b"
    assert engine.take("c", 4, 0) == []


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (None, ()),
        (rollout("b", 0, [1]), ("'b'", "'a'", "--data-id-field")),
        (rollout("a", 0, [2]), ("'a'", "--data-prompt-suffix")),
    ],
    ids=["empty", "other problems", "other prompts"],
)
def test_a_store_with_nothing_for_the_run_is_refused(
    row: Rollout | None, named: tuple[str, ...], tmp_path: Path
) -> None:
    path = store_of(tmp_path / "a.jsonl", *([] if row is None else [row]))
    with pytest.raises(RolloutError) as raised:
        ReplayEngine([path], {"a": [1]})
    assert all(part in str(raised.value) for part in ("--rollout-replay", str(path), *named))


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"none\.jsonl.*--rollout-replay"):
        ReplayEngine([tmp_path / "none.jsonl"], {"a": [1]})
