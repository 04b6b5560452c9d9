"""Asserts the grader's bars on every list of pairs: no false accept, and few false rejects.

``grading_kinds.jsonl`` has pairs of each kind that docs/verification.md names, and ``grading_pairs.jsonl`` pairs that were written
without a look at the grader. Each pair has a gold answer, a whole response, and whether the response is correct.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import Rollout
from megatron_rasft.verify.pool import VerifierPool

HERE = Path(__file__).parent
MAX_FALSE_REJECT_FRAC = 0.03


def read_pairs(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def grade_in_pool(pairs: list[dict[str, Any]]) -> list[Rollout]:
    """Grades pairs as a run does. The deadline is long because other tests may use the same cores."""
    rollouts = [Rollout.of_text(str(i), pair["response"]) for i, pair in enumerate(pairs)]
    with VerifierPool(VerifyConfig(verify_num_workers=1, verify_timeout_s=60)) as pool:
        pool.verify(rollouts, {str(i): pair["gold"] for i, pair in enumerate(pairs)})
    return rollouts


@pytest.mark.parametrize("name", ["grading_kinds.jsonl", "grading_pairs.jsonl"])
def test_no_false_accept_and_few_false_rejects(name: str) -> None:
    pairs = read_pairs(name)
    assert len(pairs) >= 300
    graded = list(zip(pairs, grade_in_pool(pairs), strict=True))
    accepts = [pair for pair, rollout in graded if rollout.verdict == "correct" and not pair["equal"]]
    rejects = [
        (pair, rollout.verdict_reason)
        for pair, rollout in graded
        if rollout.verdict != "correct" and pair["equal"]
    ]
    for offender in (*accepts, *rejects):
        print(offender)
    print(f"{name}: {len(pairs)} pairs, {len(accepts)} false accepts, {len(rejects)} false rejects")
    assert not [pair for pair, rollout in graded if rollout.verdict == "timeout"]
    assert not accepts
    assert len(rejects) <= MAX_FALSE_REJECT_FRAC * sum(pair["equal"] for pair in pairs)
