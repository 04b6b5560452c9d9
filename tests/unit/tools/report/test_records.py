"""Reading of metrics.jsonl, config.json and the model card."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.tools.report.records import read_run
from megatron_rasft.weights.model_card import CARD_FILE
from tests.unit.tools.report.synthetic import write_run


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_last_record_of_a_repeated_step_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    again = [r | {"objective/loss": 9.0 + r["step"]} for r in records_of(path) if r["step"] in (5, 6)]
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in again)
        file.write('{"event": "step", "st')  # like a run that was killed while it wrote
    run = read_run(folder)
    assert list(run.steps) == list(range(1, 13))
    assert (run.num_repeated, run.num_unreadable) == (2, 1)
    losses = dict(run.points("objective/loss"))
    assert losses[5] == 14 and losses[6] == 15 and losses[4] < 1 and losses[7] < 1


def test_seconds_of_the_phases_add_up_to_the_wall_clock_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    records = records_of(folder / "metrics.jsonl")
    seconds = read_run(folder).seconds()
    refreshes = [r for r in records if "rollout/generate_s" in r]
    assert seconds["training"] == pytest.approx(sum(r.get("training/step_s", 0) for r in records))
    assert seconds["sync"] == pytest.approx(sum(r["sync/total_s"] for r in refreshes))
    assert seconds["generate"] + seconds["sync"] == pytest.approx(
        sum(r["rollout/generate_s"] for r in refreshes)
    )
    assert sum(seconds.values()) == pytest.approx(records[-1]["time"] - records[0]["time"])
    # If the first record is a refresh, its phases ended before its recorded time.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[1:]))
    total = sum(read_run(folder).seconds().values())
    assert total == pytest.approx(records[-1]["time"] - records[1]["time"] + 30 + 3 + 5)


def test_files_are_found_where_the_configuration_names_them(tmp_path: Path) -> None:
    elsewhere = write_run(tmp_path / "elsewhere")
    folder = tmp_path / "run"
    (folder / "hf").mkdir(parents=True)
    rooms = {
        "run": {"rasft_metrics": str(elsewhere / "metrics.jsonl")},
        "rollout": {"rollout_store": str(elsewhere / "rollouts.jsonl")},
    }
    config = {"rasft": rooms, "megatron": {"export_hf": str(folder / "hf"), "lr": "1e-05", "fp8": "None"}}
    (folder / "config.json").write_text(json.dumps(config))
    card = "# model\n\n| | |\n| --- | --- |\n| Parameters | 1,234 |\n| Loss | 0.5 |\n\nWritten by megatron_rasft.\n"
    (folder / "hf" / CARD_FILE).write_text(card)
    run = read_run(folder)
    assert len(run.steps) == 12 and run.rollouts_path == elsewhere / "rollouts.jsonl"
    assert run.card == {"Parameters": "1,234", "Loss": "0.5", "Exported to": str(folder / "hf")}
    assert run.megatron("lr") == "1e-05" and run.megatron("fp8") is None


def test_damaged_configuration_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for content in ("{", "[]", '{"rasft": []}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_run(folder)
