"""Evidence about imitation: does the policy do better if it begins like the demonstration, above all where it fails?

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

    def add(self, groups: Iterable[RolloutGroup], memory: float, solved_share: float) -> None:
        """Adds the verified rollouts of a refresh.

        Args:
            memory: share of the earlier sums that is kept.
            solved_share: see ``gain``.
        """
        guided = [group for group in groups if group.guided]
        gains = [value for group in guided if (value := gain(group, solved_share)) is not None]
        self.num = memory * self.num + len(gains)
        self.total = memory * self.total + math.fsum(gains)
        self.squares = memory * self.squares + math.fsum(value * value for value in gains)

    @property
    def confidence(self) -> float | None:
        """Probability that the mean gain is above 0, by a normal distribution; None without evidence."""
        if self.num == 0:
            return None
        mean = self.total / self.num
        # Two problems with the gains 1 and -1 are added. Without them, equal gains of a few problems would give certainty.
        variance = max(0.0, self.squares / self.num - mean * mean) + 2 / self.num
        return 0.5 * (1 + math.erf(mean / math.sqrt(2 * variance / self.num)))

    def state_dict(self) -> list[float]:
        """The sums, as JSON values."""
        return [self.num, self.total, self.squares]


def gain(group: RolloutGroup, solved_share: float) -> float | None:
    """Estimate of (1 - s + solved_share s) (g - s), where s and g are the solve rates without and with a guide.

    A problem counts fully as often as the policy fails in it, and with ``solved_share`` as often as it succeeds. The rate s beside an
    attempt is that of the other attempts. So the estimate has no bias, although the same attempts say where the policy fails.

    Args:
        solved_share: weight of a success, 0 .. 1.

    Returns:
        None with fewer than two attempts, or without a guided one.
    """
    solved, attempts = count_solved(group.rollouts)
    guided_solved, guided_attempts = count_solved(group.guided)
    if attempts < 2 or not guided_attempts:
        return None
    guided_rate, others = guided_solved / guided_attempts, attempts - 1
    in_failures = (1 - solved / attempts) * (guided_rate - solved / others)
    in_successes = solved / attempts * (guided_rate - max(0.0, solved - 1) / others)
    return in_failures + solved_share * in_successes
