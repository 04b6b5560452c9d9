"""Rounds of benchmarks/kill_and_resume.py are drawn, timed by a run's files, counted and continued. The runs are left out."""

import json
import threading
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import kill_and_resume
from benchmarks.kill_and_resume import Moment, Result, Round, Strike, draw, judged


def test_six_rounds_in_a_row_have_every_moment_and_a_seed_repeats_them() -> None:
    rounds = [draw(number, seed=3) for number in range(60)]
    assert rounds == [draw(number, seed=3) for number in range(60)]
    for start in range(0, 60, 6):
        assert {r.moment for r in rounds[start : start + 6]} == {*get_args(Moment)}
    assert {r.num_processes for r in rounds} == {1, 2, 4}
    assert {(r.signal, r.hits_all) for r in rounds} == {
        (s, a) for s in ("TERM", "KILL") for a in (True, False)
    }
    under_slurm = {
        (r.num_processes, r.signal, r.hits_all) for n in range(60) if (r := draw(n, 3, is_slurm=True))
    }
    assert under_slurm == {(2, "TERM", True), (2, "KILL", True), (2, "KILL", False)}


def strike(folder: Path, moment: Moment) -> Strike:
    return Strike(
        round=Round(number=0, num_processes=1, moment=moment, signal="TERM", hits_all=True, share=0.0),
        save=folder / "save",
        export=folder / "hf",
        saved_steps=(2,),
        last_steps=(3,),
        start_s=0.0,
    )


@pytest.mark.parametrize("moment", get_args(Moment))
def test_moment_begins_with_the_files_of_the_run(tmp_path: Path, moment: Moment) -> None:
    at = strike(tmp_path, moment)
    assert at.has_begun() == (moment == "start")
    assert at.wait(is_over=lambda: True) is False
    (tmp_path / "save" / "iter_0000002").mkdir(parents=True)
    assert at.has_begun() == (moment in ("start", "save", "async save"))
    (tmp_path / "save" / "metrics.jsonl").write_text('{"event": "step"}\n' * 3)
    (tmp_path / ".hf.partial-1").mkdir()
    waiting = threading.Thread(target=at.wait, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


def test_equal_run_is_identical_and_its_first_new_step_is_timed(tmp_path: Path) -> None:
    lines = [
        {"event": "step", "time": 90.0},
        {"event": "refresh", "time": 101.0},
        {"event": "step", "time": 104.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def differ() -> None:
        raise AssertionError("weights")

    result = judged(draw(0, 0), lambda: None, tmp_path, 100.0, is_missed=False)
    assert (result.outcome, result.first_step_s) == ("identical", 4.0)
    assert judged(draw(0, 0), lambda: None, tmp_path, 100.0, is_missed=True).outcome == "missed"
    assert judged(draw(0, 0), differ, tmp_path, 100.0, is_missed=False).outcome == "different"


def test_rounds_are_counted_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    def run(self: object, round_: Round) -> Result:
        ran.append(round_.number)
        return Result(
            round=round_, outcome="refused" if round_.number == 2 else "identical", first_step_s=2.5
        )

    monkeypatch.setattr(kill_and_resume, "build_workshop", lambda folder: None)
    monkeypatch.setattr(kill_and_resume.Local, "run", run)
    flags = ["--results", str(tmp_path / "rounds.jsonl"), "--rounds"]
    assert kill_and_resume.main([*flags, "2"]) == 0
    assert kill_and_resume.main([*flags, "3"]) == 1
    assert ran == [0, 1, 2]
    assert "3 rounds: 2 identical, 0 different, 1 refused, 0 hung" in capsys.readouterr().out
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"--results .* line 1"):
        kill_and_resume.main([*flags, "3"])
