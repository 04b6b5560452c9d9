"""What is written to a rollout store comes back."""

from pathlib import Path

import pytest

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.store import RolloutStore, read_rollouts
from megatron_rasft.types import Rollout


def rollout(problem_id: str, index: int, prompt_ids: tuple[int, ...] = (1, 2)) -> Rollout:
    return Rollout(
        problem_id=problem_id,
        sample_index=index,
        weight_version=3,
        prompt_ids=list(prompt_ids),
        response_ids=[7, index],
        response_logprobs=[-0.1234567890123456, -1e-17],
        finish_reason="stop",
        text="naïve \\boxed{7}\u2028",
        verdict="correct",
        weight=0.1 + 0.2,
    )


def test_rollouts_come_back_exactly(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "deep" / "rollouts.jsonl")
    written = [rollout("a", 0), rollout("b", 1)]
    store.append(written[:1])
    store.append(written[1:])
    assert list(read_rollouts(store.path)) == written


def test_truncating_forgets_what_came_after(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    store.append([rollout("a", 0)])
    offset = store.offset
    store.append([rollout("b", 0)])
    store.truncate(offset)
    assert [r.problem_id for r in read_rollouts(store.path)] == ["a"]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    RolloutStore(path).append([rollout("a", 0)])
    path.write_text(path.read_text() + '{"problem_id": "b"}\n')
    with pytest.raises(RolloutError, match=r"rollouts.jsonl:2 "):
        list(read_rollouts(path))


def test_replay_hands_out_in_turn_and_starts_over(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    store.append([rollout("a", i) for i in range(3)])
    engine = ReplayEngine([store.path])
    first = engine.take("a", [1, 2], 2, visit=0)
    second = engine.take("a", [1, 2], 2, visit=1)
    assert [r.response_ids[1] for r in first + second] == [0, 1, 2, 0]
    assert [r.sample_index for r in second] == [0, 1]


def test_replay_refuses_rollouts_of_another_prompt(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    store.append([rollout("a", 0)])
    assert ReplayEngine([store.path]).take("a", [1, 2, 3], 2, visit=0) == []
    assert ReplayEngine([store.path]).take("unknown", [1, 2], 2, visit=0) == []
