"""Engines and graders of known behaviour."""

from collections.abc import Sequence

import pytest

from megatron_rasft.evaluation.benchmarks import Problem
from megatron_rasft.types import Request, Response, Rollout, SamplingParams


class CountingEngine:
    """Answers with the seed; its tokens are the prompt's and the seed. May be told to fail."""

    max_positions = 100

    def __init__(self, fails_after: int | None = None) -> None:
        self.seeds: list[int] = []
        self.num_prompts: list[int] = []
        self._fails_after = fails_after

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        if self._fails_after is not None and len(self.num_prompts) == self._fails_after:
            raise KeyboardInterrupt
        self.num_prompts.append(len(requests))
        self.seeds += [seed for request in requests for seed in request.seeds]
        return [
            [Response(token_ids=[*r.prompt_ids, seed], logprobs=[], finish_reason="stop") for seed in r.seeds]
            for r in requests
        ]


def grade_even(rollouts: list[Rollout], problems: dict[str, Problem]) -> None:
    """An even seed is right."""
    for rollout in rollouts:
        assert rollout.problem_id in problems
        is_right = rollout.response_ids[-1] % 2 == 0
        rollout.verdict, rollout.verdict_reason = ("correct" if is_right else "wrong"), "by parity"


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()
