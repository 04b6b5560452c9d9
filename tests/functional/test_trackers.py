"""TensorBoard and Weights & Biases are given what metrics.jsonl has, through Megatron's own flags."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.functional import launching
from tests.functional.conftest import Workshop


@pytest.fixture(scope="module")
def save(workshop: Workshop) -> Path:
    """A run on two ranks: Megatron's writers are on the last one, metrics.jsonl is rank 0's."""
    folder = workshop.root / "tracked"
    flags = workshop.flags("--save", str(folder), "--train-iters", "2", "--wandb-project", "rasft")
    outcome = launching.run(
        workshop.root / "tracked-logs",
        [*flags, "--wandb-exp-name", "tracked"],
        2,
        variables={"WANDB_MODE": "offline"},
    )
    assert outcome.codes == [0, 0], outcome.output
    return folder


def records_of(save: Path) -> list[dict[str, float]]:
    """Without times, which each rank takes for itself."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    times = ("time", "_s")
    return [
        {k: v for k, v in json.loads(line).items() if k != "event" and not k.endswith(times)}
        for line in lines
    ]


def test_tensorboard_has_every_number(save: Path) -> None:
    events = EventAccumulator(str(save / "tensorboard")).Reload()
    for record in records_of(save):
        step = record.pop("step")
        for name, value in record.items():
            values = [e.value for e in events.Scalars(name) if e.step == step]
            assert any(v == pytest.approx(value, rel=1e-6) for v in values), (name, step)


def test_wandb_has_every_name(save: Path) -> None:
    (log,) = (save / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    names = {name for record in records_of(save) for name in record} - {"step"}
    assert "objective/loss" in names
    missing = [name for name in names if name.encode() not in content]
    assert not missing
