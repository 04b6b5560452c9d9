"""Compares the grader with pairs of a gold answer and a whole response, in the forms that language models write.

The pairs were written and labelled without a look at the grader. `category` names the kind of the pair. The labels follow
these rules: a response commits to one final answer, and a box after the thought comes first. Values are exact. Units are
compared where the gold answer has one. Names bind, so "y=1, x=2" is the point (2, 1).
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import Rollout
from megatron_rasft.verify.pool import VerifierPool

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


def grade_in_pool(pairs: list[dict[str, Any]]) -> list[str]:
    """Grades pairs as a run does, each as a problem of its own."""
    rollouts = [
        Rollout(
            problem_id=str(row),
            sample_index=0,
            weight_version=0,
            prompt_ids=[],
            response_ids=[],
            response_logprobs=[],
            finish_reason="stop",
            text=pair["response"],
        )
        for row, pair in enumerate(pairs)
    ]
    # The default deadline assumes a free core. This test may share its cores with others
    with VerifierPool(VerifyConfig(verify_num_workers=2, verify_timeout_s=60)) as pool:
        pool.verify(rollouts, {str(row): pair["gold"] for row, pair in enumerate(pairs)})
    return [str(rollout.verdict) for rollout in rollouts]


def test_no_pair_is_accepted_falsely_and_few_are_rejected_falsely() -> None:
    pairs = read_pairs()
    graded = list(zip(pairs, grade_in_pool(pairs), strict=True))
    offenders = [(pair, verdict) for pair, verdict in graded if (verdict == "correct") != pair["equal"]]
    for pair, verdict in sorted(offenders, key=lambda offender: offender[0]["category"]):
        print(f"{verdict} {json.dumps(pair, ensure_ascii=False)}")
    accepted_falsely = [pair for pair, _ in offenders if not pair["equal"]]
    assert not [pair for pair, verdict in graded if verdict == "timeout"]
    assert not accepted_falsely
    assert len(offenders) <= 0.03 * sum(pair["equal"] for pair in pairs)
