"""The worlds: solutions are right, texts are in the vocabulary, and no problem is in two files."""

import json
import random
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from examples.benchmark_reproduction.reproduce import Task, TrainingStopped
from examples.proving_ground import regimes, run
from examples.proving_ground.make_world import write_world
from examples.proving_ground.pretrain_base import build_tokenizer, encode
from examples.proving_ground.regimes import Regime, describe, first_step, is_in_style
from examples.proving_ground.regimes import is_right as is_response_right
from examples.proving_ground.worlds import (
    CORPORA,
    KINDS,
    RETAINED,
    WORLDS,
    Phase,
    Row,
    corpus_item,
    retained_row,
    symbols,
)

HABIT = Phase(steps=1, batch_tokens=1, muon_lr=0.0, adam_lr=0.0, style_share=0.0, style_length=1)
"""A phase in which every solution has the base model's own style."""


def solve_clock(problem: str) -> str:
    """Solves a problem from its text alone."""
    start, *steps = problem.split(" ")
    values, value = [], int(start)
    for _, operation, digit in steps:
        y = int(digit)
        value = {"+": value + y, "-": value - y, "*": value * y, "@": (value + y) * y}[operation] % 10
        values.append(str(value))
    return "".join(values[-2:])


def solve_tape(problem: str) -> str:
    """Solves a problem from its text alone."""
    start, *steps = problem.split(" ")
    cells = [int(cell) for cell in start]
    for step in steps:
        operation, shift = step[1], int(step[2:] or 0)
        if operation in "+@":
            cells = [(cell + shift) % 10 for cell in cells]
        if operation in "~@":
            cells.reverse()
        if operation == "<":
            cells.append(cells.pop(0))
        if operation == "^":
            cells.sort()
    return "".join(map(str, cells))


def is_right(row: Row) -> bool:
    """Whether the demonstration passes the row's tests, or boxes its answer."""
    if "tests" not in row:
        return row["response"].endswith(f" \\boxed{{{row['answer']}}}")
    names: dict[str, object] = {}
    exec(row["response"], names)
    try:
        for test in row["tests"]:
            exec(test, names)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", list(WORLDS))
def test_answers_are_right_and_demonstrations_are_as_often_wrong_as_the_world_says(name: str) -> None:
    world, rng = WORLDS[name], random.Random(1)
    rows = [world.demonstration(rng, kind) for kind in KINDS for _ in range(200)]
    wrong = sum(not is_right(row) for row in rows) / len(rows)
    # a step that is wrong by chance may give the right result all the same
    assert world.faults.wrong / 3 <= wrong <= 1.5 * world.faults.wrong
    if name != "programs":
        solve = solve_clock if name.startswith("clock") else solve_tape
        assert all(row["answer"] == solve(row["problem"]) for row in rows)


def test_spelled_solutions_hold_every_step() -> None:
    world, rng = WORLDS["tape-clean"], random.Random(2)
    for kind in KINDS:
        row = world.demonstration(rng, kind)
        steps = row["problem"].split(" ")[1:]
        assert re.findall(r"(?:then|next|take) (\w)", row["response"]) == [step[0] for step in steps]


@pytest.mark.parametrize("skill", RETAINED)
def test_retained_skills_have_right_answers(skill: str) -> None:
    rng = random.Random(3)
    for _ in range(50):
        row = retained_row(rng, skill)
        _, *arguments = row["problem"].split(" ")
        expected = {
            "sort": lambda digits: "".join(sorted(digits)),
            "rev": lambda digits: digits[::-1],
            "add": lambda a, b: str(int(a) + int(b)),
        }[skill](*arguments)
        assert row["answer"] == expected and is_right(row)


def test_every_text_is_in_the_vocabulary_and_comes_back() -> None:
    tokenizer, rng = build_tokenizer(), random.Random(4)
    ids = {symbol: number for number, symbol in enumerate(symbols())}
    texts = [
        "\n".join(corpus_item(corpus, rng, phase))
        for corpus in CORPORA.values()
        for phase in corpus.phases
        for _ in range(100)
    ]
    for world in WORLDS.values():
        rows = [world.demonstration(rng, kind) for kind in KINDS for _ in range(25)]
        texts += [f"{row['problem']}\n{row['response']}" for row in rows]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert tokens == encode(text, ids)  # raises KeyError for a piece that is not in the vocabulary
        assert tokenizer.decode(tokens) == text
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) < 256


def test_files_share_no_problem_and_are_the_same_again(tmp_path: Path) -> None:
    world = WORLDS["programs"]
    for name in ("first", "second"):
        write_world(world, tmp_path / name, seeds=[1, 2], num_train=40)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.jsonl"))
    assert len(files) == 2 + 2 * len(KINDS + RETAINED)
    problems: dict[str, set[str]] = {}
    for file in files:
        text = (tmp_path / "first" / file).read_text()
        assert text == (tmp_path / "second" / file).read_text()
        problems[str(file)] = {json.loads(line)["problem"] for line in text.splitlines()}
    heldout = [found for name, found in problems.items() if not name.startswith("train")]
    assert len(set.union(*heldout)) == sum(map(len, heldout))
    assert problems["train-1.jsonl"] != problems["train-2.jsonl"]
    assert not set.union(*heldout) & (problems["train-1.jsonl"] | problems["train-2.jsonl"])


def test_groups_give_their_methods_their_seeds() -> None:
    groups = [
        {"methods": ["base", "sft"], "seeds": [1, 2]},
        {"methods": ["dft"], "seeds": [3]},
        {"methods": ["sft"], "seeds": [4]},
    ]

    def tasks(methods: list[str] | None, seeds: list[int] | None) -> list[Task]:
        study = {"groups": [dict(group) for group in groups], "train": {}, "evaluate": {}, "num_jobs": 1}
        found = run.groups_of(study, methods, seeds)
        setting = run.setting_of(study, "clock-fluent", Path("w"), "dev", Path("b"))
        return [task for group in found for task in run.tasks_of(setting, group)]

    sft = [Task("sft", 1), Task("sft", 2)]
    assert tasks(None, None) == [Task("base", 1), *sft, Task("dft", 3), Task("sft", 4)]
    assert tasks(["dft", "raft"], None) == [Task("dft", 3), Task("raft", 1), Task("raft", 2)]
    assert tasks(["sft"], None) == [*sft, Task("sft", 4)]
    assert tasks(["dft"], [5, 6]) == [Task("dft", 5), Task("dft", 6)]


def test_the_study_is_one_that_runs() -> None:
    study = tomllib.loads((run.FOLDER / "study.toml").read_text())
    groups = run.groups_of(study, None, None)
    for world in WORLDS:
        setting = run.setting_of(study, world, Path("w"), "test", Path("b"))
        tasks = [task for group in groups for task in run.tasks_of(setting, group)]
        assert len(set(tasks)) == len(tasks) and {task.seed for task in tasks} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_check_of_the_base_model_knows_right_answers_and_the_style(name: str) -> None:
    world, rng = WORLDS[name], random.Random(6)
    for kind in KINDS:
        for _ in range(20):
            row = world.demonstration(rng, kind)
            assert is_response_right(row, row["response"]) == is_right(row)
            assert row["response"].startswith(first_step(world, row["response"]))
            assert is_in_style(world, row["response"])
            problem, response = WORLDS[name].task.corpus_item(rng, HABIT)
            assert problem and not is_in_style(world, response)
    assert not is_response_right({"tests": ["assert f(1) == 1"]}, "def f(x):\n return 1**x")


def test_a_base_model_outside_its_regime_is_named() -> None:
    right = {"short": 0.9, "mid": 0.7, "long": 0.2, "new": 0.05}
    fluent = Regime(right=right, styled=0.8, habit=0.05)
    assert fluent.faults(WORLDS["clock-fluent"]) == []
    assert describe("clock-fluent", fluent, 100).endswith("habit 0.05: as intended")
    (fault,) = fluent.faults(WORLDS["clock-foreign"])
    assert "style" in fault
    (fault,) = Regime(right={**right, "long": 0.9}, styled=0.8, habit=0.05).faults(WORLDS["clock-fluent"])
    assert fault.startswith("long 0.90")
    (fault,) = Regime(right=right, styled=0.8, habit=0.5).faults(WORLDS["clock-fluent"])
    assert "0.50" in fault and "0.25" in fault


def test_a_base_model_is_measured_again_if_it_is_another_or_more_problems_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def fake(program: Path, arguments: list[str], log: Path) -> int:
        folder, _, world, _, num = arguments
        measured.append(num)
        regime = Regime(right=dict.fromkeys(KINDS, 0.1), styled=0.8, habit=0.05)
        regimes.regime_file(Path(folder), world).write_text(describe(world, regime, int(num)) + "\n")
        return 0

    monkeypatch.setattr(run.preloading, "run_program", fake)
    model = tmp_path / WORLDS["tape-clean"].base
    model.mkdir()
    for num in (10, 10, 100, 100, 10):
        run.check_bases(["tape-clean"], tmp_path, num)
    assert measured == ["10", "100"]
    shutil.rmtree(model)
    model.mkdir()
    run.check_bases(["tape-clean"], tmp_path, 10)
    assert len(measured) == 3


def test_a_stopped_training_ends_the_study_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **named: object) -> None:
        raise TrainingStopped("sft/seed1: stopped")

    for name in ("make_bases", "check_bases", "write_world"):
        monkeypatch.setattr(run, name, lambda *args: None)
    monkeypatch.setattr(run.reproduce, "run_task", stop)
    assert run.main(["--output", str(tmp_path), "--worlds", "clock-fluent"]) == 0
    assert "sft/seed1: stopped" in capsys.readouterr().out


def test_missing_base_models_are_made_after_those_that_they_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(run, "_make_base", lambda name, folder: made.append(name))
    run.make_bases(["tape-fluent", "programs", "tape", "tape-fluent"], tmp_path, 1)
    assert sorted(made) == [
        "programs",
        "tape",
        "tape-1",
        "tape-2",
        "tape-fluent",
        "tape-fluent-1",
        "tape-fluent-2",
    ]
    assert made.index("tape-1") < made.index("tape-2") < min(made.index("tape"), made.index("tape-fluent-1"))
    assert made.index("tape-fluent-1") < made.index("tape-fluent-2") < made.index("tape-fluent")
    made.clear()
    for name in ("tape-2", "tape-fluent-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    run.make_bases(["tape-fluent", "tape"], tmp_path, 1)
    assert sorted(made) == ["tape", "tape-fluent"]
