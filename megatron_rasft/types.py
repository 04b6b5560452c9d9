"""Types that several packages share. This module imports neither torch nor any other module of the project."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]
Verdict = Literal["correct", "wrong", "unverifiable", "timeout"]
SampleKind = Literal["demonstration", "rollout"]
PauseMode = Literal["abort", "retract", "in_place"]
KLDirection = Literal["forward", "reverse"]
"""``forward`` is KL(reference || policy), ``reverse`` is KL(policy || reference)."""

TestStyle = Literal["asserts", "check", "pytest", "functional", "stdin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramCase:
    """One test run of a program: its input and the expected output."""

    input: str
    """Style ``stdin``: standard input. Style ``functional``: JSON arguments, one per line."""
    output: str
    """Style ``stdin``: expected standard output. Style ``functional``: expected return value as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTests:
    """The tests that a program in a response must pass."""

    style: TestStyle
    """``asserts``: statements that run one after the other. ``check``: a script that defines ``check(candidate)``.
    ``pytest``: a file of test functions that import from ``solution``. ``functional`` and ``stdin``: ``cases``."""
    tests: tuple[str, ...] = ()
    """Test scripts, in order. Empty for the styles that use ``cases``."""
    entry_point: str = ""
    """Name of the function that the tests call. Required by ``check`` and ``functional``."""
    setup: str = ""
    """Source that runs after the program and before the tests."""
    prompt: str = ""
    """Beginning of a program that a response may continue. A response may also repeat the whole program."""
    cases: tuple[ProgramCase, ...] = ()
    """Inputs and outputs of the styles ``functional`` and ``stdin``."""


ProblemRow = dict[str, Any]
"""A row of the data, as its file has it: every field with its JSON value. --verify-function receives it."""

Check = str | CodeTests | ProblemRow
"""The check of a response: a gold answer, tests, or the row that --verify-function receives."""

Judgement = bool | float | Verdict
"""What a function of --verify-function returns: whether a response is correct, its reward in [0, 1], or a verdict."""


@dataclass(kw_only=True, slots=True)
class Demonstration:
    """One problem with a worked solution to imitate, as text and as token ids.

    ``prompt_ids`` are all tokens before the response, including those of the chat template. ``response_ids`` are the
    tokens to train on, and end with end-of-sequence. Both are lists, or memoryviews of int32 into a larger array,
    because a list takes 36 bytes per token.
    """

    problem_id: str
    """Unique in the run: the id field of the row, or ``<file name>:<line>`` if it has none."""
    problem: str
    response: str
    answer: str | None
    """Gold answer for the verifier. None for a problem with tests, and allowed to be None in a run without rollouts."""
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    source: str = ""
    """``file:line`` of the row, for messages."""
    tests: CodeTests | None = None
    """Tests for programs; None for a problem with a gold answer."""
    fields: ProblemRow | None = None
    """The whole row, in a run with --verify-function; otherwise None."""
    teacher_prompt_ids: Sequence[int] = field(default_factory=list)
    """All tokens before the response in the teacher's prompt, which holds the demonstration; empty for objectives without a teacher."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longer of the two prompts after which a response is computed."""
        return max(len(self.prompt_ids), len(self.teacher_prompt_ids))

    @property
    def check(self) -> Check:
        """The check of rollouts: see ``check_of``."""
        return check_of(self.answer, self.tests, self.fields)


def check_of(answer: str | None, tests: CodeTests | None, fields: ProblemRow | None) -> Check:
    """The check of a row: the whole row if it is kept for --verify-function, else its tests or gold answer; "" for neither."""
    return fields if fields is not None else tests or answer or ""


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One response sampled from the policy, with its verdict and weight."""

    problem_id: str
    sample_index: int
    """Index in its group, 0 .. num_samples - 1."""
    weight_version: int
    """Version (optimizer steps) of the weights that sampled the rollout."""
    prompt_ids: list[int]
    response_ids: list[int]
    """Sampled token ids, after those of the guide. The last token is end-of-sequence only if the policy produced it."""
    response_logprobs: list[float]
    """Log-probability of each sampled token under softmax(logits / temperature), before top-p, in nats."""
    finish_reason: FinishReason
    text: str
    """Decoded response without special tokens, as the verifier reads it."""
    verdict: Verdict | None = None
    """The verifier's decision; None before verification."""
    verdict_reason: str = ""
    """Short explanation of the verdict, for the rollout store and the report."""
    reward: float | None = None
    """The reward that --verify-function gave, 0 .. 1; None if it gave none, or without that flag."""
    filtered_by: str = ""
    """Name of the quality filter that rejected the rollout; "" if none did."""
    weight: float = 0.0
    """Objective weight A in training; 0 if the rollout is not trained on."""
    policy_age: int = 0
    """Optimizer steps between the weights that sampled the rollout and the refresh that uses it."""
    num_guide_tokens: int = 0
    """First tokens of ``response_ids`` that are the demonstration's; 0 for a rollout of the prompt alone."""

    @classmethod
    def of_text(cls, problem_id: str, text: str) -> "Rollout":
        """A complete response that no policy sampled, such as a demonstration, to be graded."""
        return cls(
            problem_id=problem_id,
            sample_index=0,
            weight_version=0,
            prompt_ids=[],
            response_ids=[],
            response_logprobs=[],
            finish_reason="stop",
            text=text,
        )


def counts_as_attempt(num_tokens: int, finish_reason: str, verdict: str | None) -> bool:
    """Returns whether a rollout counts in the solve rate: it has a response, and the verifier decided on it.

    Aborted and empty responses are failures of the rollout engine, and a timeout is a failure of the verifier. Neither must
    count as a wrong answer. A response that is truncated or has no checkable answer counts as a failed attempt.
    """
    return num_tokens > 0 and finish_reason != "abort" and verdict != "timeout"


def counts_as_solved(num_tokens: int, finish_reason: str, verdict: str | None) -> bool:
    """Returns whether a rollout is a complete and correct attempt. A truncated response never counts as solved."""
    is_attempt = counts_as_attempt(num_tokens, finish_reason, verdict)
    return is_attempt and verdict == "correct" and finish_reason == "stop"


def credit_of(num_tokens: int, finish_reason: str, verdict: str | None, reward: float | None) -> float:
    """Returns the part of a solved attempt that a rollout counts as in the solve rate: its reward, or 1 if it is solved.

    A truncated response counts 0, whatever its reward.
    """
    if reward is None:
        return float(counts_as_solved(num_tokens, finish_reason, verdict))
    is_complete = counts_as_attempt(num_tokens, finish_reason, verdict) and finish_reason == "stop"
    return reward if is_complete else 0.0


@dataclass(kw_only=True, frozen=True)
class SamplingParams:
    """Sampling parameters of responses."""

    num_samples: int
    """Responses per prompt."""
    max_new_tokens: int
    """Maximum number of tokens of a response."""
    temperature: float
    top_p: float
    repetition_penalty: float
    stop_ids: frozenset[int]
    max_batch_size: int | None
    """Number of sequences that one replica of the trainer's model decodes at once; None for as many as fit into memory.
    Rollout servers ignore this."""
    max_total_tokens: int | None = None
    """Maximum number of tokens of prompt plus response; None for no limit. Longer prompts then get shorter responses."""

    def max_response_tokens(self, prompt_len: int) -> int:
        """The longest response to a prompt of ``prompt_len`` tokens: at least 1 token."""
        if self.max_total_tokens is None:
            return self.max_new_tokens
        return max(1, min(self.max_new_tokens, self.max_total_tokens - prompt_len))


@dataclass(kw_only=True, frozen=True)
class Request:
    """A prompt to sample from, with one seed for each of its samples."""

    prompt_ids: list[int]
    seeds: list[int]


@dataclass(kw_only=True, frozen=True)
class Response:
    """The response to one seed of a request."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token under softmax(logits / temperature), before top-p, in nats."""
    finish_reason: FinishReason


@dataclass(kw_only=True, slots=True)
class RolloutGroup:
    """All rollouts of one problem in one refresh."""

    problem_id: str
    rollouts: list[Rollout] = field(default_factory=list)
    """Rollouts of the prompt alone."""
    guided: list[Rollout] = field(default_factory=list)
    """Rollouts that continue the beginning of the demonstration (--rollout-guided-samples)."""

    @property
    def all_rollouts(self) -> list[Rollout]:
        """Both kinds."""
        return [*self.rollouts, *self.guided]

    @property
    def num_correct(self) -> int:
        """Number of rollouts with verdict ``correct``, including duplicates and filtered ones."""
        return sum(r.verdict == "correct" for r in self.rollouts)


@dataclass(kw_only=True, slots=True)
class TrainingSample:
    """One sequence of a training batch: prompt, response and weight.

    Token ids may be memoryviews of int32, and log-probabilities memoryviews of fp32.
    """

    problem_id: str
    kind: SampleKind
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    weight: float
    """Objective weight A, which multiplies the loss of every response token. Negative only for gft and grpo."""
    is_counted: bool = True
    """Whether the response tokens count in the denominator of the loss. False for rollouts under --weighting-normalization problem."""
    is_computed: bool = True
    """Whether the model computes the sample. False for a demonstration of weight 0, whose tokens only count in the denominator."""
    ref_logprobs: Sequence[float] | None = None
    """Log-probability of each response token under the frozen reference, in nats; None if not scored."""
    old_logprobs: Sequence[float] | None = None
    """Log-probability of each response token under the policy at the last refresh, in nats; psft and grpo only."""
    teacher_logprobs: Sequence[float] | None = None
    """Log-probability of each response token under the teacher, in nats; sdft only."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class BatchSize(NamedTuple):
    """What a batch consists of."""

    num_problems: int
    num_samples: int
    """Samples that the model computes."""
    num_uncomputed: int = 0
    """Response tokens of the other samples (``TrainingSample.is_computed``). They count in the denominator of the loss."""

    @classmethod
    def of(cls, problems: Sequence[Sequence[TrainingSample]]) -> "BatchSize":
        """The size of a batch that consists of the samples of these problems."""
        samples = list(chain.from_iterable(problems))
        return cls(
            num_problems=len(problems),
            num_samples=sum(sample.is_computed for sample in samples),
            num_uncomputed=sum(len(sample.response_ids) for sample in samples if not sample.is_computed),
        )
