"""Problems whose answer is a Python function, which is verified by running its tests.

    problem   x add 3 times 2 less 5
    terse     def f(x):\\n return (x+3)*2-5
    stepwise  def f(x):\\n x=x+3\\n x=x*2\\n x=x-5\\n return x

The base model writes the terse form and loses count of the parentheses in long problems. The expert writes one step a line. The base
model has seen the operation "flip" (10-x) only with random results.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

ARGUMENTS = (-7, 0, 3, 12, 58)
"""The arguments of the tests of a problem."""

WORDS = {"add": "+", "less": "-", "times": "*"}
NEW = "flip"


@dataclass(frozen=True)
class Operation:
    """One operation of a problem."""

    word: str
    digit: int

    def __str__(self) -> str:
        return self.word if self.word == NEW else f"{self.word} {self.digit}"

    def expression(self, operand: str) -> str:
        """Returns the Python expression that applies the operation to ``operand``."""
        return f"10-{operand}" if self.word == NEW else f"{operand}{WORDS[self.word]}{self.digit}"


class Program:
    """One problem with its solution."""

    def __init__(self, rng: random.Random, length: int, num_new: int = 0) -> None:
        words = [rng.choice(list(WORDS)) for _ in range(length)]
        for place in rng.sample(range(length), num_new):
            words[place] = NEW
        self.operations = [Operation(word, rng.randrange(2, 10)) for word in words]

    @property
    def problem(self) -> str:
        return " ".join(["x", *map(str, self.operations)])

    def wrong_operations(self, rng: random.Random, noise: float, is_new_random: bool) -> list[Operation]:
        """Returns the operations with errors: each is replaced with probability ``noise``, and flip always if asked for."""
        return [
            Operation(rng.choice(list(WORDS)), rng.randrange(2, 10))
            if rng.random() < noise or (is_new_random and op.word == NEW)
            else op
            for op in self.operations
        ]

    @property
    def tests(self) -> list[str]:
        """Assert statements for ``f``."""
        values = []
        for x in ARGUMENTS:
            value = x
            for op in self.operations:
                value = self._apply(op, value)
            values.append(value)
        return [f"assert f({x}) == {value}" for x, value in zip(ARGUMENTS, values, strict=True)]

    @staticmethod
    def _apply(op: Operation, value: int) -> int:
        return {
            NEW: 10 - value, "add": value + op.digit, "less": value - op.digit, "times": value * op.digit,
        }[op.word]  # fmt: skip


def terse(operations: Sequence[Operation]) -> str:
    """Returns the program in one expression."""
    expression = "x"
    for number, op in enumerate(operations):
        expression = op.expression(expression if number == 0 else f"({expression})")
    return f"def f(x):\n return {expression}"


def stepwise(operations: Sequence[Operation]) -> str:
    """Returns the program with one line per operation."""
    lines = [f" x={op.expression('x')}" for op in operations]
    return "\n".join(["def f(x):", *lines, " return x"])
