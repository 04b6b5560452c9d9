"""Rounds of benchmarks/kill_and_resume.py are drawn, timed by a run's files, counted and continued. The runs are left out."""

import json
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

import psutil
import pytest

from benchmarks import kill_and_resume
from benchmarks.interruptions import Moment, Outcome, Result, Round, Strike, draw, judged
from benchmarks.interruptions_under_slurm import UnderSlurm
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Runs


def test_six_rounds_in_a_row_have_every_moment_and_a_seed_repeats_them() -> None:
    rounds = [draw(number, seed=3) for number in range(60)]
    assert rounds == [draw(number, seed=3) for number in range(60)]
    for start in range(0, 60, 6):
        assert {r.moment for r in rounds[start : start + 6]} == {*get_args(Moment)}
    assert {r.num_processes for r in rounds} == {1, 2, 4}
    assert {(r.signal, r.hits_all) for r in rounds} == {
        (s, a) for s in ("TERM", "KILL") for a in (True, False)
    }


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
    waiting.join(600)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    ("number", "before", "begin"),
    [
        ("KILL", "health-0-n1.log", "trainer-0-n1.log"),
        ("TERM", "trainer-0-n1.log", "torchrun/1-0_abcdefgh/attempt_0"),
    ],
)
def test_start_under_slurm_begins_with_files_of_its_programs(
    tmp_path: Path, number: Literal["TERM", "KILL"], before: str, begin: str
) -> None:
    at = strike(tmp_path, "start")
    at = replace(at, round=replace(at.round, signal=number), logs=tmp_path / "logs")
    assert not at.has_begun()
    (tmp_path / "logs" / before).mkdir(parents=True)
    assert not at.has_begun()
    (tmp_path / "logs" / begin).mkdir(parents=True)
    assert at.has_begun()


@dataclass
class Facts:
    """Stands for the cluster: the answers to questions about a job, one after the other."""

    answers: list[tuple[str, int]]
    """States of the job, with its restarts."""
    started: list[int] = field(default_factory=list)
    """The restarts that the round asked for."""

    def wait_until(self, job: str, *states: str, timeout_s: float, every_s: float) -> dict[str, str]:
        state, restarts = next(answer for answer in iter(self._next, None) if answer[0] in states)
        return {"JobState": state, "Restarts": str(restarts), "StartTime": "2026-11-30T12:00:00"}

    def facts(self, job: str) -> dict[str, str]:
        return {"JobState": "RUNNING"}

    def _next(self) -> tuple[str, int]:
        return self.answers.pop(0)

    def start_now(self, job: str, restart: int, timeout_s: float) -> None:
        self.started.append(restart)


def test_requeued_job_is_started_again_as_often_as_needed(tmp_path: Path) -> None:
    answers = [
        ("PENDING", 0),
        ("RUNNING", 0),
        ("COMPLETING", 0),
        ("PENDING", 1),
        ("RUNNING", 1),
        ("PENDING", 2),
    ]
    cluster = Facts([*answers, ("COMPLETED", 2)])
    facts = UnderSlurm(cast(Cluster, cluster), tmp_path)._finish("1")
    assert (facts["JobState"], cluster.started, cluster.answers) == ("COMPLETED", [1, 2], [])


@dataclass
class Folder:
    """Stands for the runs of a layout: their folder, in which a trainer has begun, and the jobs that were submitted."""

    root: Path
    jobs: list[str] = field(default_factory=list)

    def submit(self, name: str, flags: str) -> str:
        (self.root / name / "logs").mkdir(parents=True, exist_ok=True)
        (self.root / name / "logs" / "trainer-0-n1.log").touch()
        (self.root / name / "checkpoints").mkdir(exist_ok=True)
        (self.root / name / "checkpoints" / "metrics.jsonl").touch()
        self.jobs.append(name)
        return str(len(self.jobs))

    def folder(self, name: str) -> Path:
        return self.root / name

    def processes(self, name: str, words: str, **variables: str) -> list[psutil.Process]:
        return []

    def log(self, name: str) -> str:
        return "log"

    def assert_same(self, name: str) -> None: ...


@pytest.mark.parametrize(
    ("answers", "num_jobs", "outcome"),
    [
        ([("RUNNING", 0), ("PENDING", 1), ("COMPLETED", 1)], 1, "identical"),
        ([("RUNNING", 0), ("FAILED", 0), ("COMPLETED", 0)], 2, "identical"),
        ([("RUNNING", 0), ("FAILED", 0), ("FAILED", 0)], 2, "refused"),
        ([("RUNNING", 0), ("PENDING", 1), ("FAILED", 1)], 1, "refused"),
        ([("RUNNING", 0), ("COMPLETED", 0)], 1, "missed"),
    ],
)
def test_job_is_submitted_again_only_if_it_failed_before_a_checkpoint(
    tmp_path: Path, answers: list[tuple[str, int]], num_jobs: int, outcome: Outcome
) -> None:
    cluster, runs = cast(Cluster, Facts(answers)), Folder(tmp_path)
    round_ = Round(number=0, num_processes=1, moment="start", signal="KILL", hits_all=True, share=0.0)
    result = UnderSlurm(cluster, tmp_path, {1: cast(Runs, runs)}).run(round_)
    assert (result.outcome, len(runs.jobs)) == (outcome, num_jobs)


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
    late = judged(draw(0, 0), lambda: None, tmp_path, 80.0, resumed_at=100.0, is_missed=False)
    assert late.first_step_s == 24.0, "the step at 90 is the interrupted run's"
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
    monkeypatch.setattr(kill_and_resume.Local, "root", lambda self, round_: tmp_path / "runs")
    monkeypatch.setattr(kill_and_resume.Local, "run", run)
    flags = ["--results", str(tmp_path / "rounds.jsonl"), "--rounds"]
    assert kill_and_resume.main([*flags, "2"]) == 0
    assert kill_and_resume.main([*flags, "3"]) == 1
    assert ran == [0, 1, 2]
    assert "3 rounds: 2 identical, 0 different, 1 refused, 0 hung" in capsys.readouterr().out
    assert kill_and_resume.main(["--table", str(tmp_path / "rounds.jsonl")]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = {name.strip(): [*map(str.strip, values)] for name, *values in lines}
    assert cells["all"] == ["3", "2", "0", "1", "0", "0", "2.5", "2.5"]
    for part in (get_args(Moment), ("1 process", "2 processes", "4 processes")):
        assert sum(int(cells[name][0]) for name in part if name in cells) == 3
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"--results .* line 1"):
        kill_and_resume.main([*flags, "3"])


@pytest.mark.parametrize("outcome", ["identical", "missed", "different", "refused", "hung"])
def test_files_of_a_failed_round_are_kept_beside_its_results(tmp_path: Path, outcome: Outcome) -> None:
    root, results = tmp_path / "runs", tmp_path / "rounds.jsonl"
    result = Result(round=draw(1, 0), outcome=outcome)
    names = [result.round.name, f"{result.round.name}.log"]
    (root / names[0] / "logs").mkdir(parents=True)
    (root / names[1]).touch()
    (root / draw(10, 0).name).mkdir()
    kill_and_resume._clear(result, root, results)
    assert [path.name for path in root.iterdir()] == [draw(10, 0).name]
    kept = tmp_path / "rounds-failed"
    is_failed = outcome in ("different", "refused", "hung")
    assert sorted(path.name for path in kept.glob("*")) == (names if is_failed else [])


@pytest.mark.parametrize("flags", [["--at-once", "2"], ["--at-once", "0"], ["--table", "absent.jsonl"]])
def test_wrong_flag_is_refused_by_name(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kill_and_resume.main(flags)
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]
