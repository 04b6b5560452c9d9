"""Replays stored rollouts instead of sampling."""

from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from pathlib import Path

from megatron_rasft.rollout.store import read_rollouts
from megatron_rasft.types import Rollout


class ReplayEngine:
    """Hands out each problem's stored rollouts, oldest first, starting over when they are used up."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._stored: dict[str, list[Rollout]] = defaultdict(list)
        for path in paths:
            for rollout in read_rollouts(path):
                self._stored[rollout.problem_id].append(rollout)

    def take(self, problem_id: str, prompt_ids: list[int], num_samples: int, visit: int) -> list[Rollout]:
        """Rollouts for the ``visit``-th time this problem is sampled, fewer where the store has fewer.

        Stored rollouts of another prompt (another template or tokenizer) are not handed out.
        """
        usable = [r for r in self._stored[problem_id] if r.prompt_ids == prompt_ids]
        if not usable:
            return []
        start = visit * num_samples
        taken = [copy(usable[(start + i) % len(usable)]) for i in range(min(num_samples, len(usable)))]
        for index, rollout in enumerate(taken):
            rollout.sample_index = index
        return taken
