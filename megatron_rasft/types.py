"""The nouns every room shares. Imports nothing of this package and no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
Verdict = Literal["correct", "wrong", "unverifiable", "timeout"]
SampleKind = Literal["demonstration", "rollout"]
PauseMode = Literal["abort", "retract", "in_place"]
KLDirection = Literal["forward", "reverse"]
"""``forward`` is KL(reference || policy), ``reverse`` is KL(policy || reference)."""

TestStyle = Literal["asserts", "check", "pytest", "functional", "stdin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramCase:
    """One run of a program: what goes in and what must come out."""

    input: str
    """``stdin``: standard input. ``functional``: JSON arguments, one a line."""
    output: str
    """``stdin``: standard output. ``functional``: the JSON value to be returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTests:
    """What a program in a response is checked against."""

    style: TestStyle
    """``asserts``: statements run one by one; ``check``: a script that defines ``check(candidate)``; ``pytest``: a
    file of test functions that import from ``solution``; ``functional`` and ``stdin``: ``cases``."""
    tests: tuple[str, ...] = ()
    """Scripts, in order. Empty where there are ``cases``."""
    entry_point: str = ""
    """Name of the function the tests call; ``check`` and ``functional`` cannot do without."""
    setup: str = ""
    """Run before the tests, after the program."""
    prompt: str = ""
    """Source that a response may continue instead of writing the program whole."""
    cases: tuple[ProgramCase, ...] = ()


Check = str | CodeTests
"""What a response is checked against: a gold answer or tests."""


@dataclass(kw_only=True, slots=True)
class Demonstration:
    """One problem with its expert solution, tokenised once.

    ``prompt_ids`` is everything the policy is conditioned on (chat template included);
    ``response_ids`` is what is imitated and ends with end-of-sequence. Both are lists, or memoryviews of int32 where
    they lie in a larger array: a list takes 36 bytes a token.
    """

    problem_id: str
    """Unique in the run: the row's own id, else ``<file name>:<line>``."""
    problem: str
    response: str
    answer: str | None
    """Gold answer for the verifier; None for a program, and where every rollout engine is off."""
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    source: str = ""
    """``file:line`` of the row, for messages."""
    tests: CodeTests | None = None
    """What a program in the response must pass; None for a problem with an answer."""

    @property
    def check(self) -> Check:
        """What its rollouts are checked against; "" if the row has neither tests nor an answer."""
        return self.tests or self.answer or ""


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One response the policy sampled, with everything that was decided about it."""

    problem_id: str
    sample_index: int
    """0 .. num_samples - 1 within its group."""
    weight_version: int
    """Number of optimizer steps the sampling weights had seen."""
    prompt_ids: list[int]
    response_ids: list[int]
    """Sampled token ids, end-of-sequence included exactly when the policy produced it."""
    response_logprobs: list[float]
    """Per response token: log-probability under softmax(logits / temperature) before top-p, nats."""
    finish_reason: FinishReason
    text: str
    """Decoded response without special tokens: what the verifier reads."""
    verdict: Verdict | None = None
    verdict_reason: str = ""
    filtered_by: str = ""
    """Name of the quality filter that removed it; empty if it survived."""
    weight: float = 0.0
    """Objective weight A it was given; 0 if it is not trained on."""
    policy_age: int = 0
    """Optimizer steps between the weights that sampled it and those of the refresh that took it."""


def counts_as_attempt(num_tokens: int, finish_reason: str, verdict: str | None) -> bool:
    """Whether a rollout says anything about the policy: it was delivered and the verifier decided on it.

    An aborted or empty response is a failure of the engine and a timeout one of the grader; neither may
    look like a wrong answer. A response without a checkable answer, or cut by length, is a failed attempt.
    """
    return num_tokens > 0 and finish_reason != "abort" and verdict != "timeout"


def counts_as_solved(num_tokens: int, finish_reason: str, verdict: str | None) -> bool:
    """Whether it is a complete, correct attempt; one cut by length never is, whatever it says."""
    is_attempt = counts_as_attempt(num_tokens, finish_reason, verdict)
    return is_attempt and verdict == "correct" and finish_reason == "stop"


@dataclass(kw_only=True, frozen=True)
class SamplingParams:
    """How responses are drawn."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    stop_ids: frozenset[int]
    max_batch_size: int | None
    """Sequences decoded at once on one replica of the training model, None for as many as its memory holds; a server
    decides that itself."""
    max_total_tokens: int | None = None
    """Most tokens of prompt and response together; None for no limit. Longer prompts then get shorter responses."""

    def max_response_tokens(self, prompt_len: int) -> int:
        """The longest response to a prompt of ``prompt_len`` tokens: at least 1 token."""
        if self.max_total_tokens is None:
            return self.max_new_tokens
        return max(1, min(self.max_new_tokens, self.max_total_tokens - prompt_len))


@dataclass(kw_only=True, frozen=True)
class Request:
    """One prompt; ``seeds`` holds one seed for each of its samples."""

    prompt_ids: list[int]
    seeds: list[int]


@dataclass(kw_only=True, frozen=True)
class Response:
    """What was sampled for one seed of a request."""

    token_ids: list[int]
    logprobs: list[float]
    """Under softmax(logits / temperature), before top-p, nats."""
    finish_reason: FinishReason


@dataclass(kw_only=True, slots=True)
class RolloutGroup:
    """All rollouts of one problem from one refresh."""

    problem_id: str
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def num_correct(self) -> int:
        """Rollouts with verdict ``correct``, before de-duplication and filters."""
        return sum(r.verdict == "correct" for r in self.rollouts)


@dataclass(kw_only=True, slots=True)
class TrainingSample:
    """One sequence of a training batch: prompt, response and how strongly it is trained on.

    Token ids may be memoryviews of int32, log-probabilities memoryviews of fp32.
    """

    problem_id: str
    kind: SampleKind
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    weight: float
    """A of the objective: multiplies every token's loss. Negative only for gft and grpo."""
    ref_logprobs: Sequence[float] | None = None
    """Per response token under the frozen reference, nats; None until scored or if not needed."""
    old_logprobs: Sequence[float] | None = None
    """Per response token under the policy at the start of the window; psft and grpo only."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
