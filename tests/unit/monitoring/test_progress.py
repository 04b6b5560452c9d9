"""Every value reaches metrics.jsonl and the trackers, and only rank 0 prints."""

import json
import math
from pathlib import Path

import pytest

from megatron_rasft import metrics
from megatron_rasft.errors import RasftError
from megatron_rasft.monitoring.progress import Progress


class Recorder:
    """A ScalarWriter that stores the values it gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))


def test_a_step_is_one_line_and_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Recorder()
    progress = Progress(10, tmp_path / "metrics.jsonl", writer)
    times = {
        metrics.STEP_S: 2.0,
        metrics.DATA_S: 0.25,
        metrics.FORWARD_BACKWARD_S: 1.5,
        metrics.OPTIMIZER_S: 0.25,
    }
    progress.step(3, {metrics.LOSS: 0.5, metrics.SOLVE_RATE: math.nan, "objective/p_mean": 0.25, **times})
    line = capsys.readouterr().out.strip()
    assert line.startswith("step 3/10")
    assert "loss 0.5000" in line
    assert line.endswith("s 2.00 (data 0.25, forward-backward 1.50, optimizer 0.25)")
    assert "nan" not in line
    (record,) = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 3
    assert record[metrics.LOSS] == 0.5
    assert record["objective/p_mean"] == 0.25
    assert metrics.SOLVE_RATE not in record
    assert (metrics.LOSS, 0.5, 3) in writer.seen


def test_a_note_ends_the_line_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(10).step(3, {metrics.LOSS: 0.5}, "slow: rank 1")
    assert capsys.readouterr().out.strip().endswith("0.5000  slow: rank 1")


def test_an_error_of_metrics_jsonl_names_the_file_and_its_flag() -> None:
    with pytest.raises(RasftError, match=r"/dev/full.*--rasft-metrics"):
        Progress(10, Path("/dev/full")).step(1, {metrics.LOSS: 1.0})


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, tmp_path / "metrics.jsonl", is_silent=True)
    progress.step(1, {metrics.LOSS: 1.0})
    progress.refresh(1, {metrics.LOSS: 1.0}, "refresh")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "metrics.jsonl").exists()
