"""Groups of rollouts for the tests of the weights."""

from megatron_rasft.types import Demonstration, FinishReason, Rollout, RolloutGroup, Verdict


def rollout(
    index: int = 0,
    verdict: Verdict | None = "correct",
    text: str | None = None,
    finish: FinishReason = "stop",
    filtered: str = "",
    num_tokens: int = 3,
    reward: float | None = None,
) -> Rollout:
    """A rollout of problem "p", complete and correct by default."""
    return Rollout(
        problem_id="p",
        sample_index=index,
        weight_version=0,
        prompt_ids=[1, 2],
        response_ids=[10 + index] * num_tokens,
        response_logprobs=[-0.5] * num_tokens,
        finish_reason=finish,
        text=f"text {index}" if text is None else text,
        verdict=verdict,
        filtered_by=filtered,
        reward=reward,
    )


def make_group(*rollouts: Rollout) -> RolloutGroup:
    """The group of problem "p"."""
    return RolloutGroup(problem_id="p", rollouts=list(rollouts))


def counted_group(num_correct: int, num_wrong: int) -> RolloutGroup:
    """Correct rollouts, then wrong ones, all with different texts."""
    correct = [rollout(i, "correct") for i in range(num_correct)]
    return make_group(*correct, *(rollout(num_correct + i, "wrong") for i in range(num_wrong)))


def failed_group() -> RolloutGroup:
    """Rollouts that do not count as attempts: aborted, timed out in grading, empty."""
    return make_group(
        rollout(0, None, finish="abort"), rollout(1, "timeout"), rollout(2, "wrong", num_tokens=0)
    )


def demonstration() -> Demonstration:
    """The demonstration of problem "p"."""
    return Demonstration(
        problem_id="p", problem="?", response="!", answer="1", prompt_ids=[1, 2], response_ids=[3, 4]
    )
