"""The published weights, against the method's test vectors and a second implementation."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_rasft.objective.published_weighting import published_weights
from megatron_rasft.types import RolloutGroup
from tests.unit.objective.sampled_groups import counted_group, failed_group, make_group, rollout


@pytest.mark.parametrize(
    ("num_correct", "num_wrong", "demonstration", "each"),
    [
        (0, 3, 1.0, 0.0),
        (1, 2, 0.2779, 0.00869),
        (2, 1, 0.1551, 0.005),
        (3, 0, 1.0, 0.0),
        (8, 0, 1.0, 0.0),
    ],
)
def test_published_vectors_of_few_samples(
    num_correct: int, num_wrong: int, demonstration: float, each: float
) -> None:
    weights = published_weights(counted_group(num_correct, num_wrong))
    assert weights.demonstration == pytest.approx(demonstration, abs=5e-5)
    assert weights.rollouts == pytest.approx([each] * num_correct + [0.0] * num_wrong, abs=5e-6)


@pytest.mark.parametrize(
    ("num_correct", "num_wrong", "demonstration", "each"),
    [(1, 7, 0.31638, 0.011623), (4, 4, 0.12773, 0.007502), (7, 1, 0.04749, 0.005)],
)
def test_published_vectors_of_eight_samples_keep_three_wrong(
    num_correct: int, num_wrong: int, demonstration: float, each: float
) -> None:
    weights = published_weights(counted_group(num_correct, num_wrong))
    assert weights.demonstration == pytest.approx(demonstration, abs=5e-6)
    assert weights.rollouts[:num_correct] == pytest.approx([each] * num_correct, abs=5e-7)
    assert not any(weights.rollouts[num_correct:])


def word_overlap(a: str, b: str) -> float:
    left, right = set(a.split()), set(b.split())
    return len(left & right) / max(1, len(left | right))


def near_distinct(texts: Sequence[str]) -> list[int]:
    kept: list[int] = []
    for i, text in enumerate(texts):
        if all(word_overlap(text, texts[j]) < 0.82 for j in kept):
            kept.append(i)
    return kept


def published_again(group: RolloutGroup) -> tuple[float, np.ndarray]:
    """A second implementation of the published rule, in numpy. It ranks the wrong rollouts as the script does."""
    attempts = [
        r
        for r in group.rollouts
        if r.finish_reason != "abort" and r.verdict != "timeout" and r.response_ids != []
    ]
    kept = [attempts[i] for i in near_distinct([r.text for r in attempts])]
    survivors = [r for r in kept if r.filtered_by == ""]
    right = [r for r in survivors if r.verdict == "correct" and r.finish_reason == "stop"]
    wrong = [r for r in survivors if r.verdict != "correct"]
    table = np.zeros(len(group.rollouts), dtype=np.float64)
    if not right:
        return 1.0, table
    likeness = np.array([[word_overlap(w.text, c.text) for c in right] for w in wrong]).reshape(
        -1, len(right)
    )
    nearest = likeness.max(axis=1)
    nearest = nearest[nearest < 0.88]
    wrong_kept = np.argsort(np.abs(nearest - 0.45), kind="stable")[:3]
    rewards = np.concatenate(
        [[3.0 - 2.0 * len(right) / len(kept)], np.ones(len(right)), np.zeros(len(wrong_kept))]
    )
    if np.ptp(rewards) == 0:
        return 1.0, table
    a = np.tanh(0.4 * (rewards - rewards.mean()) / (rewards.std(ddof=0) + 1e-6)) / (1 + len(right))
    for r, value in zip(right, np.clip(a[1 : 1 + len(right)], 0.02, 0.15), strict=True):
        table[next(i for i, other in enumerate(group.rollouts) if other is r)] = 0.25 * value
    return a[0], table


def test_published_agrees_with_a_second_implementation_on_random_groups() -> None:
    rng = random.Random(0)
    outcomes = set()
    for _ in range(5000):
        group = make_group(
            *(
                rollout(
                    i,
                    rng.choice(["correct", "correct", "wrong", "wrong", "unverifiable", "timeout"]),
                    text=" ".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 9))),
                    finish=rng.choice(["stop", "stop", "stop", "stop", "length", "abort"]),
                    filtered=rng.choice(["", "", "", "loop"]),
                    num_tokens=rng.choice([0, 1, 2, 3, 4]),
                )
                for i in range(rng.randint(0, 12))
            )
        )
        weights = published_weights(group, deduplicate=near_distinct, similarity=word_overlap)
        demonstration, table = published_again(group)
        assert weights.demonstration == pytest.approx(demonstration, rel=1e-12, abs=1e-15)
        np.testing.assert_allclose(weights.rollouts, table, rtol=1e-12, atol=1e-15)
        outcomes.add(round(demonstration, 6))
    assert len(outcomes) > 20, "the random groups are too much alike to prove anything"


def test_published_wrong_copies_of_a_correct_text_leave_the_group() -> None:
    one_copy = make_group(rollout(0), rollout(1, "wrong"), rollout(2, "wrong"))
    copies = published_weights(one_copy, similarity=lambda w, c: 0.88 if w == "text 2" else 0.879)
    # d stays 2/3, because the copy was sampled. Only its wrong answer is left out of the group.
    rewards = np.array([1 + 4 / 3, 1.0, 0.0])
    z = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert copies.demonstration == pytest.approx(np.tanh(0.4 * z[0]) / 2, rel=1e-12)


def test_unsampled_problem_keeps_weight_one() -> None:
    assert published_weights(None).demonstration == 1.0


def test_failed_rollouts_are_not_wrong_answers() -> None:
    weights = published_weights(failed_group())
    assert (weights.demonstration, weights.solvability) == (1.0, None)
