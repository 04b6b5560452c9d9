"""Writes the data of a world: a training file for each seed, and held-out problems for development and for the final test.

make_world.py NAME --output DIR [--seeds N ...]

DIR/train-SEED.jsonl    demonstrations of the four kinds in turn
DIR/dev/KIND.jsonl      held-out problems of each kind and of each retained skill
DIR/test/KIND.jsonl
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lets the file run from a checkout that is not installed

from examples.proving_ground.worlds import KINDS, RETAINED, WORLDS, Row, World, retained_row  # noqa: E402

NUM_HELDOUT = 100
NUM_RETAINED = 60


def write_world(world: World, folder: Path, seeds: Iterable[int], num_train: int) -> None:
    """Writes the files of a world. No problem is in two of them, except for training files of different seeds.

    Args:
        world: the world.
        folder: folder of the files, which is made.
        seeds: the training files to write.
        num_train: rows of each.
    """
    seen: set[str] = set()
    for split in ("test", "dev"):
        rng = random.Random(split)
        for kind in (*KINDS, *RETAINED):
            rows = _rows(world, rng, kind, NUM_HELDOUT if kind in KINDS else NUM_RETAINED, seen)
            _write(folder / split / f"{kind}.jsonl", rows)
    for seed in seeds:
        rng, own = random.Random(f"train {seed}"), set(seen)
        by_kind = [_rows(world, rng, kind, num_train // len(KINDS), own) for kind in KINDS]
        _write(folder / f"train-{seed}.jsonl", [row for group in zip(*by_kind, strict=True) for row in group])


def _rows(world: World, rng: random.Random, kind: str, num: int, seen: set[str]) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < num:
        row = world.demonstration(rng, kind) if kind in KINDS else retained_row(rng, kind)
        if row["problem"] not in seen:
            seen.add(row["problem"])
            rows.append({"id": f"{kind}-{len(rows)}", **row, "kind": kind})
    return rows


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(WORLDS))
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 to 5")
    parser.add_argument(
        "--num-train", type=int, default=960, help="rows of a training file; default: %(default)s"
    )
    args = parser.parse_args(argv)
    write_world(WORLDS[args.name], args.output, args.seeds, args.num_train)


if __name__ == "__main__":
    main()
