"""Calculates the results of one benchmark from its graded samples."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.reasoning_tags import without_reasoning
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.tools.evaluation.known_sets import Kind
from megatron_rasft.tools.evaluation.statistics import bootstrap_interval, majority_at_k, pass_at_k
from megatron_rasft.types import Rollout
from megatron_rasft.verify.mathematics.answer_extraction import closed_boxes, extract_answer
from megatron_rasft.verify.pool import end_of_response
from megatron_rasft.verify.programs.program_extraction import holds_program


@dataclass(kw_only=True, slots=True)
class Summary:
    """Results of one model on one benchmark. Fractions are of samples, in [0, 1]; lengths are in tokens."""

    name: str
    title: str
    kind: Kind
    num_problems: int
    num_rows: int
    """Number of rows of the complete set; more than ``num_problems`` if --limit was given."""
    num_samples: int
    """Samples per problem."""
    is_verified: bool
    """Whether the set has the published content."""
    sha256: str
    """Checksum of the set's file, uncompressed."""
    accuracy: float
    """avg@k: share of correct samples."""
    accuracy_low: float
    """Lower bound of the 95 % bootstrap interval over problems."""
    accuracy_high: float
    """Upper bound of the 95 % bootstrap interval over problems."""
    pass_at: dict[int, float] = field(default_factory=dict)
    """k -> pass@k."""
    majority_at: dict[int, float] = field(default_factory=dict)
    """k -> maj@k. Empty for code, because programs cannot be counted as equal answers."""
    truncated_frac: float = 0.0
    no_answer_frac: float = 0.0
    """Samples in which ``extract_answer``, or ``holds_program`` for code, finds nothing; 0 for a set of kind ``own``."""
    no_box_frac: float = 0.0
    """Samples whose reply has no closed box. Their answer, if any, was taken from the text."""
    unverifiable_frac: float = 0.0
    timeout_frac: float = 0.0
    mean_tokens: float = 0.0
    median_tokens: float = 0.0
    p95_tokens: float = 0.0
    mean_reward: float | None = None
    """Mean reward of the samples with one; None without --verify-function."""
    mean_tokens_correct: float | None = None
    """Mean length of correct samples; None if there are none."""
    problem_ids: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Share of correct samples of each problem, in the order of ``problem_ids``."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of summary.json for this benchmark."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Summary":
        """Reverses ``as_dict``, even after conversion to JSON, which turns the integer keys into text."""
        for name in ("pass_at", "majority_at"):
            values[name] = {int(k): v for k, v in values[name].items()}
        return cls(**values)


def summarise(
    benchmark: Benchmark, rollouts: Sequence[Rollout], num_samples: int, ks: Sequence[int], num_rows: int
) -> Summary:
    """Calculates the results of a benchmark.

    Args:
        benchmark: the benchmark with its problems, at most --limit.
        rollouts: [problems x num_samples] graded samples, problem after problem.
        num_samples: samples per problem.
        ks: every k of pass@k and maj@k.
        num_rows: number of rows of the complete set.
    """
    assert len(rollouts) == len(benchmark.problems) * num_samples, "a sample is missing"
    correct = np.array([r.verdict == "correct" for r in rollouts]).reshape(-1, num_samples)
    scores = correct.mean(axis=1)
    low, high = bootstrap_interval(scores)
    lengths = np.array([len(r.response_ids) for r in rollouts])
    is_math = benchmark.kind == "math"
    texts = [end_of_response(r.text, VerifyConfig().verify_max_response_chars) for r in rollouts]
    answers = [_answer(benchmark.kind, text) for text in texts]
    rewards = [r.reward for r in rollouts if r.reward is not None]

    def share(flags: Sequence[bool]) -> float:
        return sum(flags) / len(rollouts)

    return Summary(
        name=benchmark.name,
        title=benchmark.title,
        kind=benchmark.kind,
        num_problems=len(benchmark.problems),
        num_rows=num_rows,
        num_samples=num_samples,
        is_verified=benchmark.is_verified,
        sha256=benchmark.sha256,
        accuracy=float(scores.mean()),
        accuracy_low=low,
        accuracy_high=high,
        pass_at={
            k: float(np.mean([pass_at_k(num_samples, int(row.sum()), k) for row in correct])) for k in ks
        },
        majority_at=_majorities(answers, correct, ks) if is_math else {},
        truncated_frac=share([r.finish_reason == "length" for r in rollouts]),
        no_answer_frac=share([answer is None for answer in answers]),
        no_box_frac=share([is_math and not closed_boxes(without_reasoning(text)) for text in texts]),
        unverifiable_frac=share([r.verdict == "unverifiable" for r in rollouts]),
        timeout_frac=share([r.verdict == "timeout" for r in rollouts]),
        mean_tokens=float(lengths.mean()),
        median_tokens=float(np.median(lengths)),
        p95_tokens=float(np.quantile(lengths, 0.95)),
        mean_reward=float(np.mean(rewards)) if rewards else None,
        mean_tokens_correct=float(lengths[correct.ravel()].mean()) if correct.any() else None,
        problem_ids=[p.problem_id for p in benchmark.problems],
        scores=scores.tolist(),
    )


def _answer(kind: Kind, text: str) -> str | None:
    """Returns the answer of a mathematical response, "" for another response that holds one, and None for one without."""
    if kind == "math":
        return extract_answer(text)
    return "" if kind == "own" or holds_program(text) else None


def _majorities(
    answers: Sequence[str | None], correct: NDArray[np.bool_], ks: Sequence[int]
) -> dict[int, float]:
    """Returns maj@k averaged over problems; ``correct`` is [problems, samples]."""
    num_samples = correct.shape[1]
    ballots = [None if answer is None else _ballot(answer) for answer in answers]
    groups = [
        (ballots[i * num_samples : (i + 1) * num_samples], flags.tolist()) for i, flags in enumerate(correct)
    ]
    return {k: float(np.mean([majority_at_k(votes, right, k) for votes, right in groups])) for k in ks}


def _ballot(answer: str) -> str:
    """Returns the answer without typesetting. Wrong answers with the same text vote together.

    Correct answers always vote together, so values need not be compared.
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", answer[:2000])
    text = re.sub(r"\\(?:left|right|displaystyle|text|mathrm|textbf)(?![A-Za-z])|\\[,;:! ]|[\s${}]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).rstrip(".").casefold()
    return re.sub(r"\.0+$", "", text)
