"""Statistics of a run's stored rollouts, and examples of them.

Reads rollouts.jsonl once from front to back. Memory grows with the number of refreshes and of sampled problems, not with the
length or number of responses.
"""

import hashlib
import heapq
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_rasft.tools.report.archive import Archive
from megatron_rasft.tools.report.records import lines_with_offsets
from megatron_rasft.tools.report.texts import reason_of
from megatron_rasft.types import Verdict, counts_as_attempt, counts_as_solved, credit_of

VERDICTS: tuple[str, ...] = get_args(Verdict)
LENGTH_KINDS = ("correct", "wrong", "truncated")
"""Kinds of rollouts in the histogram of lengths: truncated, correct, not correct."""

Outcome = Literal["unsolved", "sometimes", "always"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Course = Literal["never solved", "lost", "newly solved", "sometimes solved", "always solved"]
COURSES: dict[Course, str] = {
    "never solved": "no sample was ever correct",
    "lost": "solved earlier, but not when last sampled",
    "newly solved": "unsolved when first sampled, solved when last sampled",
    "sometimes solved": "some samples correct when first and when last sampled",
    "always solved": "every sample correct",
}
"""Course of a problem, by the change of its outcomes over the refreshes -> its explanation on the page."""
_MAX_REASONS = 100
"""Maximum number of different reasons counted in a refresh. Reasons quote values, so there can be any number of them."""
_OTHER = "other reasons"
_ARRAYS = (b'"prompt_ids": [', b'"response_ids": [', b'"response_logprobs": [')
"""Text with which the long arrays of a line begin. It cannot occur inside a string, where quotes are escaped."""


@dataclass(slots=True)
class Visit:
    """The samples of one problem at one refresh."""

    offset: int
    """Byte offset of the first sample's line in the file."""
    num_samples: int = 0
    num_attempts: int = 0
    """Number of samples that count as attempts: neither aborted nor timed out in the grader."""
    num_solved: int = 0
    """Number of samples that are correct and complete."""
    total_credit: float = 0.0
    """``num_solved``, or with --verify-function the sum of the rewards."""

    @property
    def solve_rate(self) -> float | None:
        """Share of correct attempts, or the mean reward, as training computes it; None without an attempt."""
        return self.total_credit / self.num_attempts if self.num_attempts else None

    @property
    def outcome(self) -> Outcome | None:
        if not self.num_attempts:
            return None
        if not self.num_solved:
            return "unsolved"
        return "always" if self.num_solved == self.num_attempts else "sometimes"


@dataclass
class RefreshRollouts:
    """Counts of the rollouts of one refresh."""

    visits: dict[str, Visit] = field(default_factory=dict)
    """Problem id -> its samples."""
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(verdict, finish reason) -> rollouts."""
    lengths: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(kind in LENGTH_KINDS, ``rounded_length`` of the tokens) -> rollouts."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(verdict, reason of the grader) -> rollouts."""
    filters: Counter[str] = field(default_factory=Counter)
    """Quality filter -> rollouts that it removed."""
    ages: Counter[int] = field(default_factory=Counter)
    """Optimizer steps between the sampling weights and the refresh -> number of rollouts."""
    num_tokens: int = 0
    """Response tokens of all rollouts."""
    num_trained: int = 0
    """Rollouts that are trained on: their weight is not 0."""

    @property
    def num_rollouts(self) -> int:
        return sum(self.outcomes.values())

    def add(self, record: dict[str, Any], num_tokens: int, offset: int) -> None:
        """Counts one rollout.

        Args:
            record: line of the file, as ``parse`` returns it.
            num_tokens: length of the response.
            offset: offset of the line in the file, in bytes.
        """
        verdict, finish = str(record["verdict"] or "unverified"), str(record["finish_reason"])
        visit = self.visits.setdefault(record["problem_id"], Visit(offset))
        visit.num_samples += 1
        visit.num_attempts += _is_solved(record, num_tokens) is not None
        visit.num_solved += counts_as_solved(num_tokens, finish, verdict)
        visit.total_credit += credit_of(num_tokens, finish, verdict, record.get("reward"))
        self.outcomes[verdict, finish] += 1
        kind = "truncated" if finish == "length" else "correct" if verdict == "correct" else "wrong"
        self.lengths[kind, rounded_length(num_tokens)] += 1
        reason = verdict, str(record.get("verdict_reason", ""))[:200]
        is_counted = reason in self.reasons or len(self.reasons) < _MAX_REASONS
        self.reasons[reason if is_counted else (verdict, _OTHER)] += 1
        if record.get("filtered_by"):
            self.filters[str(record["filtered_by"])] += 1
        self.ages[int(record.get("policy_age", 0))] += 1
        self.num_tokens += num_tokens
        self.num_trained += bool(record.get("weight"))


@dataclass
class Sample:
    """One rollout to print."""

    step: int
    index: int
    verdict: str
    reason: str
    finish_reason: str
    filtered_by: str
    weight: float
    policy_age: int
    num_tokens: int
    text: str
    prompt_ids: Sequence[int] = ()
    response_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """Log-probability of each response token when it was sampled, in nats."""


@dataclass
class Example:
    """One problem to print, with some samples of its first and last refresh."""

    problem_id: str
    course: Course
    history: list[tuple[int, Visit]]
    """(step of the refresh, counts of its samples), in order."""
    samples: list[Sample]


@dataclass
class RolloutStatistics:
    """Counts of all stored rollouts. A refresh that the run repeated counts once, with its last result."""

    refreshes: dict[int, RefreshRollouts] = field(default_factory=dict)
    """Optimizer steps before the refresh -> its counts, in order."""
    num_repeated: int = 0
    """Number of rollouts that are left out, because the run repeated their refresh later."""
    num_unreadable: int = 0
    """Number of skipped lines, such as an incomplete last line."""

    @property
    def num_rollouts(self) -> int:
        return sum(refresh.num_rollouts for refresh in self.refreshes.values())

    def total(self, name: str) -> Counter[Any]:
        """Returns the sum of a counter of RefreshRollouts over all refreshes."""
        total: Counter[Any] = Counter()
        for refresh in self.refreshes.values():
            total.update(getattr(refresh, name))
        return total

    def histories(self) -> dict[str, list[tuple[int, Visit]]]:
        """Returns for each problem (step, counts) of the refreshes with an attempt, in order."""
        found: dict[str, list[tuple[int, Visit]]] = defaultdict(list)
        for step, refresh in self.refreshes.items():
            for problem_id, visit in refresh.visits.items():
                if visit.num_attempts:
                    found[problem_id].append((step, visit))
        return found


def read_statistics(path: Path, archive: Archive | None = None) -> RolloutStatistics:
    """Counts the rollouts of a rollouts.jsonl, except guided ones, and copies them into an archive if one is given."""
    statistics = RolloutStatistics()
    refreshes = statistics.refreshes
    current, last_id, last_index = -1, "", -1
    for offset, line in lines_with_offsets(path):
        try:
            record, num_tokens = parse(line)
            if record.get("num_guide_tokens"):
                continue  # a test of the demonstrations, not of the policy alone
            step = int(record["weight_version"]) + int(record.get("policy_age", 0))
            problem_id, index = record["problem_id"], int(record["sample_index"])
            # The samples of a problem are written together and in order. A sample out of order shows that the refresh was repeated.
            is_known = step == current and problem_id in refreshes[step].visits
            is_again = is_known and (problem_id != last_id or index <= last_index)
            if step < current or is_again:
                for done_again in [s for s in refreshes if s >= step]:
                    statistics.num_repeated += refreshes.pop(done_again).num_rollouts
                if archive is not None:
                    archive.rollouts.discard_from(step)
            refreshes.setdefault(step, RefreshRollouts()).add(record, num_tokens, offset)
            current, last_id, last_index = step, problem_id, index
            if archive is not None:
                archive.add_rollout(step, record, num_tokens, _is_solved(record, num_tokens))
        except (ValueError, TypeError, KeyError):
            statistics.num_unreadable += 1
    return statistics


def _is_solved(record: dict[str, Any], num_tokens: int) -> bool | None:
    """Returns whether a rollout is complete and correct; None if it does not count as an attempt, or was not graded."""
    if record["verdict"] is None:
        return None
    outcome = num_tokens, str(record["finish_reason"]), record["verdict"]
    return counts_as_solved(*outcome) if counts_as_attempt(*outcome) else None


def parse(line: bytes) -> tuple[dict[str, Any], int]:
    """Parses a line of rollouts.jsonl without its arrays of token ids and log-probabilities, which take most of the time.

    Returns:
        The record with empty arrays, and the number of response tokens.

    Raises:
        ValueError: the line is not a rollout.
    """
    kept, num_tokens, position = [], None, 0
    for name in _ARRAYS:
        start = line.find(name, position)
        end = line.find(b"]", start)
        if start < 0 or end < 0:
            break
        begin = start + len(name)
        if name == b'"response_ids": [':
            num_tokens = line.count(b",", begin, end) + 1 if line[begin:end].strip() else 0
        kept.append(line[position:begin])
        position = end
    record = json.loads(b"".join([*kept, line[position:]]))
    if not isinstance(record, dict) or not isinstance(record.get("problem_id"), str):
        raise ValueError("not a rollout")
    return record, len(record["response_ids"]) if num_tokens is None else num_tokens


def rounded_length(num_tokens: int) -> int:
    """Rounds down to 6 significant bits, so that there are few counters. Below 64 nothing changes; above, at most 3 % is lost."""
    shift = max(0, num_tokens.bit_length() - 6)
    return num_tokens >> shift << shift


def course_of(history: list[tuple[int, Visit]]) -> Course:
    """Returns the course of a problem. Its history holds at least one refresh."""
    first, last = history[0][1], history[-1][1]
    if not any(visit.num_solved for _, visit in history):
        return "never solved"
    if not last.num_solved:
        return "lost"
    if not first.num_solved:
        return "newly solved"
    return "always solved" if all(visit.outcome == "always" for _, visit in history) else "sometimes solved"


def moves(histories: Iterable[list[tuple[int, Visit]]]) -> Counter[tuple[Outcome, Outcome]]:
    """Counts problems by their outcomes when first and when last sampled, for problems sampled in several refreshes."""
    counts: Counter[tuple[Outcome, Outcome]] = Counter()
    for history in histories:
        first, last = history[0][1].outcome, history[-1][1].outcome
        if len(history) > 1 and first is not None and last is not None:
            counts[first, last] += 1
    return counts


def pick_examples(
    path: Path,
    histories: dict[str, list[tuple[int, Visit]]],
    num_each: int,
    num_samples: int = 4,
    named: Sequence[str] = (),
) -> list[Example]:
    """Selects problems of every course: those whose ids have the smallest SHA-256, so that all reports show the same problems.

    Args:
        path: the rollouts.jsonl.
        histories: problem -> (step, counts), as ``RolloutStatistics.histories`` returns it.
        num_each: maximum number of problems of a course.
        num_samples: maximum samples of a problem in a refresh. No verdict is shown twice before all verdicts are shown.
        named: ids of problems that come first, with all samples of all refreshes.

    Raises:
        ValueError: a named problem has no rollouts.
    """
    examples = [_named_example(path, histories, problem_id) for problem_id in dict.fromkeys(named)]
    by_course: dict[Course, list[str]] = {course: [] for course in COURSES}
    for problem_id, history in histories.items():
        by_course[course_of(history)].append(problem_id)
    for course, ids in by_course.items():
        for problem_id in heapq.nsmallest(num_each, (i for i in ids if i not in named), key=_draw):
            history = histories[problem_id]
            shown = history if len(history) == 1 else [history[0], history[-1]]
            samples = [
                s
                for step, visit in shown
                for s in _choose_samples(path, problem_id, step, visit, num_samples)
            ]
            examples.append(Example(problem_id, course, history, samples))
    return examples


def _named_example(path: Path, histories: dict[str, list[tuple[int, Visit]]], problem_id: str) -> Example:
    history = histories.get(problem_id)
    if history is None:
        raise ValueError(
            f"--problems {problem_id}: {path} has no graded rollouts of this problem. Give ids that the page lists."
        )
    samples = [s for step, visit in history for s in _read_samples(path, problem_id, step, visit)]
    return Example(problem_id, course_of(history), history, samples)


def _draw(problem_id: str) -> bytes:
    return hashlib.sha256(problem_id.encode("utf-8", "surrogatepass")).digest()


def _choose_samples(path: Path, problem_id: str, step: int, visit: Visit, limit: int) -> list[Sample]:
    found = list(_read_samples(path, problem_id, step, visit))
    # Reversed, so that the first sample of each verdict is kept.
    firsts = {sample.verdict: place for place, sample in reversed(list(enumerate(found)))}
    chosen = sorted(firsts.values())[:limit]
    chosen += [place for place in range(len(found)) if place not in chosen][: limit - len(chosen)]
    return [found[place] for place in sorted(chosen)]


def _read_samples(path: Path, problem_id: str, step: int, visit: Visit) -> Iterator[Sample]:
    """Reads the samples of one problem, which are consecutive lines."""
    with path.open("rb") as file:
        file.seek(visit.offset)
        for _ in range(visit.num_samples):
            try:
                line = file.readline()
                record, num_tokens = parse(line)
                arrays = json.loads(line)
            except ValueError:
                continue
            if record["problem_id"] == problem_id:
                yield Sample(
                    step=step,
                    index=int(record["sample_index"]),
                    verdict=str(record["verdict"] or "unverified"),
                    reason=reason_of(record),
                    finish_reason=str(record["finish_reason"]),
                    filtered_by=str(record.get("filtered_by", "")),
                    weight=float(record.get("weight", 0.0)),
                    policy_age=int(record.get("policy_age", 0)),
                    num_tokens=num_tokens,
                    text=str(record["text"]),
                    prompt_ids=array("i", arrays.get("prompt_ids", [])),
                    response_ids=array("i", arrays.get("response_ids", [])),
                    logprobs=array("f", arrays.get("response_logprobs", [])),
                )
