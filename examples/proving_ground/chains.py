"""Problems that are solved step by step: arithmetic on a clock, and operations on a short tape of digits.

A problem is a start value and labelled steps. A terse solution holds the values only, a spelled one holds a sentence for each step.

    clock     3 a+4 b*2 c-5       terse:   749 \\boxed{49}            every value is taken modulo 10
    tape      385 a+2 b~ c<       spelled: then a 385+2=507. then b 507~=705. then c 705<=057. so the answer is \\boxed{057}

A family of problems has one operation that the base model has only seen with random results. The expert explains it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LABELS = "abcdefghijklm"


@dataclass(frozen=True)
class Family:
    """How the problems of a family are made."""

    operations: str
    """The operations that the base model knows, one character each."""
    takes_number: str
    """Those of them that are followed by a digit."""
    new: str
    """The operation that it does not know. Takes a digit."""
    draw_start: Callable[[random.Random], str]
    apply: Callable[[str, str, str], str]
    """(value, operation, digit or "") -> next value."""
    explain_new: Callable[[str, str], str]
    """(value, digit) -> how the expert takes the new operation apart."""
    answer_of: Callable[[Sequence[str]], str]
    """Values after each step -> answer."""
    digits: str = ""
    """The digits of the operations, each as often as it stands here; empty: all are equally frequent."""


def _clock(value: str, operation: str, digit: str) -> str:
    x, y = int(value), int(digit)
    return str({"+": x + y, "-": x - y, "*": x * y, "@": (x + y) * y}[operation] % 10)


def _explain_clock(value: str, digit: str) -> str:
    total = _clock(value, "+", digit)
    return f"means {value}+{digit}={total} and {total}*{digit}={_clock(total, '*', digit)}"


def _tape(value: str, operation: str, digit: str) -> str:
    if operation == "+":
        return "".join(str((int(cell) + int(digit)) % 10) for cell in value)
    if operation == "@":
        return _tape(_tape(value, "+", digit), "~", "")
    return {"~": value[::-1], "<": value[1:] + value[0], "^": "".join(sorted(value))}[operation]


def _explain_tape(value: str, digit: str) -> str:
    total = _tape(value, "+", digit)
    return f"means {value}+{digit}={total} and {total}~={total[::-1]}"


CLOCK = Family(
    operations="+-*",
    takes_number="+-*",
    new="@",
    draw_start=lambda rng: str(rng.randrange(10)),
    apply=_clock,
    explain_new=_explain_clock,
    answer_of=lambda values: "".join(values[-2:]),  # two values: a guess is right once in a hundred
)
TAPE = Family(
    operations="+~<^",
    takes_number="+",
    new="@",
    draw_start=lambda rng: "".join(str(rng.randrange(10)) for _ in range(3)),
    apply=_tape,
    explain_new=_explain_tape,
    answer_of=lambda values: values[-1],
)


@dataclass(frozen=True)
class Step:
    """One labelled operation of a problem."""

    label: str
    operation: str
    digit: str
    """Empty if the operation takes none."""

    def __str__(self) -> str:
        return f"{self.label}{self.operation}{self.digit}"


@dataclass(frozen=True)
class Faults:
    """Share of demonstrations with each fault. A demonstration has at most one of the first three; ``wrong`` is drawn separately."""

    redundant: float = 0.0
    """A step is repeated as a check, or the start is announced."""
    wandering: float = 0.0
    """Equations that have nothing to do with the problem stand between the steps."""
    jumping: float = 0.0
    """Half of the steps are left out."""
    wrong: float = 0.0
    """Each step has a random result with a probability of 0.3."""


CLEAN = Faults()


class Chain:
    """One problem of a family with its solution."""

    def __init__(self, family: Family, rng: random.Random, length: int, num_new: int = 0) -> None:
        self.family = family
        self.start = family.draw_start(rng)
        operations = [rng.choice(family.operations) for _ in range(length)]
        for place in rng.sample(range(length), num_new):
            operations[place] = family.new
        self.steps = [
            Step(LABELS[i], operation, self._draw_digit(rng, operation))
            for i, operation in enumerate(operations)
        ]
        self.values = self.run()

    def _draw_digit(self, rng: random.Random, operation: str) -> str:
        if operation not in self.family.takes_number + self.family.new:
            return ""
        if self.family.digits:
            return rng.choice(self.family.digits)
        return str(rng.randrange(2 if operation == "*" else 1, 10))

    def run(
        self, rng: random.Random | None = None, noise: float = 0.0, is_new_random: bool = False
    ) -> list[str]:
        """Returns the value after each step.

        Args:
            rng: draws the errors; None: there are no errors.
            noise: probability that a step has a random result.
            is_new_random: the new operation always has a random result.
        """
        value, values = self.start, []
        for step in self.steps:
            value = self.family.apply(value, step.operation, step.digit)
            hides = is_new_random and step.operation == self.family.new
            if rng is not None and (rng.random() < noise or hides):
                value = self.family.draw_start(rng)
            values.append(value)
        return values

    @property
    def problem(self) -> str:
        return " ".join([self.start, *map(str, self.steps)])

    @property
    def answer(self) -> str:
        return self.family.answer_of(self.values)

    def _box(self, values: Sequence[str]) -> str:
        return f" \\boxed{{{self.family.answer_of(values)}}}"

    def _equations_of(self, values: Sequence[str]) -> list[tuple[Step, str, str]]:
        """(step, value before it, value after it) of all steps."""
        return list(zip(self.steps, [self.start, *values[:-1]], values, strict=True))

    def terse(self, values: Sequence[str]) -> str:
        """Returns a solution of the values only."""
        separator = "" if len(self.start) == 1 else " "
        return separator.join(values) + self._box(values)

    def spelled(self, rng: random.Random, values: Sequence[str], faults: Faults = CLEAN) -> str:
        """Returns a solution in sentences."""
        lead = rng.choice(("then", "next", "take"))
        draw = rng.random()
        is_jumping = draw < faults.jumping
        is_wandering = not is_jumping and draw < faults.jumping + faults.wandering
        is_redundant = (
            not is_jumping
            and not is_wandering
            and draw < faults.jumping + faults.wandering + faults.redundant
        )
        parts = [f"we start with {self.start}."] if is_redundant and rng.random() < 0.5 else []
        equations = self._equations_of(values)
        for number, (step, before, after) in enumerate(equations):
            if not (is_jumping and number > 0 and rng.random() < 0.5):
                parts.append(f"{lead} {step.label} {self._spell(step, before, after)}.")
            if is_wandering and rng.random() < 0.4:
                parts.append(f"note that {self._unrelated(rng)}.")
        if is_redundant:
            step, before, after = rng.choice(equations)
            if step.operation != self.family.new:
                parts.append(f"let us check again {step.label} {self._spell(step, before, after)}.")
        return " ".join([*parts, "so the answer is"]) + self._box(values)

    def _spell(self, step: Step, before: str, after: str) -> str:
        expression = f"{before}{step.operation}{step.digit}"
        if step.operation == self.family.new and after == self.family.apply(
            before, self.family.new, step.digit
        ):
            return f"{expression} {self.family.explain_new(before, step.digit)}"
        return f"{expression}={after}"

    def _unrelated(self, rng: random.Random) -> str:
        value, operation = self.family.draw_start(rng), rng.choice(self.family.operations)
        digit = self._draw_digit(rng, operation)
        return f"{value}{operation}{digit}={self.family.apply(value, operation, digit)}"
