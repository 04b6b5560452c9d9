"""A run that is interrupted and resumed equals the uninterrupted run, bit for bit."""

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_rasft import metrics
from megatron_rasft.monitoring.status import RunStatus
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.functional.launching import HeldWrites, Interruption, Phase

STEPS = 9
"""Nearly two epochs of 5 steps. A refresh covers 3 steps of one epoch, so refreshes come before steps 1, 4, 6 and 9."""


def flags_of(save: Path, world_size: int = 1) -> list[str]:
    """The flags of a run. Runs of two processes have guided rollouts, whose sums are part of the state."""
    flags = ["--train-iters", str(STEPS), "--save-interval", "2", "--export-hf", str(save) + "-exported"]
    return [*flags, "--rollout-guided-samples", "1"] if world_size == 2 else flags


def unbroken_run(workshop: Workshop, world_size: int) -> Path:
    save = workshop.root / f"unbroken{world_size}"
    if not save.exists():
        workshop.train(save, flags_of(save, world_size), world_size)
    return save


def interrupted_run(
    workshop: Workshop,
    save: Path,
    interruption: Interruption,
    world_size: int,
    *more: str,
    held_writes: Sequence[HeldWrites] = (),
) -> launching.Outcome:
    return launching.run(
        save.with_name(f"{save.name}-broken-logs"),
        workshop.flags("--save", str(save), *flags_of(save, world_size), *more),
        world_size,
        interruption=interruption,
        held_writes=held_writes,
    )


@pytest.fixture(scope="module")
def stopped_at_7(workshop: Workshop) -> Path:
    """The folder of a run of one process that was stopped between two steps of its third refresh."""
    save = workshop.root / "stopped"
    outcome = interrupted_run(workshop, save, Interruption(step=7, number=SIGTERM), 1)
    assert outcome.codes == [0], outcome.output
    return save


def state_of(save: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((save / f"iter_{step:07d}" / "rasft_state.json").read_text())
    return state


def assert_same_run(save: Path, unbroken: Path) -> None:
    records = launching.steps(unbroken)
    assert list(records) == list(range(1, STEPS + 1))
    assert launching.steps(save) == records
    assert (save / "rollouts.jsonl").read_bytes() == (unbroken / "rollouts.jsonl").read_bytes()
    weights = load_file(f"{save}-exported/model.safetensors")
    expected = load_file(f"{unbroken}-exported/model.safetensors")
    assert weights.keys() == expected.keys()
    differing = [name for name, tensor in expected.items() if not tensor.equal(weights[name])]
    assert not differing


@pytest.mark.parametrize(
    ("world_size", "phase", "step"),
    [(1, "step", 7), (2, "generate", 3), (1, "verify", 5), (1, "score", 8)],
)
def test_a_run_stopped_by_sigterm_resumes_as_if_uninterrupted(
    workshop: Workshop, tmp_path: Path, world_size: int, phase: Phase, step: int
) -> None:
    unbroken = unbroken_run(workshop, world_size)
    save = tmp_path / "save"
    # Only one rank receives the signal, but all must stop after the same step.
    term = Interruption(step=step, number=SIGTERM, only_rank=world_size - 1, phase=phase)
    outcome = interrupted_run(workshop, save, term, world_size)
    assert outcome.codes == [0] * world_size, outcome.output
    assert f"signal after step {step}" in outcome.output
    assert "Traceback" not in outcome.output
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(step)
    assert max(launching.steps(save)) == step
    assert not Path(f"{save}-exported").exists()
    num_left = 1 if phase == "step" else 0  # between two steps of a refresh, or in the refresh after them
    assert len(state_of(save, step)["queue"]) == num_left
    resumed = workshop.train(save, flags_of(save, world_size), world_size)
    assert f"after step {step}" in resumed.output
    assert_same_run(save, unbroken)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_resumes_from_its_last_checkpoint(
    workshop: Workshop, tmp_path: Path, world_size: int
) -> None:
    unbroken = unbroken_run(workshop, world_size)
    save = tmp_path / "save"
    # The last checkpoint is of step 8. The rollouts of the next refresh are written, but belong to no checkpoint.
    kill = Interruption(step=9, number=SIGKILL)
    outcome = interrupted_run(workshop, save, kill, world_size)
    assert outcome.codes == [-SIGKILL] * world_size, outcome.output
    assert state_of(save, 8)["files"]["rollouts"]["size"] < (save / "rollouts.jsonl").stat().st_size
    assert "after step 8" in workshop.train(save, flags_of(save, world_size), world_size).output
    assert_same_run(save, unbroken)


def is_complete(save: Path, step: int) -> bool:
    return (save / f"iter_{step:07d}" / "metadata.json").exists()


def held(save: Path, step: int, until: int) -> HeldWrites:
    return HeldWrites(step=step, until=until, metrics=save / "metrics.jsonl")


def test_async_save_writes_beside_the_steps_and_survives_a_kill(workshop: Workshop, tmp_path: Path) -> None:
    unbroken = unbroken_run(workshop, 2)
    save = tmp_path / "save"
    # The first checkpoint is written while step 3 changes the weights. The kill comes while the second one is written.
    first, second = held(save, 2, 3), held(save, 4, 9)
    kill = Interruption(step=5, number=SIGKILL)
    outcome = interrupted_run(workshop, save, kill, 2, "--async-save", held_writes=[first, second])
    assert outcome.codes == [-SIGKILL] * 2, outcome.output
    assert json.loads(first.evidence.read_text()) == {"newest": ""}, "step 3 was over before step 2 was saved"
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert state_of(save, 4) and not is_complete(save, 4), "its save was begun"
    resumed = workshop.train(save, [*flags_of(save, 2), "--async-save"], 2)
    assert "after step 2" in resumed.output
    assert "step 4 in the background" in resumed.output
    assert_same_run(save, unbroken)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)


def test_sigterm_completes_a_save_in_the_background(workshop: Workshop, tmp_path: Path) -> None:
    unbroken = unbroken_run(workshop, 2)
    save = tmp_path / "save"
    writes = held(save, 6, 7)
    term = Interruption(step=7, number=SIGTERM, only_rank=1)
    outcome = interrupted_run(workshop, save, term, 2, "--async-save", held_writes=[writes])
    assert outcome.codes == [0, 0], outcome.output
    assert writes.evidence.exists(), "the signal came while step 6 was being saved"
    assert "signal after step 7" in outcome.output
    assert is_complete(save, 6) and is_complete(save, 7)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "7"
    resumed = workshop.train(save, [*flags_of(save, 2), "--async-save"], 2)
    assert "after step 7" in resumed.output
    assert_same_run(save, unbroken)


def test_run_killed_before_its_first_checkpoint_starts_anew(workshop: Workshop, tmp_path: Path) -> None:
    unbroken = unbroken_run(workshop, 1)
    save = tmp_path / "save"
    outcome = interrupted_run(workshop, save, Interruption(step=1, number=SIGKILL), 1)
    assert outcome.codes == [-SIGKILL], outcome.output
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (save / name).open("a") as file:
            file.write('{"step": 2, "pro')  # an incomplete line, as a killed run leaves it
    output = workshop.train(save, flags_of(save)).output
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert f"{save / name} is truncated to the 0 bytes" in output
    assert_same_run(save, unbroken)
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, STEPS + 1))


def test_checkpoint_of_another_folder_is_resumed_with_files_of_its_own(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path
) -> None:
    expected = (unbroken_run(workshop, 1) / "rollouts.jsonl").read_bytes()
    kept = (stopped_at_7 / "rollouts.jsonl").read_bytes()
    assert expected.startswith(kept) and expected != kept
    save, named = tmp_path / "save", tmp_path / "named.jsonl"
    flags = [*flags_of(save), "--load", str(stopped_at_7)]
    assert "after step 7" in workshop.train(save, flags).output
    assert kept + (save / "rollouts.jsonl").read_bytes() == expected
    shutil.rmtree(save)
    shutil.rmtree(f"{save}-exported")
    named.write_bytes(kept * 2 + b"{")
    workshop.train(save, [*flags, "--rollout-store", str(named)])
    assert named.read_bytes() == kept + kept + expected.removeprefix(kept)
    assert (stopped_at_7 / "rollouts.jsonl").read_bytes() == kept


def test_a_run_resumes_from_an_earlier_checkpoint_than_a_damaged_one(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path
) -> None:
    unbroken = unbroken_run(workshop, 1)
    save = tmp_path / "save"
    shutil.copytree(stopped_at_7, save)
    newest = save / "iter_0000007"
    (newest / "rasft_state.json").write_text("{")
    flags = workshop.flags("--save", str(save), *flags_of(save))
    outcome = launching.run(tmp_path / "logs", flags)
    (error,) = outcome.errors
    assert "step 2, 4, 6" in error and "--ckpt-step" in error
    assert "after step 4" in workshop.train(save, [*flags_of(save), "--ckpt-step", "4"]).output
    assert_same_run(save, unbroken)


def test_a_resumed_run_says_which_flags_have_changed(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    shutil.copytree(stopped_at_7, save)
    changed = ["--objective", "sft", "--weight-decay", "0.1", "--override-opt_param-scheduler"]
    flags = workshop.flags("--save", str(save), *flags_of(save), *changed)
    dry = launching.run(tmp_path / "logs", [*flags, "--dry-run"])
    assert dry.codes == [0] and "changed since step 7: " in dry.output and "2 steps left" in dry.output
    output = workshop.train(save, [*flags_of(save), *changed]).output
    (line,) = (line for line in output.splitlines() if line.startswith("changed since step 7: "))
    assert "--objective rasft -> sft" in line and "--weight-decay 0.0 -> 0.1" in line
    assert "after step 7" in output and max(launching.steps(save)) == STEPS


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--lr", "1e-4"], "--lr 0.001 (now 0.0001)"),
        (["--lr-decay-style", "cosine", "--min-lr", "1e-5"], "--lr-decay-style constant (now cosine)"),
        (["--data-prompt-suffix", " ="], "--data"),
        (["--train-data", "OTHER"], "--train-data"),
    ],
)
def test_a_resumed_run_refuses_other_problems_and_another_learning_rate(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path, changed: list[str], named: str
) -> None:
    other = tmp_path / "sums.jsonl"
    other.write_text(workshop.sums.read_text().replace("+", "-"))
    more = [str(other) if value == "OTHER" else value for value in changed]
    flags = workshop.flags("--save", str(stopped_at_7), *flags_of(stopped_at_7), *more)
    outcome = launching.run(tmp_path / "logs", flags)
    (error,) = outcome.errors
    assert outcome.codes == [1] and named in error and "Traceback" not in outcome.output
    dry = launching.run(tmp_path / "dry-logs", [*flags, "--dry-run"])
    assert dry.codes == [1] and dry.errors == [error]


def test_a_resumed_run_takes_another_learning_rate_if_it_is_told_to(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    shutil.copytree(stopped_at_7, save)
    workshop.train(save, [*flags_of(save), "--lr", "1e-4", "--override-opt_param-scheduler"])
    steps = launching.steps(save).values()
    shares = [min(1.0, values[metrics.MASS]) for values in steps]
    assert min(shares) < 1, "otherwise the share of the rate would not show"
    rates = [values[metrics.LEARNING_RATE] / share for values, share in zip(steps, shares, strict=True)]
    assert rates == pytest.approx([1e-3] * 7 + [1e-4] * 2)


@pytest.mark.parametrize("size", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_a_checkpoint_is_resumed_in_another_layout(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path, size: str
) -> None:
    unbroken = unbroken_run(workshop, 1)
    save = tmp_path / "save"
    shutil.copytree(stopped_at_7, save)
    resumed = workshop.train(save, [*flags_of(save), size, "2"], 2)
    assert "after step 7" in resumed.output
    assert launching.losses(save) == pytest.approx(launching.losses(unbroken), abs=1e-5, rel=0)


def test_a_finished_run_that_is_started_again_is_over_at_once(workshop: Workshop, tmp_path: Path) -> None:
    unbroken = unbroken_run(workshop, 1)
    before = (unbroken / "metrics.jsonl").read_bytes()
    outcome = launching.run(tmp_path / "logs", workshop.flags("--save", str(unbroken), *flags_of(unbroken)))
    assert outcome.codes == [0] and "finished before: step 9 of 9" in outcome.output
    assert outcome.output.count("\n") <= 3, "nothing else is said"
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    flags = workshop.flags("--save", str(unbroken), *flags_of(unbroken), "--dry-run")
    dry = launching.run(tmp_path / "dry-logs", flags)
    assert dry.codes == [0] and "finished before: step 9 of 9" in dry.output and "memory" not in dry.output
    # A finished run can still be exported, as after a kill during its export.
    save = tmp_path / "save"
    shutil.copytree(unbroken, save)
    partial = tmp_path / ".save-exported.partial-1a2b3c4d"
    partial.mkdir()
    assert f"removed {partial}" in workshop.train(save, flags_of(save)).output
    assert not partial.exists()
    assert_same_run(save, unbroken)


def test_a_run_stops_before_the_end_of_its_slurm_allocation(
    workshop: Workshop, stopped_at_7: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    shutil.copytree(stopped_at_7, save)
    flags = workshop.flags("--save", str(save), *flags_of(save), "--exit-before-end-s", "5000")
    variables = {"SLURM_JOB_END_TIME": str(int(time.time()) + 4000)}
    outcome = launching.run(tmp_path / "logs", flags, variables=variables)
    assert outcome.codes == [0], outcome.output
    status = RunStatus.read(save)
    assert status is not None and (status.state, status.step) == ("stopped", 8)
    assert "--exit-before-end-s 5000" in status.reason
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "8"


def _receive_sigterm_at_the_start() -> None:
    """Ignores SIGTERM, as a rank of the job script does, and receives it when the program checks its flags."""
    from megatron_rasft.training import startup

    signal.signal(SIGTERM, signal.SIG_IGN)
    parse = startup.parse

    def parse_and_receive(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), SIGTERM)
        return parse(*args, **kwargs)

    startup.parse = parse_and_receive


def test_sigterm_that_comes_while_the_run_starts_stops_it_before_the_first_step(
    workshop: Workshop, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    flags = workshop.flags("--save", str(save), *flags_of(save))
    outcome = launching.run(
        tmp_path / "logs", flags, 2, prepare_rank=lambda rank: [_receive_sigterm_at_the_start] if rank else []
    )
    assert outcome.codes == [0, 0], outcome.output
    status = RunStatus.read(save)
    assert status is not None and (status.state, status.step) == ("stopped", 0)


def test_torchrun_stopped_by_sigterm_saves_the_last_step(workshop: Workshop, tmp_path: Path) -> None:
    save = tmp_path / "save"
    metrics = save / "metrics.jsonl"
    outcome = launching.torchrun(
        workshop.flags("--save", str(save), "--train-iters", "2000"),
        2,
        ended_when=lambda: metrics.exists() and bool(launching.steps(save)),
    )
    last = max(launching.steps(save))
    assert outcome.codes == [0], "a clean stop, also through torchrun"
    assert f"signal after step {last}" in outcome.output and "Traceback" not in outcome.output
    status = RunStatus.read(save)
    assert status is not None and (status.state, status.step, status.num_steps) == ("stopped", last, 2000)
    assert last < 2000
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) == last
    assert not outcome.errors
