"""A rollout store returns the rollouts written to it, and tolerates an incomplete line."""

from pathlib import Path

import pytest

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.store import (
    RolloutStore,
    read_rollout,
    read_rollouts,
    scan_rollouts,
    whole_lines,
)
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


def test_truncating_removes_later_rollouts(tmp_path: Path) -> None:
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


def test_a_rollout_can_be_read_from_its_offset(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    written = [rollout("a", 0), rollout("b", 1), rollout("c", 2)]
    store.append(written)
    offsets = [offset for offset, _ in scan_rollouts(store.path)]
    assert [read_rollout(store.path, offset) for offset in reversed(offsets)] == written[::-1]


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"none\.jsonl.*--rollout-replay"):
        list(read_rollouts(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        ("", 0),
        ("ab", 0),
        ("ab\n", 3),
        ("ab\ncd", 3),
        ("ab\n" + "c" * 2**17, 3),
        ("c" * 2**17 + "\nd", 2**17 + 1),
    ],
    ids=["empty", "half a line", "a line", "a line and a half", "a long half line", "a long line"],
)
def test_half_a_line_at_the_end_does_not_count(tmp_path: Path, content: str, whole: int) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(content)
    assert whole_lines(path) == whole


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "none.jsonl") == 0
