"""Section "Examples": some problems with their demonstrations and rollouts."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_rasft.tools.report.rollouts import Course, Example, Sample
from megatron_rasft.tools.report.tokens import MAX_TOKENS
from megatron_rasft.tools.report.views import Problem, RunView

MAX_VISITS = 8
"""Maximum number of refreshes whose numbers of correct samples are listed. Earlier refreshes are left out."""


@dataclass(frozen=True)
class Item:
    """A problem of the section, with its texts and rollouts."""

    example: Example
    problem: Problem | None
    """Texts of the problem; None if they were not found."""
    refreshes: list[tuple[int, int, list[Sample]]]
    """(step, number of samples, samples to print)."""


def examples(view: RunView) -> dict[str, Any]:
    """Returns the examples of a run, and the courses that they represent."""
    items = [_item(example, view.problems.get(example.problem_id)) for example in view.examples]
    courses: list[Course] = list(dict.fromkeys(example.course for example in view.examples))
    return {
        "items": items,
        "courses": courses,
        "num_samples": sum(len(example.samples) for example in view.examples),
        "num_problems": len(view.rollouts.histories()) if view.rollouts else 0,
        "num_rollouts": view.rollouts.num_rollouts if view.rollouts else 0,
        "max_visits": MAX_VISITS,
        "tokens": view.tokens,
        "max_tokens": MAX_TOKENS,
    }


def _item(example: Example, problem: Problem | None) -> Item:
    num_samples = {step: visit.num_samples for step, visit in example.history}
    by_step = groupby(example.samples, key=lambda sample: sample.step)
    return Item(example, problem, [(step, num_samples[step], list(samples)) for step, samples in by_step])
