"""One run with everything that the page shows of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.rollouts import Example, RolloutStatistics


@dataclass
class Problem:
    """A problem's texts in the training data."""

    text: str
    response: str
    """The demonstration."""
    check: str
    """The gold answer or the tests."""


@dataclass
class RunView:
    """One run with everything that the page shows of it."""

    records: RunRecords
    rollouts: RolloutStatistics | None = None
    """None if the run has no stored rollouts."""
    examples: list[Example] = field(default_factory=list)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    """Problem id -> texts. Holds the examples whose texts were found."""
    notes: list[str] = field(default_factory=list)
    """Missing or damaged inputs, listed at the top of the page."""

    @property
    def name(self) -> str:
        return self.records.name
