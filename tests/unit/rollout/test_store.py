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


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"none\.jsonl does not exist.*--rollout-replay"):
        ReplayEngine([tmp_path / "none.jsonl"], {"a": [1, 2]})


def test_replay_hands_out_in_turn_and_starts_over(tmp_path: Path) -> None:
    first, second = RolloutStore(tmp_path / "first.jsonl"), RolloutStore(tmp_path / "second.jsonl")
    first.append([rollout("b", 0), rollout("a", 0), rollout("unknown", 0), rollout("a", 1)])
    second.append([rollout("a", 5, prompt_ids=(1, 2, 3)), rollout("a", 2)])
    engine = ReplayEngine([first.path, second.path], {"a": [1, 2], "b": [1, 2], "c": [1, 2]})
    assert engine.num_problems == 2
    earlier, later = engine.take("a", 2, visit=0), engine.take("a", 2, visit=1)
    assert [r.response_ids[1] for r in earlier + later] == [0, 1, 2, 0], "none of the other prompt"
    assert [r.sample_index for r in later] == [0, 1]
    assert earlier[0] == rollout("a", 0)
    assert [r.problem_id for r in engine.take("b", 2, visit=3)] == ["b"]
    assert engine.take("c", 2, visit=0) == []


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ([rollout("old.jsonl:1", 0)], ["'old.jsonl:1'", "'new.jsonl:1'", "--data-id-field"]),
        ([rollout("x", 0), rollout("new.jsonl:1", 0, (1, 2, 3))], ["'new.jsonl:1'", "--data-prompt-suffix"]),
        ([], ["is empty"]),
    ],
)
def test_replay_that_has_nothing_for_the_run_is_refused(
    tmp_path: Path, stored: list[Rollout], named: list[str]
) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    store.append(stored)
    with pytest.raises(RolloutError) as raised:
        ReplayEngine([store.path], {"new.jsonl:1": [1, 2]})
    assert all(text in str(raised.value) for text in [str(store.path), "--rollout-replay", *named])
