"""The proving ground from pre-training to tables, with a base model that knows nothing."""

import dataclasses
from pathlib import Path

import pytest

from examples.benchmark_reproduction import preloading
from examples.proving_ground import pretrain_base, run
from examples.proving_ground.worlds import CORPORA
from tests import forking


def test_a_study_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preloading, "run_program", forking.run_program)
    study = (run.FOLDER / "study.toml").read_text(encoding="utf-8")
    assert "max-new-tokens = 160" in study
    (tmp_path / "study.toml").write_text(
        study.replace("max-new-tokens = 160", "max-new-tokens = 24"), encoding="utf-8"
    )
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    corpus = CORPORA["programs"]
    phase = dataclasses.replace(corpus.phases[0], steps=2)
    monkeypatch.setitem(CORPORA, "programs", dataclasses.replace(corpus, phases=(phase,)))
    pretrain_base.main(["programs", "--output", str(tmp_path / "bases" / "programs")])
    command = [
        "--output", str(tmp_path / "out"), "--bases", str(tmp_path / "bases"), "--worlds", "programs",
        "--methods", "rasft", "--seeds", "1", "--steps", "5", "--num-train", "32", "--limit", "2",
    ]  # fmt: skip
    assert run.main(command) == 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| rasft | 1 |" in text
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    capsys.readouterr()
    assert run.main(command) == 0, "the second call goes on after the last finished task"
    assert capsys.readouterr().out == text + "\n"
