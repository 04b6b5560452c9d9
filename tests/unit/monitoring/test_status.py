"""status.json says how a run ended."""

import json
from pathlib import Path

import pytest

from megatron_rasft.errors import RasftError
from megatron_rasft.monitoring.status import STATUS_FILE, RunStatus


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"state": "finished", "from_the_future": 1}']
)
def test_a_file_that_holds_no_status_is_no_status(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / STATUS_FILE).write_text(content)
    status = RunStatus.read(tmp_path)
    assert status == (RunStatus(state="finished") if content and "finished" in content else None)
    assert RunStatus.read(None) is None


def test_a_status_comes_back_as_it_was_written(tmp_path: Path) -> None:
    status = RunStatus(state="stopped", step=3, num_steps=9, reason="a signal", save_s=0.5)
    status.write(tmp_path)
    assert RunStatus.read(tmp_path) == status
    assert json.loads((tmp_path / STATUS_FILE).read_text())["time"] > 0
    with pytest.raises(RasftError, match="--save"):
        status.write(tmp_path / "missing")
