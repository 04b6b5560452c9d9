"""How a run goes through its problems: its refreshes, and the problems that its steps do not reach."""

from dataclasses import dataclass

from megatron_rasft.wording import counted


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a whole run."""

    num_problems: int
    """Problems of --train-data."""
    batch_size: int
    """Problems of a step; the last step of an epoch may have fewer."""
    num_steps: int
    refreshes: tuple[int, ...]
    """Number of steps before each refresh."""
    num_visits: int
    """Problems of all steps together. A problem counts once for each time that it is trained on."""

    @classmethod
    def of(cls, num_problems: int, batch_size: int, num_steps: int, interval: int) -> "Schedule":
        """Follows ``Refresh.next_problems``: a refresh covers ``interval`` steps, and ends with its epoch or with the run."""
        refreshes: list[int] = []
        step = visits = place = 0
        while step < num_steps:
            place = 0 if place == num_problems else place
            num = min(batch_size * min(interval, num_steps - step), num_problems - place)
            refreshes.append(step)
            step += -(-num // batch_size)
            place += num
            visits += num
        return cls(
            num_problems=num_problems,
            batch_size=batch_size,
            num_steps=num_steps,
            refreshes=tuple(refreshes),
            num_visits=visits,
        )

    def left_out(self) -> str:
        """Returns a console line about problems that are never trained on; "" if there are none."""
        num = self.num_problems - self.num_visits
        if num <= 0:
            return ""
        return (
            f"warning: the run never trains on {num} of {counted(self.num_problems, 'problem')}, because it ends after "
            f"{counted(self.num_steps, 'step')} of {self.batch_size}. --train-iters {-(-self.num_problems // self.batch_size)} reaches "
            "all of them."
        )
