"""Writes a task with JSON answers: a sentence about an order, and the wanted object as an extra field of each row."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

ITEMS = ("apples", "bricks", "candles", "lamps", "pens", "tiles")
CITIES = ("Bern", "Lima", "Oslo", "Porto", "Quito", "Seoul")
SENTENCES = (
    "Please send {quantity} {item} to {city}.",
    "{city} needs {quantity} {item}.",
    "An order of {quantity} {item} came from {city}.",
)
QUESTION = '{sentence}\nAnswer with JSON: {{"item": ..., "quantity": ..., "city": ...}}'


def make_row(draw: random.Random, index: int) -> dict[str, Any]:
    """Returns one row. It has no field "answer": the function of --verify-function reads "wanted"."""
    wanted = {"item": draw.choice(ITEMS), "quantity": draw.randint(2, 99), "city": draw.choice(CITIES)}
    problem = QUESTION.format(sentence=draw.choice(SENTENCES).format(**wanted))
    return {"id": f"order{index}", "problem": problem, "response": json.dumps(wanted), "wanted": wanted}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the file, .jsonl")
    parser.add_argument("--num-rows", type=int, default=256, help="number of rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the orders (default: %(default)s)")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", encoding="utf-8") as file:
        for index in range(args.num_rows):
            file.write(json.dumps(make_row(draw, index)) + "\n")


if __name__ == "__main__":
    main()
