"""TensorBoard and Weights & Biases, turned on by Megatron's own flags, get the same metrics as metrics.jsonl."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.functional import launching
from tests.functional.conftest import Workshop


@pytest.fixture(scope="module")
def save(workshop: Workshop) -> Path:
    """The folder of a run on two ranks. The last rank has Megatron's writers, and rank 0 writes metrics.jsonl."""
    folder = workshop.root / "tracked"
    flags = workshop.flags("--save", str(folder), "--train-samples", "16", "--wandb-project", "rasft")
    flags += ["--log-throughput", "--log-params-norm", "--manual-gc", "--manual-gc-interval", "1"]
    outcome = launching.run(
        workshop.root / "tracked-logs",
        [*flags, "--wandb-exp-name", "tracked"],
        2,
        variables={"WANDB_MODE": "offline"},
    )
    assert outcome.codes == [0, 0], outcome.output
    return folder


def records_of(save: Path) -> list[dict[str, float]]:
    """Returns the records without times, which every rank measures independently."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    times = ("time", "_s")
    return [
        {k: v for k, v in json.loads(line).items() if k != "event" and not k.endswith(times)}
        for line in lines
    ]


def test_throughput_and_norm_are_logged_where_megatrons_flags_ask(save: Path, workshop: Workshop) -> None:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    first, last = [record for record in records if record["event"] == "step"]
    assert last["step"] == 2, "16 samples are two steps"
    weights = load_file(workshop.policy / "model.safetensors").values()
    norm = sum(float(w.double().square().sum()) for w in weights) ** 0.5
    assert first["training/params_norm"] == pytest.approx(norm, rel=0.01)
    operations = 2 * 1e12 * first["training/gpu_tflop_per_s"] * first["training/step_s"]
    assert operations > 6 * sum(w.numel() for w in weights) * first["training/num_tokens"]


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
