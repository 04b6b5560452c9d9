"""Every objective, curriculum and layout runs from start to end and writes its records."""

import json
import math
from pathlib import Path
from signal import SIGTERM

import pytest

from megatron_rasft.objective.families import OBJECTIVES
from tests.functional import launching
from tests.functional.conftest import Workshop

USES_ROLLOUTS = ("rasft", "gft", "raft", "grpo", "sdft")
FLAGS = {"sdft": ["--objective-sdft-template", "{demonstration}{problem}"]}
"""Objective -> flags that its run needs. The words of sdft's default template are not in the policy's vocabulary."""


def rollouts_of(save: Path) -> list[dict[str, object]]:
    path = save / "rollouts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def refreshes_of(save: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == "refresh"]


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_objective_trains(workshop: Workshop, tmp_path: Path, objective: str) -> None:
    save = tmp_path / "save"
    flags = ["--objective", objective, "--train-iters", "3", "--rasft-refresh-interval", "2"]
    flags += FLAGS.get(objective, [])
    workshop.train(save, flags)
    records = launching.steps(save)
    assert list(records) == [1, 2, 3]
    for record in records.values():
        assert math.isfinite(record["objective/loss"])
        assert record["training/grad_norm"] > 0
    assert bool(rollouts_of(save)) == (objective in USES_ROLLOUTS)


def test_sdft_goes_on_with_the_teachers_log_probabilities_in_the_middle_of_a_refresh(
    workshop: Workshop, tmp_path: Path
) -> None:
    flags = ["--objective", "sdft", *FLAGS["sdft"], "--train-iters", "3", "--rasft-refresh-interval", "2"]
    unbroken, save = tmp_path / "unbroken", tmp_path / "save"
    workshop.train(unbroken, flags)
    interrupted = workshop.flags("--save", str(save), *flags)
    stop = launching.Interruption(step=1, number=SIGTERM)
    assert launching.run(tmp_path / "logs", interrupted, 1, interruption=stop).codes == [0]
    assert list(launching.steps(save)) == [1]
    workshop.train(save, flags)
    assert launching.steps(save) == launching.steps(unbroken)
    assert {rollout["verdict"] for rollout in rollouts_of(save)} == {None}
    for refresh in refreshes_of(save):
        assert refresh["rollout/num_rollouts"] > 0 and "verify/solve_rate" not in refresh


def test_untrained_model_learns_the_form_of_an_answer(workshop: Workshop, tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path), "--curriculum-mode", "off", "--train-iters", "8", "--lr", "1e-2"]
    launching.succeed(tmp_path / "logs", workshop.flags(*flags, "--objective", "sft", model=workshop.random))
    losses = launching.losses(tmp_path)
    assert losses[0] == pytest.approx(math.log(26), abs=0.5), "a random model knows nothing of 26 symbols"
    assert losses[-1] < 0.75 * losses[0]


@pytest.fixture(scope="module")
def recorded(workshop: Workshop) -> Path:
    """A rasft run of two refreshes on 40 problems, one epoch."""
    save = workshop.root / "recorded"
    workshop.train(save)
    return save


def test_run_leaves_its_records(workshop: Workshop, recorded: Path) -> None:
    rollouts = rollouts_of(recorded)
    assert len(rollouts) == 40 * 4
    assert {"correct", "wrong"} <= {r["verdict"] for r in rollouts} <= {"correct", "wrong", "unverifiable"}
    assert {r["finish_reason"] for r in rollouts} >= {"stop"}
    assert {r["weight_version"] for r in rollouts} == {0, 3}
    for refresh in refreshes_of(recorded):
        sampled = [
            r for r in rollouts if r["weight_version"] == refresh["step"] and not r["num_guide_tokens"]
        ]
        correct = sum(r["verdict"] == "correct" for r in sampled)
        assert refresh["rollout/num_rollouts"] == len(sampled)
        assert refresh["verify/correct_frac"] == pytest.approx(correct / len(sampled))
    resolved = json.loads((recorded / "config.json").read_text())
    assert resolved["rasft"]["rollout"]["rollout_max_new_tokens"] == 12
    assert resolved["megatron"]["train_iters"] == "5"


def test_replay_trains_as_the_run_that_sampled(workshop: Workshop, recorded: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    store = recorded / "rollouts.jsonl"
    workshop.train(save, ["--rollout-engine", "replay", "--rollout-replay", str(store)])
    assert launching.losses(save) == launching.losses(recorded)
    assert not rollouts_of(save)


@pytest.mark.parametrize(
    ("mode", "fewest", "most"),
    [("off", 0, 0), ("band", 1, 39)],
)
def test_curriculum_decides_who_is_sampled(
    workshop: Workshop, tmp_path: Path, mode: str, fewest: int, most: int
) -> None:
    save = tmp_path / "save"
    workshop.train(save, ["--curriculum-mode", mode])
    assert fewest <= len({r["problem_id"] for r in rollouts_of(save)}) <= most
    assert sum(r["curriculum/sampled_problems"] for r in refreshes_of(save)) <= most
    assert len(launching.losses(save)) == 5


def test_published_weights_replace_the_adaptive(workshop: Workshop, recorded: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    workshop.train(save, ["--rasft-weighting", "published", "--no-verify-filter-format"])
    chosen = json.loads((save / "config.json").read_text())["rasft"]["verify"]
    switches = {name for name, value in chosen.items() if name.startswith("verify_filter") and value}
    assert "verify_filter_symbols" in switches and "verify_filter_shortcut" in switches, "as in the script"
    assert not switches & {"verify_filter_format", "verify_filter_too_short"}, "a flag says otherwise"
    first, published = launching.steps(recorded)[1], launching.steps(save)[1]
    assert published["training/num_samples"] > 0
    assert published["objective/loss"] != first["objective/loss"]


def test_padded_batches_train_as_packed(workshop: Workshop, recorded: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    workshop.train(save, ["--rasft-batch-layout", "padded", "--micro-batch-size", "2"])
    assert launching.losses(save) == pytest.approx(launching.losses(recorded), abs=1e-5, rel=0)
