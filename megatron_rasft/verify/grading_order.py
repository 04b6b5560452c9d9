"""Which rollout is graded next, and which are given up because the gradings before them hang."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Literal

from megatron_rasft.types import Rollout

Turn = Literal["grade", "wait", "give up", "give up all"]

GIVEN_UP = "not graded: "
"""Start of ``verdict_reason`` of a rollout that was given up."""


class GradingOrder:
    """The order in which the rollouts of one call are graded, and the rules that give rollouts up.

    The problems take turns: first the first rollout of every problem, then the second of every problem. There are two rules:

    - A rollout is given up if the ``max_in_a_row`` rollouts before it, of the same problem, all exceeded the deadline or were
      given up themselves.
    - In the last round, a rollout is given up if ``max_in_call`` rollouts before it exceeded the deadline.

    Both look only at rollouts that come earlier, and the order does not depend on which grading ends first. So the same
    rollouts are given up with any number of workers.
    """

    def __init__(self, rollouts: Iterable[Rollout], max_in_a_row: int, max_in_call: int) -> None:
        self._max_in_a_row = max_in_a_row
        self._max_in_call = max_in_call
        self._places: dict[int, tuple[int, int]] = {}
        """id of a rollout -> its number among the rollouts of its problem, and among all."""
        seen: Counter[str] = Counter()
        for number, rollout in enumerate(rollouts):
            self._places[id(rollout)] = seen[rollout.problem_id], number
            seen[rollout.problem_id] += 1
        self._in_time: defaultdict[str, set[int]] = defaultdict(set)
        self._late: defaultdict[str, set[int]] = defaultdict(set)
        self._num_timeouts = 0
        self._queue: deque[Rollout] = deque()
        self._is_last_round = False

    def start_round(self, rollouts: Iterable[Rollout], is_last: bool) -> None:
        """Queues rollouts. Forgets which were late in the round before: they may be in time with a longer deadline.

        Args:
            rollouts: in the order of the call.
            is_last: whether a late rollout has exceeded its whole deadline.
        """
        self._late.clear()
        self._is_last_round = is_last
        self._queue = deque(self._sorted(rollouts))

    def __bool__(self) -> bool:
        return bool(self._queue)

    def turn(self, num_in_flight: int) -> Turn:
        """Returns what to do with the first rollout of the queue. "wait" does not occur if nothing is in flight."""
        rollout = self._queue[0]
        place, in_time = self._places[id(rollout)][0], self._in_time[rollout.problem_id]
        before = range(place - self._max_in_a_row, place)
        if before.start >= 0 and not in_time.intersection(before):
            return "give up" if self._late[rollout.problem_id].issuperset(before) else "wait"
        if self._is_last_round and self._num_timeouts + num_in_flight >= self._max_in_call:
            return "wait" if num_in_flight else "give up all"
        return "grade"

    def take(self) -> Rollout:
        """Removes the first rollout from the queue."""
        return self._queue.popleft()

    def put_back(self, rollouts: Iterable[Rollout]) -> None:
        """Queues rollouts again that were taken and have no result, in front of the others."""
        self._queue.extendleft(reversed(self._sorted(rollouts)))

    def settle(self, rollout: Rollout, is_late: bool) -> None:
        """Notes that a rollout was graded in time, or that it was late."""
        places = self._late if is_late else self._in_time
        places[rollout.problem_id].add(self._places[id(rollout)][0])
        self._num_timeouts += is_late and self._is_last_round

    def give_up(self) -> Rollout:
        """Removes the first rollout from the queue. It counts as late for the rollouts after it."""
        rollout = self.take()
        self._late[rollout.problem_id].add(self._places[id(rollout)][0])
        return rollout

    def _sorted(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        return sorted(rollouts, key=lambda rollout: self._places[id(rollout)])
