"""Writes the quickstart's task: arithmetic that a small model solves sometimes, with step-by-step demonstrations.

Writes train.jsonl and heldout.jsonl with rows {"id", "problem", "response", "answer"}. Held-out problems do not occur in
train.jsonl, in any order of their operands. The same flags give the same files, byte for byte.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HELDOUT_FRAC_MAX = 0.25
"""Largest share of a kind's problems that is held out, so that kinds with few problems keep enough for training."""

Operands = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of problem, with a range for each operand."""

    name: str
    ranges: tuple[range, ...]
    sign: str
    answer: Callable[[Operands], int]
    steps: Callable[[Operands], str]


def sum_of_pair(operands: Operands) -> str:
    """Writes the solution of a sum of two numbers, e.g. ``7 + 8 = 15.``"""
    a, b = operands
    return f"{a} + {b} = {a + b}."


def sum_of_three(operands: Operands) -> str:
    """Writes the solution of a sum of three numbers, from left to right."""
    a, b, c = operands
    return f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."


def sum_by_tens(operands: Operands) -> str:
    """Writes the solution of a sum of two-digit numbers: tens, ones, then both."""
    a, b = operands
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    return (
        f"{a // 10 * 10} + {b // 10 * 10} = {tens}. {a % 10} + {b % 10} = {ones}. {tens} + {ones} = {a + b}."
    )


def product_of_digits(operands: Operands) -> str:
    """Writes the solution of a product, e.g. ``6 x 7 = 42.``"""
    a, b = operands
    return f"{a} x {b} = {a * b}."


def product_by_tens(operands: Operands) -> str:
    """Writes the solution of a product with a two-digit number: tens, ones, then both."""
    a, b = operands
    tens, ones = a // 10 * 10 * b, a % 10 * b
    return f"{a // 10 * 10} x {b} = {tens}. {a % 10} x {b} = {ones}. {tens} + {ones} = {a * b}."


def product(operands: Operands) -> int:
    """Returns the product of two operands."""
    a, b = operands
    return a * b


DIGITS, TWO_DIGITS = range(1, 10), range(11, 100)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("add1", (DIGITS, DIGITS), "+", sum, sum_of_pair),
        Kind("mul1", (DIGITS, DIGITS), "x", product, product_of_digits),
        Kind("mul2", (TWO_DIGITS, range(2, 10)), "x", product, product_by_tens),
        Kind("add2", (TWO_DIGITS, TWO_DIGITS), "+", sum, sum_by_tens),
        Kind("add3", (DIGITS, DIGITS, DIGITS), "+", sum, sum_of_three),
    )
}


def make_row(kind: Kind, operands: Operands) -> dict[str, str]:
    """Returns a row. Its response ends with the boxed answer."""
    written = f" {kind.sign} ".join(map(str, operands))
    answer = str(kind.answer(operands))
    return {
        "id": f"{kind.name}-{written.replace(' ', '')}",
        "problem": f"What is {written}?",
        "response": f"{kind.steps(operands)} \\boxed{{{answer}}}",
        "answer": answer,
    }


def split_kind(kind: Kind, rng: random.Random) -> tuple[list[Operands], list[Operands]]:
    """Splits a kind's problems into held-out and training candidates, both shuffled.

    All orders of the same operands, such as 4 + 9 and 9 + 4, are on the same side.
    """
    orders: dict[Operands, list[Operands]] = {}
    for operands in itertools.product(*kind.ranges):
        orders.setdefault(tuple(sorted(operands)), []).append(operands)
    keys = list(orders)
    rng.shuffle(keys)
    num_heldout = int(len(keys) * HELDOUT_FRAC_MAX)
    heldout = [rng.choice(orders[key]) for key in keys[:num_heldout]]
    train = [operands for key in keys[num_heldout:] for operands in orders[key]]
    rng.shuffle(train)
    return heldout, train


def take_evenly(pools: dict[str, list[Operands]], num: int, flag: str) -> list[tuple[str, Operands]]:
    """Takes ``num`` problems, one of each kind in turn. A kind without further problems is skipped.

    Raises:
        ValueError: ``num`` is not between 1 and the number of problems. The message names ``flag``.
    """
    total = sum(map(len, pools.values()))
    if not 1 <= num <= total:
        raise ValueError(f"{flag} must be 1 .. {total} for these --kinds, got {num}")
    queues = [[(name, operands) for operands in pool] for name, pool in pools.items()]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((item for item in rounds if item is not None), num))


def make_task(
    kinds: Iterable[str], num_train: int, num_heldout: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns training rows and held-out rows, each in random order.

    Raises:
        ValueError: there are not enough problems.
    """
    heldout_pools, train_pools = {}, {}
    for name in kinds:
        # One generator for each kind, so that leaving out a kind does not change the others.
        heldout_pools[name], train_pools[name] = split_kind(KINDS[name], random.Random(f"{seed} {name}"))
    heldout = take_evenly(heldout_pools, num_heldout, "--num-heldout")
    train = take_evenly(train_pools, num_train, "--num-train")
    seen = {(name, tuple(sorted(operands))) for name, operands in train}
    shared = [item for item in heldout if (item[0], tuple(sorted(item[1]))) in seen]
    assert not shared, f"held-out problems in the training set: {shared}"
    for items in (train, heldout):
        random.Random(seed).shuffle(items)
    return (
        [make_row(KINDS[name], operands) for name, operands in train],
        [make_row(KINDS[name], operands) for name, operands in heldout],
    )


def write_task(output: Path, kinds: Iterable[str], num_train: int, num_heldout: int, seed: int) -> None:
    """Writes both files to the folder ``output``, and prints their names.

    Raises:
        ValueError: there are not enough problems.
        OSError: the folder cannot be written.
    """
    train, heldout = make_task(kinds, num_train, num_heldout, seed)
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output / name).write_text(text, encoding="utf-8")
        print(f"wrote {len(rows)} problems to {output / name}")


def main() -> int:
    """Runs the command line. Returns 1 if the folder cannot be written; a wrong flag exits with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[2] / ".cache" / "quickstart" / "data"
    parser.add_argument(
        "--output", type=Path, default=default, help="folder of the two files (default: %(default)s)"
    )
    parser.add_argument(
        "--num-train", type=int, default=320, help="training problems, >= 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--num-heldout", type=int, default=100, help="held-out problems, >= 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all of them"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="seed of the split and of the choice of problems (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        write_task(args.output, dict.fromkeys(args.kinds), args.num_train, args.num_heldout, args.seed)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"make_arithmetic: cannot write --output {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
