"""A run whose rollouts are graded by a function of the user: rewards, resuming, changed code, and faults before the model is built."""

import json
import re
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.rollout.store import read_rollouts
from tests.functional import launching
from tests.functional.conftest import SHORT_ANSWERS, Workshop
from tests.functional.launching import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "own_verifier"
PARTIAL = """

def share_of_fields(row, response):
    if len(row["id"]) == len("sum0") and not grade(row, response)[0]:
        raise KeyError("edited")
    return (1.0 if grade(row, response)[0] else 0.5), "edited"
"""


@pytest.fixture(scope="module")
def rows(workshop: Workshop) -> Path:
    """The sums, with their answers as a field that only the function knows."""
    path = workshop.root / "wanted.jsonl"
    sums: list[dict[str, Any]] = [json.loads(line) for line in workshop.sums.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**row, "wanted": int(row.pop("answer"))}) + "\n" for row in sums[:16])
    )
    return path


def flags_of_the_readme(**names: Path) -> list[str]:
    """The flags of the example's run, with other files for DIR, the rows and the function."""
    text = (EXAMPLE / "README.md").read_text().replace("\\\n", " ")
    command = re.search(r"torchrun .* pretrain_rasft.py (.*)", text)
    assert command is not None
    paths = {
        "DIR": names["model"],
        "runs/orders/train.jsonl": names["rows"],
        "examples/own_verifier/json_exact.py:share_of_fields": f"{names['function']}:share_of_fields",
        "runs/orders/checkpoints": names["save"],
    }
    words = shlex.split(command[1])
    assert paths.keys() <= set(words)
    return [str(paths.get(word, word)) for word in words]


@pytest.fixture(scope="module")
def small_run(workshop: Workshop, rows: Path) -> tuple[Path, list[str]]:
    """A copy of the example's function, and the flags of a run of two steps that uses it, without --save."""
    folder = workshop.root / "own-function"
    folder.mkdir()
    function = Path(shutil.copy(EXAMPLE / "json_exact.py", folder))
    flags = flags_of_the_readme(model=workshop.policy, rows=rows, function=function, save=folder / "save")
    flags += ["--seq-length", "64", "--global-batch-size", "8", "--rollout-max-new-tokens", "12"]
    return function, [*flags, *SHORT_ANSWERS, "--rasft-refresh-interval", "1"]


@pytest.fixture(scope="module")
def stopped(small_run: tuple[Path, list[str]]) -> tuple[Path, str]:
    """The --save of that run, stopped after its first step, and its output."""
    function, flags = small_run
    save = function.parent / "stopped"
    done = launching.succeed(function.parent / "first", [*flags, "--save", str(save), "--exit-interval", "1"])
    return save, done.output


def test_resumed_run_has_the_rewards_of_an_unbroken_run(
    small_run: tuple[Path, list[str]], stopped: tuple[Path, str]
) -> None:
    function, flags = small_run
    saves = [function.parent / name for name in ("resumed", "unbroken")]
    shutil.copytree(stopped[0], saves[0])
    for save in saves:
        done = launching.succeed(save.with_name(f"{save.name}-logs"), [*flags, "--save", str(save)])
        assert "code of --verify-function has changed" not in done.output
    resumed, unbroken = (list(read_rollouts(save / "rollouts.jsonl")) for save in saves)
    assert resumed == unbroken and len(resumed) == 16 * 4
    assert launching.steps(saves[0]) == launching.steps(saves[1])


def test_example_grades_a_run_and_changed_code_is_said_when_it_resumes(
    small_run: tuple[Path, list[str]], stopped: tuple[Path, str], rows: Path
) -> None:
    (function, flags), (save, output) = small_run, stopped
    assert "json_exact.py:share_of_fields, first demonstration: correct" in output
    wanted = {row["id"]: row["wanted"] for row in map(json.loads, rows.read_text().splitlines())}
    rollouts = list(read_rollouts(save / "rollouts.jsonl"))
    assert len(rollouts) == 8 * 4
    for rollout in rollouts:
        if rollout.finish_reason == "stop" and re.fullmatch(r"\d\+\d=\d", rollout.text):
            assert rollout.reward == (int(rollout.text[-1]) == wanted[rollout.problem_id])
    assert {r.reward for r in rollouts} >= {0.0, 1.0}

    edited, save = function.with_name("edited.py"), Path(shutil.copytree(save, function.parent / "changed"))
    edited.write_text(function.read_text() + PARTIAL)
    flags = [*flags, "--save", str(save), "--verify-function", f"{edited}:share_of_fields"]
    second = launching.succeed(function.parent / "second", flags)
    assert "code of --verify-function has changed" in second.output
    later = list(read_rollouts(save / "rollouts.jsonl"))[8 * 4 :]
    assert "KeyError: 'edited' (edited.py:" in second.output, "the log says that the function failed"
    failed = [r for r in later if "KeyError" in r.verdict_reason]
    assert failed and {r.verdict for r in failed} == {"unverifiable"}
    graded = [r for r in later if r.reward is not None]
    assert {r.reward for r in graded} == {0.5, 1.0}
    assert {r.reward for r in later if r.weight > 0} <= {1.0}, "a part of the reward is not trained on"
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    mean = next(r["verify/reward_mean"] for r in reversed(records) if "verify/reward_mean" in r)
    assert mean == pytest.approx(statistics.fmean(r.reward or 0 for r in graded if not r.num_guide_tokens))


def test_faulty_function_ends_a_run_before_the_model_is_built(workshop: Workshop, rows: Path) -> None:
    faulty = workshop.root / "faulty.py"
    faulty.write_text("def grade(row, response): return row['absent']")
    save = workshop.root / "faulty-save"
    flags = [*workshop.flags(data=rows), "--save", str(save), "--verify-function", f"{faulty}:grade"]
    outcome = launching.run(workshop.root / "faulty-logs", flags)
    assert outcome.codes != [0]
    assert "--verify-function" in outcome.output and "KeyError: 'absent' (faulty.py:1)" in outcome.output
    assert "Traceback" not in outcome.output
    assert not (save / "metrics.jsonl").exists()
