"""Checks the list of pairs: a gold answer and a whole response, in the forms that language models write.

`test_grading_kinds.py` grades them. They were written and labelled without a look at the grader. The labels follow
these rules: a response commits to one final answer, and a box after the reasoning comes first. Values are exact. Units are
compared where the gold answer has one. Names bind, so "y=1, x=2" is the point (2, 1).
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

PAIRS = Path(__file__).with_name("grading_pairs.jsonl")


def read_pairs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def test_pairs_are_distinct_and_balanced() -> None:
    pairs = read_pairs()
    assert len(pairs) >= 300
    assert all(
        {key: type(value) for key, value in pair.items()}
        == {"category": str, "gold": str, "response": str, "equal": bool}
        for pair in pairs
    )
    assert max(Counter((pair["gold"], pair["response"]) for pair in pairs).values()) == 1
    assert 0.45 < sum(pair["equal"] for pair in pairs) / len(pairs) < 0.55
