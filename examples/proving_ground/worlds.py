"""The worlds of the proving ground: what the base model knows, what its expert writes, and how both differ.

``DEVELOPMENT`` worlds are for looking for better rules. ``KEPT`` worlds are for the comparison only: they were chosen before any method
ran in them.
"""

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from examples.proving_ground import programs
from examples.proving_ground.chains import CLEAN, CLOCK, LABELS, TAPE, Chain, Family, Faults
from examples.proving_ground.programs import Program

KINDS = ("short", "mid", "long", "new")
"""Kinds of the training problems: the base model solves them nearly always, often, sometimes, and (nearly) never."""

RETAINED = ("sort", "rev", "add")
"""Skills of the base model that no training problem asks for."""

CORPUS_LENGTHS: Mapping[int, int] = {1: 8, 2: 24, 3: 24, 4: 14, 5: 7, 6: 4, 7: 1, 8: 1}
"""Number of steps of a problem in the corpus -> its weight."""

Row = dict[str, Any]
"""A row of training or evaluation data: problem, response, and answer or tests."""


@dataclass(frozen=True)
class Phase:
    """A part of the base model's pre-training."""

    steps: int
    batch_tokens: int
    muon_lr: float
    """Peak learning rate of Muon, for the matrices."""
    adam_lr: float
    """Peak learning rate of AdamW, for embeddings, the output layer and norms."""
    style_share: float
    """Share of problems that are solved in the expert's style."""
    style_length: int
    """Most steps of such a problem."""
    operations: str = ""
    """The only operations of the chains; empty: all that the family knows."""
    digits: str = ""
    """The digits of the operations, each as often as it stands here; empty: all are equally frequent."""
    lengths: Mapping[int, int] = field(default_factory=lambda: CORPUS_LENGTHS)
    """Number of steps of a problem -> its weight."""


@dataclass(frozen=True)
class Corpus:
    """The training of a base model: its problems, and the phases of the training."""

    task: "Task"
    phases: tuple[Phase, ...]
    begins_with: str = ""
    """Another corpus, whose model is trained further."""


class Task(Protocol):
    """The problems of a world: chains or programs."""

    def corpus_item(self, rng: random.Random, phase: Phase) -> tuple[str, str]:
        """Returns (problem, response) for the pre-training."""

    def demonstration(self, rng: random.Random, kind: str, style: str, faults: Faults) -> Row:
        """Returns a training problem of a kind of ``KINDS`` with the expert's demonstration."""


LENGTHS: Mapping[str, tuple[int, ...]] = {"short": (2, 3, 4), "mid": (5,), "long": (6, 7), "new": (2, 3)}
"""Kind -> numbers of steps of a problem."""

NUM_NEW = (1, 1, 2)
"""New operations in a problem of kind ``new``."""

CORPUS_NOISE = 0.02
"""Share of steps in the corpus that have a random result."""


def _draw_corpus_length(rng: random.Random, phase: Phase) -> int:
    return rng.choices(list(phase.lengths), list(phase.lengths.values()))[0]


def _draw_training_length(
    rng: random.Random, lengths: Mapping[str, tuple[int, ...]], kind: str
) -> tuple[int, int]:
    """Returns the number of steps, and how many of them use new operations."""
    return rng.choice(lengths[kind]), rng.choice(NUM_NEW) if kind == "new" else 0


@dataclass(frozen=True)
class ChainTask:
    """Problems that chains.py makes."""

    family: Family
    habit: str
    """The style of most solutions in the corpus: ``terse`` or ``spelled``."""
    style: str
    """The style of the others, which is the expert's: ``spelled`` or ``terse``."""
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: LENGTHS)
    """Kind -> numbers of steps of a training problem, so that the base model solves each kind as often as it should."""

    def corpus_item(self, rng: random.Random, phase: Phase) -> tuple[str, str]:
        family = dataclasses.replace(
            self.family, operations=phase.operations or self.family.operations, digits=phase.digits
        )
        if rng.random() < 0.06:  # the new operation, with random results
            chain = Chain(family, rng, rng.choice((2, 3)), 1)
            return chain.problem, _write(chain, rng, chain.run(rng, CORPUS_NOISE, True), self.habit, CLEAN)
        if rng.random() < phase.style_share:
            chain = Chain(family, rng, rng.randint(1, phase.style_length))
            return chain.problem, _write(chain, rng, chain.run(rng, CORPUS_NOISE), self.style, CLEAN)
        chain = Chain(family, rng, _draw_corpus_length(rng, phase))
        return chain.problem, _write(chain, rng, chain.run(rng, CORPUS_NOISE), self.habit, CLEAN)

    def demonstration(self, rng: random.Random, kind: str, style: str, faults: Faults) -> Row:
        chain = Chain(self.family, rng, *_draw_training_length(rng, self.lengths, kind))
        values = chain.run(rng, 0.3) if rng.random() < faults.wrong else chain.values
        response = _write(chain, rng, values, style, faults)
        return {"problem": chain.problem, "response": response, "answer": chain.answer}


def _write(chain: Chain, rng: random.Random, values: list[str], style: str, faults: Faults) -> str:
    return chain.spelled(rng, values, faults) if style == "spelled" else chain.terse(values)


@dataclass(frozen=True)
class ProgramTask:
    """Problems that programs.py makes."""

    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: LENGTHS)
    """Kind -> numbers of steps of a training problem."""

    def corpus_item(self, rng: random.Random, phase: Phase) -> tuple[str, str]:
        if rng.random() < 0.06:
            program = Program(rng, rng.choice((2, 3)), 1)
            return program.problem, programs.terse(program.wrong_operations(rng, CORPUS_NOISE, True))
        is_styled = rng.random() < phase.style_share
        length = rng.randint(1, phase.style_length) if is_styled else _draw_corpus_length(rng, phase)
        program = Program(rng, length)
        write = programs.stepwise if is_styled else programs.terse
        return program.problem, write(program.wrong_operations(rng, CORPUS_NOISE, False))

    def demonstration(self, rng: random.Random, kind: str, style: str, faults: Faults) -> Row:
        del style  # the expert writes programs in one style only
        program = Program(rng, *_draw_training_length(rng, self.lengths, kind))
        is_wrong = rng.random() < faults.wrong
        operations = program.wrong_operations(rng, 0.3, False) if is_wrong else program.operations
        response = programs.stepwise(operations)
        return {"problem": program.problem, "response": response, "tests": program.tests, "entry_point": "f"}


def retained_row(rng: random.Random, skill: str) -> Row:
    """Returns a problem of a skill of ``RETAINED``."""
    if skill == "add":
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        problem, answer = f"add {a} {b}", str(a + b)
    else:
        lengths = (4, 5, 6) if skill == "sort" else (5, 6, 7)
        digits = "".join(str(rng.randrange(1, 10)) for _ in range(rng.choice(lengths)))
        problem, answer = f"{skill} {digits}", "".join(sorted(digits)) if skill == "sort" else digits[::-1]
    return {"problem": problem, "response": f" \\boxed{{{answer}}}", "answer": answer}


def corpus_item(corpus: Corpus, rng: random.Random, phase: Phase) -> tuple[str, str]:
    """Returns (problem, response) for the pre-training. About a quarter of the problems are of the retained skills."""
    if rng.random() < 0.26:
        row = retained_row(rng, rng.choices(RETAINED, (10, 6, 10))[0])
        return row["problem"], row["response"]
    return corpus.task.corpus_item(rng, phase)


_TERSE = Phase(steps=1500, batch_tokens=2048, muon_lr=0.02, adam_lr=3e-3, style_share=0.12, style_length=3)
_STYLED = Phase(steps=1000, batch_tokens=2560, muon_lr=0.015, adam_lr=2e-3, style_share=0.6, style_length=9)
_TERSE_AGAIN = Phase(
    steps=120, batch_tokens=2048, muon_lr=0.006, adam_lr=1e-3, style_share=0.05, style_length=6
)

_PLUS = Phase(
    steps=400, batch_tokens=2048, muon_lr=0.02, adam_lr=3e-3, style_share=0.12, style_length=3,
    operations="+", digits="1111111122233456789", lengths={1: 2, 2: 1},
)  # fmt: skip
"""Goes before the others on the tape. A cell plus a uniform digit, modulo 10, is uniform, whichever of the two is known, so a model that looks
at one of them learns nothing from it. With frequent ones it learns to look at the cell first, and then at the digit."""

_MORE_PLUS = Phase(
    steps=700, batch_tokens=2048, muon_lr=0.012, adam_lr=2e-3, style_share=0.12, style_length=3, operations="++~<^",
)  # fmt: skip
"""The same operation, twice as often as the others: after the first 1,900 steps a quarter of its results is still wrong."""

_SLOWLY = dataclasses.replace(_MORE_PLUS, steps=400, muon_lr=0.006, adam_lr=1e-3)
"""The same at half the rate: before it the model solves 0.76 of the short problems, after it as many as it should."""

_STYLED_SLOWLY = dataclasses.replace(_STYLED, steps=300, muon_lr=0.006, adam_lr=1e-3, operations="++~<^")
"""Follows on the tape: before it the model solves 0.77 to 0.81 of the short problems."""

_TERSE_SLOWLY = dataclasses.replace(_TERSE_AGAIN, steps=180, operations="++~<^")
"""The last phase: before it the model solves 0.79 to 0.84 of the short problems."""

_CLOCK, _TAPE = ChainTask(CLOCK, "terse", "spelled"), ChainTask(TAPE, "terse", "spelled")

CORPORA: dict[str, Corpus] = {
    "clock": Corpus(_CLOCK, (_TERSE,)),
    "clock-fluent": Corpus(_CLOCK, (_STYLED, _TERSE_AGAIN), begins_with="clock"),
    "clock-early": Corpus(_CLOCK, (dataclasses.replace(_TERSE, steps=1000),)),
    "tape-1": Corpus(_TAPE, (_PLUS, _TERSE)),
    "tape-2": Corpus(_TAPE, (_MORE_PLUS,), begins_with="tape-1"),
    "tape": Corpus(_TAPE, (_SLOWLY,), begins_with="tape-2"),
    "tape-fluent-1": Corpus(_TAPE, (_STYLED, _TERSE_AGAIN), begins_with="tape-2"),
    "tape-fluent-2": Corpus(_TAPE, (_STYLED_SLOWLY, _TERSE_AGAIN), begins_with="tape-fluent-1"),
    "tape-fluent": Corpus(_TAPE, (_TERSE_SLOWLY,), begins_with="tape-fluent-2"),
    "tape-wordy": Corpus(ChainTask(TAPE, "spelled", "terse"), (_PLUS, _TERSE)),
    "programs": Corpus(ProgramTask(), (_TERSE,)),
}
"""Base model -> its corpus. A fluent model has also learnt to solve long problems in the expert's style, which it rarely writes."""


@dataclass(frozen=True)
class World:
    """A base model, and an expert who demonstrates problems to it."""

    title: str
    base: str
    """Name of the base model in ``CORPORA``."""
    style: str
    """The expert's style: ``spelled``, ``terse`` or ``stepwise``."""
    faults: Faults = CLEAN
    is_fluent: bool = False
    """Whether the base model can use the expert's style for long problems."""

    @property
    def task(self) -> Task:
        return CORPORA[self.base].task

    def demonstration(self, rng: random.Random, kind: str) -> Row:
        return self.task.demonstration(rng, kind, self.style, self.faults)


_USUAL = Faults(redundant=0.25, wandering=0.10, jumping=0.05, wrong=0.03)
_MANY = Faults(redundant=0.25, wandering=0.25, jumping=0.15, wrong=0.20)

DEVELOPMENT: dict[str, World] = {
    "clock-fluent": World(
        "The policy can use the expert's style, but rarely does", "clock-fluent", "spelled", _USUAL, True
    ),
    "clock-foreign": World("The policy cannot use the expert's style", "clock", "spelled", _USUAL),
    "clock-early": World(
        "The policy cannot use the expert's style, and is often wrong in its own",
        "clock-early",
        "spelled",
        _USUAL,
    ),
}
KEPT: dict[str, World] = {
    "tape-clean": World(
        "Long faultless demonstrations in a style that the policy can use",
        "tape-fluent",
        "spelled",
        CLEAN,
        True,
    ),
    "tape-noisy": World(
        "The same style; a fifth of the demonstrations is wrong, others wander or jump",
        "tape-fluent",
        "spelled",
        _MANY,
        True,
    ),
    "tape-foreign": World(
        "Long demonstrations in a style that the policy cannot use", "tape", "spelled", _USUAL
    ),
    "tape-short": World(
        "Short demonstrations for a policy that writes long solutions", "tape-wordy", "terse", _USUAL
    ),
    "programs": World("Programs that are verified by tests", "programs", "stepwise", Faults(wrong=0.05)),
}
WORLDS = {**DEVELOPMENT, **KEPT}

_WORDS = (
    "at we have next gives then take so start with means and note that let us check again the answer is def return "
    "less times flip"
).split()


def symbols() -> list[str]:
    """Returns the vocabulary of all worlds; the first is the end of a sequence."""
    found = ["<eos>", "<unk>", "\n", " \\boxed{", "}", " ", *"0123456789+-*@~<^=.,():x", "x", "f", *RETAINED]
    found += (
        [f" {label}" for label in LABELS] + list(LABELS) + [f" {word}" for word in (*_WORDS, "x", "f", "add")]
    )
    found += _WORDS
    return list(dict.fromkeys(found))
