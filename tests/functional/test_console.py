"""What a user sees of a run: its plan before it starts, lines during long work, warnings, and the answer to Ctrl-C."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest

from megatron_rasft.monitoring.status import RunStatus
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.functional.launching import Interruption


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "logs" not in path.parts}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dry_run_describes_the_run_and_writes_nothing(
    workshop: Workshop, tmp_path: Path, world_size: int
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(workshop.sums.read_text() + json.dumps({"problem": "1 + 1", "response": "2"}) + "\n")
    save, export = tmp_path / "save", tmp_path / "exported"
    more = ["--train-iters", "4", "--save", str(save), "--export-hf", str(export), "--data-bad-rows", "skip"]
    flags = workshop.flags(*more, "--dry-run", data=data, model=workshop.random)
    (tmp_path / "logs").mkdir()
    before = files_below(tmp_path)
    outcome = launching.run(tmp_path / "logs", flags, world_size)
    assert outcome.codes == [0] * world_size, outcome.output
    assert files_below(tmp_path) == before
    first, *others = outcome.logs
    assert not any(others), "one process prints"
    rows = {line[:16].strip(): line[16:] for line in first.splitlines()}
    assert rows["rows"] == "41" and rows["usable"] == "40" and f'{data}:41: no "answer"' in first
    assert rows["steps"].startswith("4 of 8 problems") and rows["refreshes"].startswith("2, every 3 steps")
    assert "never trains on 8 of 40 problems" in first and "128 rollouts" in first
    assert "iB" in rows["memory"] and "step 0" in rows["starts"]
    for name in (save, save / "metrics.jsonl", save / "rollouts.jsonl", export):
        assert f"would write     {name}: " in first


def test_a_dry_run_meets_the_errors_that_the_run_would_meet(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = workshop.flags("--save", str(tmp_path / "file"), "--dry-run", model=workshop.random)
    # The file in which torchrun expects the error cannot be written.
    full = {"TORCHELASTIC_ERROR_FILE": "/dev/full"}
    outcome = launching.run(tmp_path / "logs", flags, variables=full)
    (error,) = outcome.errors
    assert outcome.codes == [2] and "--save" in error and str(tmp_path / "file") in error
    assert "Traceback" not in outcome.output


def begin_when_shown() -> None:
    """Makes long work, which takes milliseconds here, begin only when a line about it has been shown."""
    from megatron_rasft.monitoring.live import LiveLine

    shows = LiveLine.shows

    @contextmanager
    def shows_first(line: LiveLine, *work: Any) -> Iterator[None]:
        with shows(line, *work):
            said_at = line._said_at
            while line._said_at == said_at:
                time.sleep(0.001)
            yield

    LiveLine.shows = shows_first  # type: ignore[method-assign,assignment]


def test_long_work_is_shown_and_the_first_ctrl_c_saves(workshop: Workshop, tmp_path: Path) -> None:
    save = tmp_path / "save"
    flags = workshop.flags(
        *("--save", str(save), "--train-iters", "9", "--rasft-live-s", "0.002", "--rasft-warn-frac", "0"),
        *("--rollout-max-new-tokens", "2"),  # cuts every response
    )
    interruption = Interruption(step=2, number=SIGINT)
    outcome = launching.run(
        *(tmp_path / "logs", flags, 2),
        interruption=interruption,
        prepare_rank=lambda rank: [begin_when_shown],
    )
    assert outcome.codes == [0, 0], outcome.output
    first, second = outcome.logs
    for label in ("sampling: ", "scoring: ", "verifying: "):
        assert f"\n{label}" in first and label not in second
    assert "sampling: 0 of 48 rollouts of the first of 2 replicas" in first
    (refresh,) = (line for line in first.splitlines() if line.startswith("refresh: "))
    assert "100.0% cut by length" in refresh and "--rollout-max-new-tokens" in first
    status = RunStatus.read(save)
    assert status is not None and (status.state, status.step, status.reason) == ("stopped", 2, "Ctrl-C")
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
