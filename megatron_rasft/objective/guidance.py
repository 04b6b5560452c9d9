"""Evidence about imitation: where the policy fails, does it do better if it begins like the demonstration?

Guided rollouts continue the beginning of a demonstration. Their solve rate is compared with that of the rollouts of the prompt alone,
problem by problem.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rasft.objective.groups import count_solved
from megatron_rasft.types import RolloutGroup


@dataclass
class Guidance:
    """Discounted sums of ``gain`` over the problems of all refreshes."""

    num: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, groups: Iterable[RolloutGroup], memory: float) -> None:
        """Adds the verified rollouts of a refresh.

        Args:
            memory: share of the earlier sums that is kept.
        """
        gains = [value for group in groups if (value := gain(group)) is not None]
        self.num = memory * self.num + len(gains)
        self.total = memory * self.total + math.fsum(gains)
        self.squares = memory * self.squares + math.fsum(value * value for value in gains)

    @property
    def confidence(self) -> float | None:
        """Probability that the mean gain is above 0, by a normal distribution; None without evidence."""
        if self.num == 0:
            return None
        mean = self.total / self.num
        # With one problem more whose gain is 1 and one whose gain is -1, so that equal gains do not make it certain.
        variance = max(0.0, self.squares / self.num - mean * mean) + 2 / self.num
        return 0.5 * (1 + math.erf(mean / math.sqrt(2 * variance / self.num)))

    def state_dict(self) -> list[float]:
        """The sums, as JSON values."""
        return [self.num, self.total, self.squares]


def gain(group: RolloutGroup) -> float | None:
    """Estimate of (1 - s) (g - s), where s and g are the solve rates without and with a guide; None with too few attempts.

    A problem counts as much as the policy fails in it. The rate s beside a failed attempt is that of the other attempts, so the estimate
    has no bias, although the same attempts say where the policy fails.
    """
    solved, attempts = count_solved(group.rollouts)
    guided_solved, guided_attempts = count_solved(group.guided)
    if attempts < 2 or not guided_attempts:
        return None
    return (1 - solved / attempts) * (guided_solved / guided_attempts - solved / (attempts - 1))
