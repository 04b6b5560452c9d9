"""Checks that a base model is what its world says: which problems it solves, and whether it can use the expert's style.

regimes.py FOLDER [--worlds NAME ...]      FOLDER holds the base models, as run.py makes them

Prints a line for each world, names what is outside its bounds, and writes the line to NAME.regime in the folder of the base model. Nothing is trained, so the check says nothing about methods.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lets the file run from a checkout that is not installed

from examples.proving_ground.worlds import KINDS, WORLDS, Row, World  # noqa: E402

BOUNDS: Mapping[str, tuple[float, float]] = {
    "short": (0.80, 1.0),
    "mid": (0.30, 0.90),
    "long": (0.05, 0.60),
    "new": (0.0, 0.15),
}
"""Kind -> smallest and largest share of samples at temperature 1 that are right."""

STYLE_BOUNDS: Mapping[bool, tuple[float, float]] = {True: (0.40, 1.0), False: (0.0, 0.15)}
"""Whether the policy can use the expert's style -> share of long problems that it solves when it continues the expert's first words."""

HABIT_BOUND = 0.25
"""Largest share of solutions in the expert's style, where the policy can use that style but should rarely do so."""


@dataclass(frozen=True)
class Regime:
    """Shares of samples of a base model at temperature 1."""

    right: Mapping[str, float]
    """Kind -> right answers."""
    styled: float
    """Right answers to long problems whose solution continues the expert's first step."""
    habit: float
    """Solutions that begin as the expert's do, without being asked to."""

    def faults(self, world: World) -> list[str]:
        """Returns what is outside the bounds, in words."""
        low, high = STYLE_BOUNDS[world.is_fluent]
        found = [
            f"{kind} {self.right[kind]:.2f} is not within {low:.2f} .. {high:.2f}"
            for kind, (low, high) in BOUNDS.items()
            if not low <= self.right[kind] <= high
        ]
        if not low <= self.styled <= high:
            found.append(
                f"long in the expert's style {self.styled:.2f} is not within {low:.2f} .. {high:.2f}"
            )
        if world.is_fluent and self.habit > HABIT_BOUND:
            found.append(
                f"the expert's style without being asked {self.habit:.2f} is above {HABIT_BOUND:.2f}"
            )
        return found


def describe(name: str, regime: Regime, num: int) -> str:
    """Returns the line of a world.

    Args:
        num: sampled problems of each kind.
    """
    shares = ", ".join(f"{kind} {regime.right[kind]:.2f}" for kind in KINDS)
    faults = "; ".join(regime.faults(WORLDS[name])) or "as intended"
    styles = f"long in the expert's style {regime.styled:.2f}, habit {regime.habit:.2f}"
    return f"{name}, {num} problems of each kind: {shares}, {styles}: {faults}"


def num_measured(line: str) -> int:
    """Returns the number of problems of each kind from a world's line."""
    return int(line.split(", ")[1].split(" ")[0])


def regime_file(folder: Path, name: str) -> Path:
    """Returns the file of a world's line. It is in the base model's folder, so it goes when the model is made anew."""
    return folder / WORLDS[name].base / f"{name}.regime"


def measure(folder: Path, world: World, num: int = 100, seed: int = 1) -> Regime:
    """Samples ``num`` problems of each kind from a base model.

    Args:
        folder: model folder with a tokenizer.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(f"regimes {seed}")
    rows = {kind: [world.demonstration(rng, kind) for _ in range(num)] for kind in KINDS}
    answers = {
        kind: sample(model, tokenizer, [row["problem"] + "\n" for row in rows[kind]]) for kind in KINDS
    }
    begun = [first_step(world, row["response"]) for row in rows["long"]]
    ends = sample(
        model, tokenizer, [f"{r['problem']}\n{b}" for r, b in zip(rows["long"], begun, strict=True)]
    )
    every = [text for texts in answers.values() for text in texts]
    return Regime(
        right={kind: _share_right(rows[kind], answers[kind]) for kind in KINDS},
        styled=_share_right(rows["long"], [b + end for b, end in zip(begun, ends, strict=True)]),
        habit=sum(is_in_style(world, text) for text in every) / len(every),
    )


def first_step(world: World, demonstration: str) -> str:
    """Returns the beginning of a demonstration, up to the end of its first step."""
    if world.style == "terse":
        return demonstration.split(" ", 1)[0]
    return demonstration[
        : demonstration.index("\n x=") + 5 if world.style == "stepwise" else demonstration.index(".") + 1
    ]


def is_in_style(world: World, response: str) -> bool:
    """Whether a response is written in the expert's style."""
    marks = {"spelled": "answer is", "stepwise": "\n x="}
    return "answer is" not in response if world.style == "terse" else marks[world.style] in response


def _share_right(rows: Sequence[Row], responses: Sequence[str]) -> float:
    return sum(map(is_right, rows, responses)) / len(rows)


def is_right(row: Row, response: str) -> bool:
    """Whether a response is right. Programs are executed: the vocabulary has no loops, no imports and, without ``**``, no long numbers."""
    if "answer" in row:
        return response.endswith(f"\\boxed{{{row['answer']}}}")
    return "**" not in response and _passes(response, row["tests"])


def _passes(program: str, tests: Sequence[str]) -> bool:
    names: dict[str, object] = {"__builtins__": {}}
    try:
        for statement in (program, *tests):
            exec(statement, names)
    except Exception:  # also an AssertionError of a test
        return False
    return True


@torch.no_grad()
def sample(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> list[str]:
    """Returns a continuation of each prompt at temperature 1, of at most 160 tokens."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=160, pad_token_id=0
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), metavar="NAME")
    parser.add_argument(
        "--num", type=int, default=100, metavar="N", help="problems of each kind; default: %(default)s"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in args.worlds:
        regime = measure(args.folder / WORLDS[name].base, WORLDS[name], args.num)
        line = describe(name, regime, args.num)
        regime_file(args.folder, name).write_text(line + "\n", encoding="utf-8")
        print(line, flush=True)


if __name__ == "__main__":
    main()
