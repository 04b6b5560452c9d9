"""The published weights from texts, against an implementation that shares no code with them (tests/published_rules.py)."""

import random

from tests.published_groups import differs, product_weights, random_group, random_text
from tests.published_rules import is_dropped, published


def test_random_groups_have_the_weights_of_the_second_implementation() -> None:
    draw = random.Random(1)
    outcomes = set()
    for _ in range(600):
        texts, are_correct = random_group(draw)
        assert not differs(texts, are_correct), (texts, are_correct)
        outcomes.add(round(product_weights(texts, are_correct)[0], 6))
    assert len(outcomes) > 30, "the random groups are too much alike to prove anything"


def test_random_texts_are_kept_and_dropped() -> None:
    draw = random.Random(2)
    dropped = [is_dropped(random_text(draw)) for _ in range(1000)]
    assert 0.5 < sum(dropped) / len(dropped) < 0.98


def test_second_implementation_has_the_vectors_of_the_method() -> None:
    texts = [f"Let x be {i}, so that we have " + " ".join(f"w{i}{j}" for j in range(40)) for i in range(8)]
    texts = [text + f"\\boxed{{{i} apples}}" for i, text in enumerate(texts)]
    for num_correct, total, demonstration, each in (
        (0, 3, 1.0, 0.0),
        (1, 3, 0.2779, 0.00869),
        (2, 3, 0.1551, 0.005),
        (3, 3, 1.0, 0.0),
        (1, 8, 0.31638, 0.011623),
        (4, 8, 0.12773, 0.007502),
        (7, 8, 0.04749, 0.005),
    ):
        found, weights = published(texts[:total], [i < num_correct for i in range(total)])
        assert abs(found - demonstration) < 5e-5
        assert max(abs(w - each) for w in weights[:num_correct] or [0.0]) < 5e-6
        assert not any(weights[num_correct:])
