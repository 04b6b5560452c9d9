"""The nouns every room shares. Imports nothing of this package and no torch."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
Verdict = Literal["correct", "wrong", "unverifiable", "timeout"]
SampleKind = Literal["expert", "rollout"]
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
    ``response_ids`` is what is imitated and ends with end-of-sequence.
    """

    problem_id: str
    """Unique in the run: the row's own id, else ``<file name>:<line>``."""
    problem: str
    response: str
    answer: str | None
    """Gold answer for the verifier; None for a program, and where every rollout engine is off."""
    prompt_ids: list[int]
    response_ids: list[int]
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
    """One sequence of a training batch: prompt, response and how strongly it is trained on."""

    problem_id: str
    kind: SampleKind
    prompt_ids: list[int]
    response_ids: list[int]
    weight: float
    """A of the objective: multiplies every token's loss. Negative only for gft and grpo."""
    ref_logprobs: list[float] | None = None
    """Per response token under the frozen reference, nats; None until scored or if not needed."""
    old_logprobs: list[float] | None = None
    """Per response token under the policy at the start of the window; psft and grpo only."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
