"""--rollout-engine replay: takes rollouts from stores of earlier runs instead of sampling them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.store import read_rollout, scan_rollouts
from megatron_rasft.types import Rollout


class ReplayEngine:
    """Returns the stored rollouts of each problem in turn, oldest first. After the last it starts again from the first.

    Memory holds the file positions of the rollouts, not the rollouts.

    Args:
        paths: the stores; their rollouts are returned in this order.
        prompts: problem id -> prompt in this run. A rollout that answers another prompt, because it was sampled with another
            template or tokenizer, is left out.

    Raises:
        RolloutError: a store is missing or damaged, or the stores have no rollout for any of these problems.
    """

    def __init__(self, paths: Sequence[str | Path], prompts: Mapping[str, Sequence[int]]) -> None:
        self._positions: dict[tuple[str, bool], list[tuple[Path, int]]] = {}
        """Problem and whether the rollouts are guided -> store and offset of each."""
        # One example of each, for the error message.
        unknown_problem = other_prompt = ""
        for path in map(Path, paths):
            for offset, rollout in scan_rollouts(path):
                prompt_ids = prompts.get(rollout.problem_id)
                if prompt_ids is None:
                    unknown_problem = unknown_problem or rollout.problem_id
                elif list(prompt_ids) != rollout.prompt_ids:
                    other_prompt = other_prompt or rollout.problem_id
                else:
                    kind = rollout.problem_id, rollout.num_guide_tokens > 0
                    self._positions.setdefault(kind, []).append((path, offset))
        if not self._positions:
            raise RolloutError(
                _explain_empty(", ".join(map(str, paths)), next(iter(prompts)), unknown_problem, other_prompt)
            )

    @property
    def num_problems(self) -> int:
        """Problems of this run that have stored rollouts."""
        return len({problem_id for problem_id, _ in self._positions})

    def take(self, problem_id: str, num_samples: int, visit: int, is_guided: bool = False) -> list[Rollout]:
        """Returns at most ``num_samples`` rollouts of a problem, without repeats.

        Args:
            visit: how many refreshes have sampled the problem before. The next visit continues after this visit's rollouts.
            is_guided: whether to return guided rollouts, or those of the prompt alone.
        """
        positions = self._positions.get((problem_id, is_guided), [])
        start = visit * num_samples
        taken = []
        for index in range(min(num_samples, len(positions))):
            rollout = read_rollout(*positions[(start + index) % len(positions)])
            rollout.sample_index = index
            taken.append(rollout)
        return taken


def _explain_empty(stores: str, own_problem: str, unknown_problem: str, other_prompt: str) -> str:
    """The error message for stores without a usable rollout.

    Args:
        own_problem: id of a problem of this run.
        unknown_problem: id of a stored problem that this run does not have; "" if there is none.
        other_prompt: id of a problem of this run with another prompt in the store; "" if there is none.
    """
    if other_prompt:
        return (
            f"--rollout-replay {stores}: the stored rollouts of this run's problems, such as {other_prompt!r}, answer other "
            "prompts than this run's. Use the tokenizer, the chat template and the --data-prompt-suffix of the run that wrote the store."
        )
    if unknown_problem:
        return (
            f"--rollout-replay {stores}: all rollouts are of other problems, such as {unknown_problem!r}; this run has for "
            f"example {own_problem!r}. A row without an id (--data-id-field) is called <file name>:<line>, so use the --train-data "
            "file of the run that wrote the store, under the same name."
        )
    return f"--rollout-replay {stores}: contains no rollouts. Give the rollouts.jsonl of a run that sampled rollouts."
