"""--verify-function: rewards and verdicts of the user's own function, and an error for every way in which it can be wrong."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import ProblemRow, Rollout
from megatron_rasft.verify import pool as pool_module
from megatron_rasft.verify.function_trial import try_function
from megatron_rasft.verify.own_function import FAILED, FunctionError, find_function, judged
from megatron_rasft.verify.pool import VerifierPool

ROW: ProblemRow = {"problem": "p", "response": "r", "wanted": {"a": 1}}


def config(file: Path, code: str, name: str = "grade", **values: Any) -> VerifyConfig:
    file.write_text(code)
    limits = {"verify_num_workers": 1, "verify_timeout_s": 600.0}  # no function is late on a busy machine
    return VerifyConfig(verify_function=f"{file}:{name}", **{**limits, **values})


def graded(config: VerifyConfig, texts: list[str], row: ProblemRow = ROW) -> list[Rollout]:
    rollouts = [Rollout.of_text("p", text) for text in texts]
    with VerifierPool(config) as pool:
        pool.verify(rollouts, {"p": row})
    return rollouts


@pytest.mark.parametrize(
    ("returned", "verdict", "reward"),
    [
        (True, "correct", 1.0),
        (False, "wrong", 0.0),
        (1, "correct", 1.0),
        (0.0, "wrong", 0.0),
        (0.79, "wrong", 0.79),
        (0.8, "correct", 0.8),
        (np.float32(0.5), "wrong", 0.5),
        (np.bool_(True), "correct", 1.0),
        (np.array(0.25), "wrong", 0.25),
        ("correct", "correct", 1.0),
        ("wrong", "wrong", 0.0),
        ("unverifiable", "unverifiable", None),
        ("timeout", "timeout", None),
        ((0.9, "nearly"), "correct", 0.9),
    ],
)
def test_every_judgement_has_its_verdict_and_reward(
    returned: Any, verdict: str, reward: float | None
) -> None:
    found = judged(returned, correct_reward=0.8)
    assert (found[0], found[2]) == (verdict, reward)
    assert type(found[2]) in (float, type(None))
    assert (found[1] == "nearly") == isinstance(returned, tuple)


@pytest.mark.parametrize(
    "returned", [None, "yes", 1.01, -0.01, math.nan, math.inf, [1], {}, (1, "a", "b"), 1j, np.zeros(2)]
)
def test_what_is_not_a_judgement_is_refused(returned: Any) -> None:
    with pytest.raises(FunctionError):
        judged(returned, correct_reward=1.0)


FAULTS = [
    ("def other(row, response): return True", "other"),
    ("grade = 5", "int"),
    ("def grade(row): return True", "(row, response)"),
    ("def grade(row, response, more): return True", "(row, response)"),
    ("async def grade(row, response): return True", "asynchronous"),
    ("import nowhere_to_be_found", "own.py:1"),
    ("import sys\nsys.exit(3)", "SystemExit"),
    ("def grade(row, response)\n    return True", "own.py:1"),
    ("def grade(row, response):\n    return row['absent']", "KeyError: 'absent' (own.py:2)"),
    ("def grade(row, response): raise SystemExit(3)", "SystemExit: 3 (own.py:1)"),
    ("def grade(row, response): return 1.5", "1.5"),
    ("def grade(row, response): return float('nan')", "nan"),
    ("def grade(row, response): return None", "None"),
    ("import os\ndef grade(row, response): os._exit(3)", "grader crashed"),
]


@pytest.mark.parametrize(("code", "named"), FAULTS)
def test_faulty_function_is_refused_at_the_start_with_flag_row_and_cause(
    code: str, named: str, tmp_path: Path
) -> None:
    faulty = config(tmp_path / "own.py", code)
    with pytest.raises(ValueError, match="--verify-function") as error:
        try_function(faulty, ROW, "r", "rows.jsonl:1")
    assert named in str(error.value) and "rows.jsonl:1" in str(error.value)


def test_function_that_does_not_end_is_refused_at_the_start(tmp_path: Path) -> None:
    endless = config(
        tmp_path / "own.py", "def grade(row, response):\n    while True: pass", verify_timeout_s=0.5
    )
    with pytest.raises(ValueError, match="--verify-timeout-s"):
        try_function(endless, ROW, "r", "rows.jsonl:1")


@pytest.mark.parametrize(
    "reference", ["absent.py:grade", "{file}", "{file}:", "{file}:a-b", "no_such_entry", "a/b"]
)
def test_reference_to_nothing_is_refused_without_running_anything(reference: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("raise SystemExit")
    with pytest.raises(ValueError, match="--verify-function"):
        VerifyConfig(verify_function=reference.format(file=file))


def test_threshold_without_a_function_is_refused() -> None:
    with pytest.raises(ValueError, match="--verify-correct-reward"):
        VerifyConfig(verify_correct_reward=0.5)


def test_function_gets_the_row_and_the_response(tmp_path: Path) -> None:
    code = "def grade(row, response): return (row['wanted'] == {'a': 1}) * 0.5, response + '!'"
    (rollout,) = graded(config(tmp_path / "own.py", code), ["text"])
    assert (rollout.verdict, rollout.reward, rollout.verdict_reason) == ("wrong", 0.5, "text!")


def test_response_that_was_not_graded_has_no_reward(tmp_path: Path) -> None:
    truncated = Rollout.of_text("p", "r")
    truncated.finish_reason, truncated.reward = "length", 0.7  # as from a replayed store
    with VerifierPool(config(tmp_path / "own.py", "def grade(row, response): return 1")) as pool:
        pool.verify([truncated], {"p": ROW})
    assert (truncated.verdict, truncated.reward) == ("wrong", None)


def test_failure_in_a_run_is_unverifiable_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = "def grade(row, response): return 1 / (response != 'bad')"
    rollouts = graded(config(tmp_path / "own.py", code), ["good", "bad", "good"])
    assert Counter(r.verdict for r in rollouts) == {"correct": 2, "unverifiable": 1}
    assert rollouts[1].verdict_reason.startswith(FAILED) and rollouts[1].reward is None
    (said,) = caplog.messages
    assert "--verify-function" in said and "1 of 3" in said and "ZeroDivisionError" in said


def test_slow_function_is_called_once_with_the_whole_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_FIRST_ROUND_SHARE", 0.0)  # a first round would interrupt the function
    calls = tmp_path / "calls"
    code = f"""import time
def grade(row, response):
    open({str(calls)!r}, "a").write("x")
    time.sleep(0.8)
    return True
"""
    (rollout,) = graded(config(tmp_path / "own.py", code), ["r"])
    assert rollout.verdict == "correct"
    assert calls.read_text() == "x"


def test_time_of_imports_does_not_count(tmp_path: Path) -> None:
    """A grading runs under a timer of the worker, which must not run yet while the file is imported."""
    code = """import signal
LEFT_S = signal.getitimer(signal.ITIMER_REAL)[0]
def grade(row, response): return LEFT_S == 0 < signal.getitimer(signal.ITIMER_REAL)[0]
"""
    (rollout,) = graded(config(tmp_path / "own.py", code), ["r"])
    assert rollout.verdict == "correct"


def test_file_may_import_its_neighbours_and_define_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "beside_own.py").write_text("def judge(text): return text == 'r'")
    code = """from __future__ import annotations
from dataclasses import dataclass
from beside_own import judge

@dataclass
class Answer:
    text: str

class Grader:
    def __call__(self, row, response): return judge(Answer(response).text)

grade = Grader()
"""
    assert [r.verdict for r in graded(config(tmp_path / "own.py", code), ["r", "s"])] == ["correct", "wrong"]


def test_edit_during_a_run_has_no_effect_until_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    first = config(file, "def grade(row, response): return True", verify_max_tasks_per_worker=1)
    with VerifierPool(first) as pool:
        file.write_text("def grade(row, response): return False")
        rollouts = [Rollout.of_text("p", str(i)) for i in range(3)]
        pool.verify(rollouts, {"p": ROW})
        assert {r.verdict for r in rollouts} == {"correct"}
        assert pool.function is not None
        assert pool.function.digest != find_function(f"{file}:grade").digest


def test_digest_changes_with_the_modules_that_the_file_imports(tmp_path: Path) -> None:
    file, neighbour = tmp_path / "own.py", tmp_path / "rules.py"
    file.write_text("from rules import limit\ndef grade(row, response): return len(response) < limit")
    neighbour.write_text("limit = 3")
    before = find_function(f"{file}:grade").digest
    assert find_function(f"{file}:grade").digest == before
    neighbour.write_text("limit = 4")
    assert find_function(f"{file}:grade").digest != before


def test_a_failure_names_the_line_of_the_function(tmp_path: Path) -> None:
    for code, line in {
        "\ndef grade(row, response): return 5": 2,
        "\n\nclass Grader:\n    def __call__(self, row, response): return 5\ngrade = Grader()": 4,
        "def grade(row): return 1": 1,
        "def grade(row, response):\n    return row['absent']": 2,
    }.items():
        (rollout,) = graded(config(tmp_path / "own.py", code), ["r"])
        assert rollout.verdict_reason.startswith(FAILED) and f"(own.py:{line})" in rollout.verdict_reason


def test_installed_function_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "graders_of_a_team"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "short.py").write_text("def grade(row, response): return len(response) < 3")
    info = tmp_path / "graders_of_a_team-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graders-of-a-team\nVersion: 1.0\n")
    entry = "[megatron_rasft.verifiers]\nshort = graders_of_a_team.short:grade\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = VerifyConfig(verify_function="short", verify_num_workers=1, verify_timeout_s=600.0)
    assert [r.verdict for r in graded(installed, ["ab", "abc"])] == ["correct", "wrong"]
    assert "graders_of_a_team" not in sys.modules, "the trainer does not import the user's code"
    before = find_function("short").digest
    (package / "short.py").write_text("def grade(row, response): return True")
    assert find_function("short").digest != before
    other = tmp_path / "others-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[megatron_rasft.verifiers]\nshort = others:grade\n")
    with pytest.raises(ValueError, match=r"--verify-function short.*others:grade"):
        find_function("short")
