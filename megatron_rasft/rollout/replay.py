"""Replays stored rollouts instead of sampling."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.store import read_rollout, scan_rollouts
from megatron_rasft.types import Rollout


class ReplayEngine:
    """Hands out each problem's stored rollouts, oldest first, starting over when they are used up.

    It keeps where they lie, not the rollouts.

    Args:
        paths: the stores.
        prompts: problem id -> prompt of the run. Rollouts of another prompt (another template or tokenizer) are not
            handed out.

    Raises:
        RolloutError: a store is missing or damaged, or they have nothing for any of these problems.
    """

    def __init__(self, paths: Sequence[str | Path], prompts: Mapping[str, Sequence[int]]) -> None:
        self._places: dict[str, list[tuple[Path, int]]] = {}
        stranger = changed = ""
        for path in map(Path, paths):
            for offset, rollout in scan_rollouts(path):
                prompt_ids = prompts.get(rollout.problem_id)
                if prompt_ids is None:
                    stranger = stranger or rollout.problem_id
                elif list(prompt_ids) != rollout.prompt_ids:
                    changed = changed or rollout.problem_id
                else:
                    self._places.setdefault(rollout.problem_id, []).append((path, offset))
        if not self._places:
            raise RolloutError(_nothing(", ".join(map(str, paths)), next(iter(prompts)), stranger, changed))

    @property
    def num_problems(self) -> int:
        """Problems of the run that have rollouts."""
        return len(self._places)

    def take(self, problem_id: str, num_samples: int, visit: int) -> list[Rollout]:
        """Rollouts for the ``visit``-th time this problem is sampled, fewer where the stores have fewer."""
        places = self._places.get(problem_id, [])
        start = visit * num_samples
        taken = []
        for index in range(min(num_samples, len(places))):
            rollout = read_rollout(*places[(start + index) % len(places)])
            rollout.sample_index = index
            taken.append(rollout)
        return taken


def _nothing(stores: str, mine: str, stranger: str, changed: str) -> str:
    """Why the stores have nothing for a run, and the way out."""
    if changed:
        return (
            f"--rollout-replay {stores}: every rollout of this run's problems, as {changed!r}, answers another prompt than "
            "the run's. Give the model's tokenizer, the chat template and --data-prompt-suffix that the store was made with."
        )
    if stranger:
        return (
            f"--rollout-replay {stores}: has rollouts of other problems only, as {stranger!r}, where this run has {mine!r}. "
            "A row without an id (--data-id-field) is called <file name>:<line>: give --train-data the file that the store "
            "was made from, under the name it had."
        )
    return f"--rollout-replay {stores}: is empty. Name the rollouts.jsonl of a run that sampled."
