"""`make mutants` counts killed mutants, and draws the same sample again from the same seed."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import DEVIATIONS, Count

ENTRIES = ["pkg/rules/*", "pkg/one.py"]


def write_results(root: Path, codes: Mapping[str, Mapping[str, int | None]]) -> None:
    """Writes the files in which mutmut keeps the exit code of each mutant, and the project's list."""
    for name, given in codes.items():
        path = root / "mutants" / f"{name}.meta"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"exit_code_by_key": given}))
    (root / "pyproject.toml").write_text(f"[tool.mutmut]\nonly_mutate = {json.dumps(ENTRIES)}\n")


@pytest.mark.parametrize("killed,num", [(38, 40), (0, 40), (40, 40), (570, 600)])
def test_bounds_of_the_interval_solve_the_equation_of_wilson(killed: int, num: int) -> None:
    count = Count(killed=killed, run=num, total=10 * num)
    for bound in count.interval:
        assert (killed / num - bound) ** 2 == pytest.approx(DEVIATIONS**2 * bound * (1 - bound) / num)
    assert count.interval[0] <= killed / num <= count.interval[1]


def test_sample_has_up_to_num_of_each_entry_and_follows_from_the_seed() -> None:
    names = {"a": [f"a{i}" for i in range(100)], "b": ["b0", "b1"]}
    chosen = mutants.sample(names, 40, seed=1)
    assert len([name for name in chosen if name.startswith("a")]) == 40 and {"b0", "b1"} < chosen
    assert chosen == mutants.sample({"b": ["b1", "b0"], "a": names["a"][::-1]}, 40, seed=1)
    assert chosen != mutants.sample(names, 40, seed=2)


def test_survivors_are_named_and_entries_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: dict[str, dict[str, int | None]] = {
        "pkg/rules/a.py": {"x1": 1, "x2": 0, "x3": None},
        "pkg/rules/b.py": {"y1": -24},
        "pkg/one.py": {"z1": 33},
    }
    write_results(tmp_path, codes)
    whole = mutants.report(tmp_path / "mutants", ENTRIES)
    assert (whole.killed, whole.run, whole.total) == (2, 4, 5)
    lines = capsys.readouterr().out.splitlines()
    assert {"    x2", "    z1"} < set(lines) and "    x3" not in lines
    (rules,) = [line for line in lines if line.endswith("  pkg/rules/*")]
    assert rules.split()[:3] == ["2", "of", "3"]


@pytest.mark.parametrize(
    "num_killed,num_left,sample,code",
    [(95, 0, 0, 0), (94, 0, 0, 1), (95, 5, 0, 1), (94, 5, 10, 0), (80, 5, 10, 1), (0, 5, 10, 1)],
)
def test_too_few_killed_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_killed: int, num_left: int, sample: int, code: int
) -> None:
    """Of 100 mutants that ran. A sample fails only if the share of all is below the bar with certainty."""
    results = [1] * num_killed + [0] * (100 - num_killed) + [None] * num_left
    write_results(tmp_path, {"pkg/one.py": {f"x{i}": result for i, result in enumerate(results)}})
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(mutants, "run_sample", lambda num, seed: asked.append((min(num, 1000), seed)))
    assert mutants.main(["--sample", str(sample), "--seed", "3"]) == code
    assert asked == [(sample or 1000, 3)]
