"""The curriculum's state machine: which problems come next, which of them get rollouts, what is remembered.

Runs on rank 0 only. Every random choice is drawn from a generator seeded by what it is for, so the state is a
handful of numbers and a resumed run chooses as the unbroken one would have.
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


@dataclass(frozen=True, slots=True)
class Solvability:
    """What the rollouts of one problem have shown so far."""

    share_correct: float
    """Correct over sampled, earlier refreshes discounted."""
    num_samples: float
    """Samples the share rests on, earlier refreshes discounted, so not a whole number."""
    refresh: int
    """Refresh at which the problem was last sampled."""
    num_refreshes: int
    """Refreshes at which the problem was sampled."""


def round_share(share: float, size: int) -> int:
    """How many of ``size`` things a share is: to the nearest, halves up, at least 1 unless the share is 0."""
    if share <= 0 or size <= 0:
        return 0
    return min(size, max(1, math.floor(share * size + 0.5)))


class Curriculum:
    """Walks the problems epoch by epoch, each exactly once per epoch, and chooses those that get rollouts.

    One refresh is: ``next_window``; ``route`` with fresh difficulties (mode ``window`` only);
    ``choose_for_rollouts``; and, once verified, ``record`` for each chosen problem. ``remembered`` gives the
    evidence on a problem so far: ask before recording, to have what is known from earlier refreshes alone.

    Args:
        problem_ids: all problems of the run, each once, in the order of the data.
        config: the curriculum's flags.
        seed: the run's seed; orders, the calibration sample and choices depend on it and on nothing else.
        memory: share of earlier sample counts that is kept when new ones are recorded, 0 .. 1
            (--weighting-memory, which belongs to another room).
    """

    def __init__(
        self, problem_ids: Sequence[str], config: CurriculumConfig, *, seed: int, memory: float = 0.5
    ) -> None:
        self._problem_ids = tuple(problem_ids)
        self._known = frozenset(self._problem_ids)
        if not self._problem_ids:
            raise ValueError("the curriculum needs at least one problem, got none: check --train-data.")
        if len(self._known) < len(self._problem_ids):
            raise ValueError(
                f"problem ids must be unique: {len(self._problem_ids) - len(self._known)} of "
                f"{len(self._problem_ids)} repeat an earlier one."
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
        self._hard_pool: dict[str, None] = {}  # an ordered set: oldest member first
        self._order = self._shuffled(f"epoch {self._epoch}")
        self._fingerprint = _fingerprint(self._problem_ids)

    @property
    def epoch(self) -> int:
        """Epoch of the last window handed out, from 0."""
        return self._epoch

    @property
    def num_remaining(self) -> int:
        """Problems of this epoch that no window has held yet; 0 means the next window opens a new epoch."""
        return len(self._order) - self._cursor

    @property
    def refresh(self) -> int:
        """Windows handed out so far."""
        return self._refresh

    @property
    def thresholds(self) -> Thresholds | None:
        """None until calibrated."""
        return self._thresholds

    @property
    def hard_pool(self) -> tuple[str, ...]:
        """Problems that were hard when last scored, oldest first."""
        return tuple(self._hard_pool)

    @property
    def solvability(self) -> Mapping[str, Solvability]:
        """Memory of every problem sampled so far."""
        return self._solvability

    # ---- calibration

    def calibration_sample(self) -> list[str]:
        """Problems to score with the initial policy, the same for one seed and one data set."""
        return self._shuffled("calibration")[: self._config.curriculum_calibration_rows]

    def calibrate(self, difficulties: Iterable[float]) -> None:
        """Fixes the thresholds from the calibration sample's difficulties, in nats per token."""
        self._thresholds = calibrate_thresholds(difficulties, self._config)

    # ---- one refresh

    def next_problems(self, num_problems: int) -> list[str]:
        """The next problems of the epoch, at most ``num_problems`` and fewer where the epoch ends.

        Starts the next epoch, in a new order, when the last one is used up; never returns an empty list.
        """
        if num_problems < 1:
            raise ValueError(f"a window holds at least one problem, got {num_problems}.")
        if self._cursor == len(self._order):
            self._epoch += 1
            self._cursor = 0
            self._order = self._shuffled(f"epoch {self._epoch}")
        window = self._order[self._cursor : self._cursor + num_problems]
        self._cursor += len(window)
        self._refresh += 1
        return window

    def route(self, difficulties: Mapping[str, float], progress: float) -> dict[str, Route]:
        """Routes problems by the difficulty they have now, and brings the hard pool up to date.

        Args:
            difficulties: problem -> mean cross-entropy under the current policy, nats per token, finite.
            progress: share of the training steps done, 0 .. 1.
        """
        assert self._thresholds is not None, "the curriculum is routed only after calibrate()"
        for problem_id, difficulty in difficulties.items():
            self._check_known(problem_id)
            if not math.isfinite(difficulty):
                raise ValueError(
                    f"problem {problem_id!r} has difficulty {difficulty}: the policy's loss is broken."
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
        """The problems to sample at this refresh, each once.

        - all: every problem of the window, whatever its route.
        - window: a random share of the middle ones, in window order, then a share of the hard pool, those not
          sampled for longest first. A pool problem outside the window is only probed: what it shows waits in
          memory until the problem is next trained.
        - off: none.

        Asking again within the same refresh gives the same answer.
        """
        if self._config.curriculum_mode == "off":
            return []
        if self._config.curriculum_mode == "all":
            return list(routes)
        middle = [problem_id for problem_id, route in routes.items() if route == "middle"]
        positions = self._random(f"middle {self._refresh}").sample(
            range(len(middle)), round_share(self._config.curriculum_middle_frac, len(middle))
        )
        by_staleness = sorted(self._hard_pool, key=self._last_sampled)  # stable: ties keep the pool's order
        num_hard = round_share(self._config.curriculum_hard_frac, len(by_staleness))
        return [middle[position] for position in sorted(positions)] + by_staleness[:num_hard]

    def record(self, problem_id: str, num_correct: int, num_samples: int) -> None:
        """Adds one refresh's verified rollouts to the memory; no samples (all failed) change nothing."""
        self._check_known(problem_id)
        if not 0 <= num_correct <= num_samples:
            raise ValueError(
                f"problem {problem_id!r}: num_correct must lie in 0 .. num_samples = {num_samples}, "
                f"got {num_correct}."
            )
        if num_samples == 0:
            return
        correct, samples, count = float(num_correct), float(num_samples), 1
        past = self._solvability.get(problem_id)
        if past is not None:
            kept = self._memory * past.num_samples
            correct += kept * past.share_correct
            samples += kept
            count += past.num_refreshes
        share = min(1.0, correct / samples)
        self._solvability[problem_id] = Solvability(share, samples, self._refresh, count)

    def remembered(self, problem_id: str) -> tuple[float, float] | None:
        """(share correct, number of samples it rests on) so far, or None if the problem was never sampled."""
        past = self._solvability.get(problem_id)
        return None if past is None else (past.share_correct, past.num_samples)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything the future depends on besides the problems and the flags; made of JSON's types only."""
        return {
            "version": STATE_VERSION,
            "problems": self._fingerprint,
            "seed": self._seed,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "refresh": self._refresh,
            "thresholds": None if self._thresholds is None else asdict(self._thresholds),
            "hard_pool": list(self._hard_pool),
            # astuple copies deeply and takes three times as long
            "solvability": {
                problem_id: [s.share_correct, s.num_samples, s.refresh, s.num_refreshes]
                for problem_id, s in self._solvability.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken, with the seed of that run.

        Raises:
            CheckpointError: the state is of another format or was taken with other problems. Nothing changes.
        """
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"the checkpoint's curriculum has format {state.get('version')!r}, this version reads "
                f"{STATE_VERSION}: resume with the version that wrote it."
            )
        if state["problems"] != self._fingerprint:
            raise CheckpointError(
                f"the checkpoint was trained on other problems ({state['problems']}) than --train-data holds "
                f"({self._fingerprint}): resume with the same data, or start a new run from its weights."
            )
        self._seed = state["seed"]
        self._epoch = state["epoch"]
        self._cursor = state["cursor"]
        self._refresh = state["refresh"]
        self._thresholds = None if state["thresholds"] is None else Thresholds(**state["thresholds"])
        self._hard_pool = dict.fromkeys(state["hard_pool"])
        self._solvability = {problem_id: Solvability(*s) for problem_id, s in state["solvability"].items()}
        self._order = self._shuffled(f"epoch {self._epoch}")

    # ---- inside

    def _random(self, purpose: str) -> random.Random:
        # Seeding with text goes through SHA-512: the same on every machine and independent of PYTHONHASHSEED.
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


def _fingerprint(problem_ids: Sequence[str]) -> str:
    """Names the problems and their order."""
    digest = hashlib.sha256()
    for problem_id in problem_ids:
        encoded = problem_id.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return f"{len(problem_ids)} problems, {digest.hexdigest()[:16]}"
