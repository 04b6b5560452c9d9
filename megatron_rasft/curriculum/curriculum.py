"""The curriculum: which problems come next, which of them get rollouts, and how often each has been solved.

Rank 0 only. Every random choice uses a new generator, seeded by the run's seed and the purpose of the choice. The state
therefore holds no generator, and a resumed run makes the same choices as an uninterrupted run.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rasft.config.curriculum import CurriculumConfig
from megatron_rasft.curriculum.difficulty import Route, Thresholds, calibrate_thresholds, route_difficulty
from megatron_rasft.errors import CheckpointError

STATE_VERSION = 1
"""Format of ``Curriculum.state_dict``. Increase it when the format changes."""


@dataclass(frozen=True, slots=True)
class Solvability:
    """One problem's solve rate over all refreshes so far. Each refresh discounts the samples of earlier refreshes."""

    solve_rate: float
    """Discounted number of correct samples / ``num_samples``."""
    num_samples: float
    """Discounted number of samples, usually not an integer."""
    refresh: int
    """Number of the refresh that sampled the problem last."""
    num_refreshes: int
    """How many refreshes have sampled the problem."""


def middle_count(share: float, size: int) -> int:
    """The number of middle problems to sample: ``share * size`` rounded up, as in the published script."""
    return math.ceil(share * size)


def hard_count(share: float, size: int) -> int:
    """The number of hard problems to sample: ``share * size`` rounded down, but at least 1 unless ``share`` or ``size`` is 0."""
    return min(size, max(1, math.floor(share * size))) if share > 0 else 0


class Curriculum:
    """Goes through the problems epoch by epoch, each once per epoch, and chooses those that get rollouts.

    One refresh calls ``next_problems``, in mode band ``route`` with the problems' difficulties, ``choose_for_rollouts``, and
    ``record`` for each sampled problem once its rollouts are verified. ``remembered`` returns the discounted record
    so far: call it before ``record`` to get the record of earlier refreshes only.

    Args:
        problem_ids: all problems of the run, each once, in the order of the data.
        config: the curriculum's flags.
        seed: --data-seed. Orders, calibration sample and choices depend on it.
        memory: --weighting-memory, 0 .. 1: the factor by which a refresh discounts the samples of earlier refreshes.
        content: hash of the problems' rows. A checkpoint of other rows with the same ids is refused.
    """

    def __init__(
        self,
        problem_ids: Sequence[str],
        config: CurriculumConfig,
        *,
        seed: int,
        memory: float = 0.5,
        content: str = "",
    ) -> None:
        self._problem_ids = tuple(problem_ids)
        self._known = frozenset(self._problem_ids)
        if not self._problem_ids:
            raise ValueError("the curriculum needs at least one problem, got none: check --train-data.")
        if len(self._known) < len(self._problem_ids):
            raise ValueError(
                f"problem ids must be unique: {len(self._problem_ids) - len(self._known)} of "
                f"{len(self._problem_ids)} repeat an earlier id."
            )
        if not 0 <= memory <= 1:
            raise ValueError(f"--weighting-memory is a share, 0 .. 1, got {memory}.")
        self._config = config
        self._seed = seed
        self._memory = memory
        self._epoch = 0
        self._cursor = 0
        self._refresh = 0
        self._thresholds: Thresholds | None = None
        self._solvability: dict[str, Solvability] = {}
        self._hard_pool: dict[str, None] = {}  # a dictionary, used as a set that keeps the order of insertion
        self._order = self._shuffled(f"epoch {self._epoch}")
        self._fingerprint = problems_fingerprint(self._problem_ids, content)

    @property
    def epoch(self) -> int:
        """Epoch of the last refresh's problems, from 0."""
        return self._epoch

    @property
    def num_remaining(self) -> int:
        """Number of problems left in this epoch; if 0, the next refresh begins a new epoch."""
        return len(self._order) - self._cursor

    @property
    def refresh(self) -> int:
        """Number of refreshes so far, counted by ``next_problems``."""
        return self._refresh

    @property
    def thresholds(self) -> Thresholds | None:
        """The difficulties that separate the routes; None until ``calibrate``."""
        return self._thresholds

    @property
    def hard_pool(self) -> tuple[str, ...]:
        """Problems that were hard when they were last scored, in the order in which they became hard."""
        return tuple(self._hard_pool)

    @property
    def solvability(self) -> Mapping[str, Solvability]:
        """Problem -> its record, for every problem that has been sampled."""
        return self._solvability

    # ---- calibration

    def calibration_sample(self) -> list[str]:
        """The problems whose difficulties fix the thresholds; they depend on the seed and the problems only."""
        return self._shuffled("calibration")[: self._config.curriculum_calibration_rows]

    def calibrate(self, difficulties: Iterable[float]) -> None:
        """Sets the thresholds from the difficulties of the calibration sample, nats per token."""
        self._thresholds = calibrate_thresholds(difficulties, self._config)

    # ---- one refresh

    def next_problems(self, num_problems: int) -> list[str]:
        """Returns the next ``num_problems`` problems of this epoch, or fewer at its end, but at least one.

        A new epoch begins, in a new order, when the last epoch has no problems left.
        """
        if num_problems < 1:
            raise ValueError(f"a refresh needs at least one problem, got {num_problems}.")
        if self._cursor == len(self._order):
            self._epoch += 1
            self._cursor = 0
            self._order = self._shuffled(f"epoch {self._epoch}")
        problem_ids = self._order[self._cursor : self._cursor + num_problems]
        self._cursor += len(problem_ids)
        self._refresh += 1
        return problem_ids

    def route(self, difficulties: Mapping[str, float], progress: float) -> dict[str, Route]:
        """Returns each problem's route, and updates the hard pool.

        Args:
            difficulties: problem -> mean cross-entropy of its demonstration under the current policy, nats per token.
            progress: share of the training steps done, 0 .. 1.

        Raises:
            ValueError: a difficulty is not finite, or a problem is unknown.
        """
        assert self._thresholds is not None, "call calibrate() before route()"
        for problem_id, difficulty in difficulties.items():
            self._check_known(problem_id)
            if not math.isfinite(difficulty):
                raise ValueError(
                    f"problem {problem_id!r} has difficulty {difficulty}: the policy's loss on it is not finite."
                )
        routes: dict[str, Route] = {}
        for problem_id, difficulty in difficulties.items():
            route = route_difficulty(difficulty, self._thresholds, progress)
            routes[problem_id] = route
            if route == "hard":
                self._hard_pool.setdefault(problem_id)
            else:
                self._hard_pool.pop(problem_id, None)
        return routes

    def choose_for_rollouts(self, routes: Mapping[str, Route]) -> list[str]:
        """The problems that get rollouts at this refresh, each once. A second call within a refresh returns the same.

        - Mode all: every problem of the refresh, whatever its route.
        - Mode off: no problem.
        - Mode band: a random share of the middle problems, in the order of the refresh. Then a share of the hard pool, where
          the problems that were not sampled for longest come first. A hard problem that the refresh does not train is only
          probed: its record counts when it is trained next.

        Args:
            routes: the problems of this refresh -> their routes.
        """
        if self._config.curriculum_mode == "off":
            return []
        if self._config.curriculum_mode == "all":
            return list(routes)
        middle = [problem_id for problem_id, route in routes.items() if route == "middle"]
        # Positions are drawn, not problems, so that sorting them restores the order of the refresh.
        positions = self._random(f"middle {self._refresh}").sample(
            range(len(middle)), middle_count(self._config.curriculum_middle_frac, len(middle))
        )
        # sorted() is stable: problems that were last sampled at the same refresh keep the order of the pool.
        by_staleness = sorted(self._hard_pool, key=self._last_sampled)
        num_hard = hard_count(self._config.curriculum_hard_frac, len(by_staleness))
        return [middle[position] for position in sorted(positions)] + by_staleness[:num_hard]

    def record(self, problem_id: str, num_correct: float, num_samples: int) -> None:
        """Adds the verified rollouts of this refresh to a problem's record. Without samples the record does not change.

        Args:
            num_correct: solved attempts, or the sum of their rewards.
            num_samples: attempts.
        """
        self._check_known(problem_id)
        if not 0 <= num_correct <= num_samples:
            raise ValueError(
                f"problem {problem_id!r}: num_correct must lie in 0 .. num_samples = {num_samples}, "
                f"got {num_correct}."
            )
        if num_samples == 0:
            return  # every rollout failed, so there is no evidence
        correct, samples, count = float(num_correct), float(num_samples), 1
        remembered = self.remembered(problem_id)
        if remembered is not None:
            solve_rate, kept = remembered
            correct += kept * solve_rate
            samples += kept
            count += self._solvability[problem_id].num_refreshes
        # At most 1 also when rounded, because rounding never changes an order.
        solve_rate = correct / samples
        self._solvability[problem_id] = Solvability(solve_rate, samples, self._refresh, count)

    def remembered(self, problem_id: str) -> tuple[float, float] | None:
        """The earlier record to which the next rollouts of a problem are added; None if it was never sampled.

        Returns:
            Solve rate, and the number of samples discounted by ``memory``. This is the only place that discounts.
        """
        past = self._solvability.get(problem_id)
        return None if past is None else (past.solve_rate, self._memory * past.num_samples)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state on which later choices depend, besides problems and flags, as JSON values."""
        return {
            "version": STATE_VERSION,
            "problems": self._fingerprint,
            "seed": self._seed,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "refresh": self._refresh,
            "thresholds": None if self._thresholds is None else asdict(self._thresholds),
            "hard_pool": list(self._hard_pool),
            # dataclasses.astuple would copy deeply, which takes three times as long.
            "solvability": {
                problem_id: [s.solve_rate, s.num_samples, s.refresh, s.num_refreshes]
                for problem_id, s in self._solvability.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict()``, with the seed of the run that made it.

        Raises:
            CheckpointError: the state has another format or belongs to other problems. The curriculum is then unchanged.
        """
        check_state(state, self._fingerprint)
        self._seed = state["seed"]
        self._epoch = state["epoch"]
        self._cursor = state["cursor"]
        self._refresh = state["refresh"]
        self._thresholds = None if state["thresholds"] is None else Thresholds(**state["thresholds"])
        self._hard_pool = dict.fromkeys(state["hard_pool"])
        self._solvability = {problem_id: Solvability(*s) for problem_id, s in state["solvability"].items()}
        self._order = self._shuffled(f"epoch {self._epoch}")

    # ---- internal

    def _random(self, purpose: str) -> random.Random:
        # random.Random hashes a text seed with SHA-512, so the numbers are the same on every machine, for any PYTHONHASHSEED.
        return random.Random(f"curriculum {self._seed} {purpose}")

    def _shuffled(self, purpose: str) -> list[str]:
        order = list(self._problem_ids)
        self._random(purpose).shuffle(order)
        return order

    def _last_sampled(self, problem_id: str) -> int:
        past = self._solvability.get(problem_id)
        return -1 if past is None else past.refresh

    def _check_known(self, problem_id: str) -> None:
        if problem_id not in self._known:
            raise ValueError(f"problem {problem_id!r} is not among the {len(self._known)} of this run.")


def check_state(state: Mapping[str, Any], fingerprint: str) -> None:
    """Refuses a state that a curriculum of these problems cannot continue.

    Args:
        state: ``Curriculum.state_dict()``.
        fingerprint: ``problems_fingerprint`` of the problems.

    Raises:
        CheckpointError: the state has another format or belongs to other problems.
    """
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"the checkpoint's curriculum has format {state.get('version')!r}, and this program reads format "
            f"{STATE_VERSION}. Resume with the program version that wrote it."
        )
    if state["problems"] != fingerprint:
        raise CheckpointError(
            f"the checkpoint's problems ({state['problems']}) differ from those of --train-data ({fingerprint}) in their number, "
            "order, text, answers, tests or prompts. Resume with the same data and --data flags, or start a new run from the "
            "checkpoint's weights."
        )


def problems_fingerprint(problem_ids: Sequence[str], content: str) -> str:
    """Identifies the problems, their order, and the hash of their rows, if there is one."""
    digest = hashlib.sha256()
    for part in (*problem_ids, *filter(None, [content])):
        encoded = part.encode("utf-8", "surrogatepass")
        # Each part is preceded by its length, so that two lists of ids cannot give the same bytes.
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return f"{len(problem_ids)} problems, {digest.hexdigest()[:16]}"
