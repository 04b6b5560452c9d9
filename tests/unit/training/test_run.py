"""A run with plain stand-ins: its queue, its reports, and how it ends early, fails, saves and resumes."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft import metrics
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.config import HeldoutConfig, RasftConfig
from megatron_rasft.data.sample_arrays import Batch, BatchQueue, SampleArrays
from megatron_rasft.errors import CheckpointError
from megatron_rasft.monitoring.status import RunStatus
from megatron_rasft.monitoring.stopping import Allocation, Stopped, StopRequest
from megatron_rasft.training.batches import BatchFacts
from megatron_rasft.training.record import RunRecord
from megatron_rasft.training.refresh_report import RefreshReport
from megatron_rasft.training.run import Run
from megatron_rasft.training.trainer import Diverged, StepResult
from megatron_rasft.types import TrainingSample
from tests.unit.training.stand_ins import config_of


def args_of(**changes: Any) -> SimpleNamespace:
    """A run of 8 steps without --save."""
    defaults: dict[str, Any] = {
        "train_iters": 8,
        "given_values": {},
        "save": None,
        "hf_model": "folder",
        "save_interval": None,
        "exit_interval": None,
        "async_save": False,
        "export_hf": None,
        "log_throughput": False,
        "world_size": 1,
    }
    return SimpleNamespace(**defaults | changes)


class TrainerOfNotes:
    """A trainer whose steps change nothing. It records its calls."""

    def __init__(self, iteration: int = 0) -> None:
        self.iteration = iteration
        self.stop = StopRequest(lambda: False)
        self.notes: list[str] = []
        self.error: Exception | None = None

    def prepare(self, batch: Batch | None) -> int:
        assert batch is not None
        self.notes.append(f"prepare {batch.num_problems}")
        return batch.num_problems

    def train(self, prepared: int) -> StepResult:
        if self.error is not None:
            raise self.error
        self.iteration += 1
        self.notes.append(f"train {prepared}")
        facts = BatchFacts(
            num_problems=prepared,
            num_samples=1,
            num_tokens=2,
            num_counted=1,
            squared_tokens=4,
            mass=1.0,
            mean_weights={},
        )
        return StepResult(metrics={}, grad_norm=1.0, learning_rate=0.1, is_skipped=False, batch=facts)

    def export(self, path: str, facts: dict[str, str]) -> None:
        self.notes.append(f"export {path}")


class CheckpointsOfNotes:
    """Checkpoints that keep the state saved last and add their calls to the trainer's record."""

    def __init__(self, trainer: TrainerOfNotes, loaded: Any = None, resume: Resume | None = None) -> None:
        self.resume = resume or Resume()
        self.saved: Any = None
        self.was_finished = False
        self._trainer = trainer
        self._loaded = loaded

    def load(self) -> Any:
        return self._loaded

    def save(self, state: Any) -> None:
        self._trainer.notes.append(f"save {self._trainer.iteration}")
        self.saved = state()

    def finish(self, *, is_blocking: bool = True) -> None:
        self.was_finished = True

    def lost_save(self, error: BaseException | None) -> CheckpointError | None:
        return CheckpointError("another rank ended") if "Connection reset" in str(error) else None


class RefreshOfNotes:
    """A refresh driver that makes three batches, and its own decisions."""

    def __init__(self) -> None:
        self.loaded: Any = None
        self.decisions = self
        self.started: list[int] = []

    def start(self, iteration: int) -> None:
        self.started.append(iteration)

    def finish(self, samples: Any) -> tuple[BatchQueue, RefreshReport]:
        report = RefreshReport(num_problems=18)
        report.num_rollouts, report.num_sampled = 4, 1
        report.verdicts.update({"correct": 1, "wrong": 3})
        return three_batches(), report

    def state_dict(self) -> dict[str, Any]:
        return {"name": "a state"}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        self.loaded = state
        return ["a line about the state"]


class HeldoutOfNotes:
    """Held-out problems of which half are solved. It records the steps of the measurements."""

    def __init__(self) -> None:
        self.measured: list[int] = []

    def measure(self, iteration: int) -> dict[str, float]:
        self.measured.append(iteration)
        return {metrics.HELDOUT_SOLVE_RATE: 0.5}

    def line(self, iteration: int, values: dict[str, float], seconds: float) -> str:
        return f"held out {iteration}"


def three_batches() -> BatchQueue:
    """Batches of 5, 6 and 7 problems with one sample each."""
    samples = [
        TrainingSample(problem_id=str(i), kind="demonstration", prompt_ids=[i], response_ids=[9], weight=1.0)
        for i in range(3)
    ]
    return BatchQueue([(5, 1), (6, 1), (7, 1)], SampleArrays.of(samples))


def run_of(
    args: Any = None, trainer: Any = None, config: RasftConfig | None = None, **parts: Any
) -> tuple[Run, TrainerOfNotes]:
    args, trainer, config = args or args_of(), trainer or TrainerOfNotes(), config or config_of()
    record = RunRecord(args, config, is_rank_zero=True)
    values: dict[str, Any] = {
        "checkpoints": CheckpointsOfNotes(trainer),
        "refresh": RefreshOfNotes(),
        "record": record,
        "initial_weights": "abc",
    }
    return Run(args, config, trainer=trainer, **values | parts), trainer


def queued(**changes: Any) -> tuple[Run, TrainerOfNotes]:
    """A run whose first refresh has made three batches."""
    run, trainer = run_of(**changes)
    run.start_refresh()
    run.finish_refresh([])
    return run, trainer


def lines(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


# ---- steps


def test_the_next_batch_is_prepared_before_a_step_and_trained_once() -> None:
    run, trainer = queued()
    for _ in range(3):
        assert not run.needs_refresh
        run.train_step()
    assert trainer.notes == ["prepare 5", "prepare 6", "train 5", "prepare 7", "train 6", "train 7"]
    assert run.needs_refresh
    run.start_refresh()
    run.finish_refresh([])
    run.train_step()
    assert trainer.notes[6:] == ["prepare 5", "prepare 6", "train 5"], "a refresh prepares its own"


def test_a_step_that_fails_leaves_its_batch_in_the_queue() -> None:
    run, trainer = queued()
    trainer.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        run.train_step()
    assert run.queue.sizes == [(5, 1, 0), (6, 1, 0), (7, 1, 0)]


@pytest.mark.parametrize(("error", "is_finished"), [(Diverged(), True), (RuntimeError(), False)])
def test_a_run_that_diverged_completes_the_checkpoint_before(error: Exception, is_finished: bool) -> None:
    """Another error may occur on one rank only, which must not wait for the others."""
    trainer = TrainerOfNotes()
    checkpoints = CheckpointsOfNotes(trainer)
    run, _ = queued(trainer=trainer, checkpoints=checkpoints)
    trainer.error = error
    with pytest.raises(type(error)):
        run.train_step()
    assert checkpoints.was_finished == is_finished


def test_refreshes_and_steps_are_recorded_in_their_order(tmp_path: Path) -> None:
    run, _ = queued(args=args_of(save=str(tmp_path)))
    run.train_step()
    refresh, step = lines(tmp_path)
    assert (refresh["event"], refresh["step"], refresh[metrics.SOLVE_RATE]) == ("refresh", 0, 0.25)
    assert (step["event"], step["step"], step[metrics.QUEUE]) == ("step", 1, 2)
    assert step[metrics.SOLVE_RATE] == 0.25, "of the last refresh"
    assert metrics.GPU_TFLOP_PER_S not in step


def test_throughput_is_recorded_if_it_is_asked_for(tmp_path: Path) -> None:
    run, _ = queued(args=args_of(save=str(tmp_path), log_throughput=True))
    run.train_step()
    assert metrics.GPU_TFLOP_PER_S in lines(tmp_path)[-1]


# ---- measure


@pytest.mark.parametrize(("interval", "measured"), [(0, [0, 8]), (3, [0, 3, 6, 8])])
def test_held_out_problems_are_measured_at_both_ends_and_at_intervals(
    interval: int, measured: list[int]
) -> None:
    heldout = HeldoutOfNotes()
    config = config_of(heldout=HeldoutConfig(heldout_data=["file.jsonl"], heldout_interval=interval))
    run, trainer = run_of(config=config, heldout=heldout)
    for trainer.iteration in range(9):
        run.measure_if_due()
    assert heldout.measured == measured


# ---- save and resume


def own(save: Path) -> Resume:
    return Resume(folder=save, step=1, is_own=True)


def test_a_run_saves_at_its_interval_and_once_at_its_end(tmp_path: Path) -> None:
    run, trainer = run_of(args_of(save=str(tmp_path), save_interval=3))
    for trainer.iteration in range(1, 9):
        run.save_if_due()
    run.stop()
    assert trainer.notes == ["save 3", "save 6", "save 8"]


def test_a_run_resumes_in_the_middle_of_a_refresh(tmp_path: Path) -> None:
    args, trainer = args_of(save=str(tmp_path), exit_interval=1), TrainerOfNotes()
    checkpoints = CheckpointsOfNotes(trainer)
    run, _ = queued(args=args, trainer=trainer, checkpoints=checkpoints)
    run.train_step()
    with pytest.raises(Stopped):
        run.save_if_due()
    run.stop()
    state, arrays = checkpoints.saved
    assert state["queue"] == [(6, 1, 0), (7, 1, 0)], "the batch that is prepared is still queued"
    refresh, after = RefreshOfNotes(), TrainerOfNotes(1)
    loading = CheckpointsOfNotes(after, (json.loads(json.dumps(state)), arrays), own(tmp_path))
    resumed, _ = run_of(args, after, refresh=refresh, checkpoints=loading)
    resumed.begin()
    assert refresh.loaded == {"name": "a state"}
    resumed.train_step()
    resumed.train_step()
    assert after.notes == ["prepare 6", "prepare 7", "train 6", "train 7"]
    assert lines(tmp_path)[-1][metrics.SOLVE_RATE] == 0.25, "of the refresh before the checkpoint"
    resumed.stop()
    resumed.stop()
    assert after.notes[4:] == ["save 3"], "one checkpoint a step"


def test_a_resumed_run_cuts_its_files_to_the_checkpoint(tmp_path: Path) -> None:
    args, trainer = args_of(save=str(tmp_path)), TrainerOfNotes()
    checkpoints = CheckpointsOfNotes(trainer)
    run, _ = queued(args=args, trainer=trainer, checkpoints=checkpoints)
    run.train_step()
    run.stop()
    run.train_step()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    after = TrainerOfNotes(1)
    resumed, _ = run_of(args, after, checkpoints=CheckpointsOfNotes(after, checkpoints.saved, own(tmp_path)))
    resumed.begin()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


# ---- end


def test_exit_interval_ends_a_run_that_is_not_over(capsys: pytest.CaptureFixture[str]) -> None:
    args = args_of(exit_interval=4)
    run_of(args, TrainerOfNotes(3))[0].save_if_due()
    run_of(args, TrainerOfNotes(8))[0].save_if_due()
    run, _ = run_of(args, TrainerOfNotes(4))
    with pytest.raises(Stopped):
        run.save_if_due()
    run.stop()
    assert "--exit-interval 4 after step 4" in capsys.readouterr().out


def test_a_run_exports_its_model_and_counts_all_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = args_of(export_hf=str(tmp_path / "model"))
    run, trainer = run_of(args, record=RecordWithoutCard(args, config_of(), is_rank_zero=True))
    for _ in range(2):
        run.start_refresh()
        run.finish_refresh([])
    run.finish()
    assert trainer.notes == [f"export {tmp_path / 'model'}"]
    assert "2 correct, 6 wrong" in capsys.readouterr().out


class RecordWithoutCard(RunRecord):
    """A record whose arguments are too few for a model card."""

    def facts(self, iteration: int) -> dict[str, str]:
        return {}


class Verifier:
    """A verifier that records when its processes would start and end."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __enter__(self) -> None:
        self.notes.append("start")

    def __exit__(self, *exc: object) -> None:
        self.notes.append("end")


def test_the_tensors_of_a_failed_step_are_freed_before_servers_wake() -> None:
    class Activations:
        pass

    def step() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    held: list[weakref.ref[Activations]] = []
    alive: list[Activations | None] = []
    verifier = Verifier()
    servers = SimpleNamespace(close=lambda is_clean: alive.append(held[0]()))
    run, _ = run_of(servers=servers, verifier=verifier)
    with pytest.raises(RuntimeError, match="out of memory"), run:
        step()
    assert alive == [None]
    assert verifier.notes == ["start", "end"]


def test_the_status_follows_the_run(tmp_path: Path) -> None:
    args = args_of(save=str(tmp_path), save_interval=1, export_hf=str(tmp_path / "model"))
    trainer = TrainerOfNotes()
    record = RecordWithoutCard(args, config_of(), is_rank_zero=True)
    run, _ = run_of(args, trainer, record=record)
    run.begin()
    assert RunStatus.read(tmp_path) == RunStatus(state="running", num_steps=8)
    trainer.iteration = 1
    run.save_if_due()
    status = RunStatus.read(tmp_path)
    assert status is not None and status.save_s is not None and (status.state, status.step) == ("running", 1)
    run.stop()
    status = RunStatus.read(tmp_path)
    assert status is not None and (status.state, status.reason) == ("stopped", "--exit-interval None")
    trainer.iteration = 8
    run.finish()
    status = RunStatus.read(tmp_path)
    assert status is not None and (status.state, status.step, status.reason) == ("finished", 8, "")
    assert status.export_folder == str(tmp_path / "model")


def test_an_error_is_written_into_the_status(tmp_path: Path) -> None:
    run, trainer = run_of(args_of(save=str(tmp_path)), TrainerOfNotes(3))
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("out of memory\nand more")
    failed = RunStatus(state="failed", step=3, num_steps=8, reason="out of memory")
    assert RunStatus.read(tmp_path) == failed
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("connection closed by peer")
    assert RunStatus.read(tmp_path) == failed, "the first error is the cause"
    replace(failed, state="running").write(tmp_path)
    trainer.iteration = 0
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    status = RunStatus.read(tmp_path)
    assert status is not None and (status.step, status.reason) == (3, "KeyboardInterrupt")


def test_a_rank_that_is_lost_during_a_background_save_is_the_error(tmp_path: Path) -> None:
    run, _ = run_of(args_of(save=str(tmp_path)), TrainerOfNotes(3))
    with pytest.raises(CheckpointError, match="another rank ended"), run:
        raise RuntimeError("Connection reset by peer")
    status = RunStatus.read(tmp_path)
    assert status is not None and status.reason == "another rank ended"


def test_the_time_of_a_save_is_known_before_the_end_of_the_allocation(tmp_path: Path) -> None:
    trainer = TrainerOfNotes(1)
    allocation = Allocation(ends_at=1e12, length_s=1e12, save_s=100.0)
    trainer.stop = StopRequest(lambda: False, allocation=allocation)
    run, _ = run_of(args_of(save=str(tmp_path), save_interval=1), trainer)
    run.save_if_due()
    assert allocation.save_s == 100.0
    status = RunStatus.read(tmp_path)
    assert status is not None and status.save_s is not None and status.save_s < 100, "of this start"


def test_a_background_save_ends_when_its_part_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed after the next step, before which there may be a refresh; the longest save is kept."""

    class InBackground(CheckpointsOfNotes):
        step: int | None = None
        written_at = 0.0

        def save(self, state: Any) -> None:
            self.step = trainer.iteration

        def finish(self, *, is_blocking: bool = True) -> int | None:
            step, self.step = self.step, None
            return step

    trainer, now = TrainerOfNotes(), [1000.0]
    checkpoints = InBackground(trainer)
    monkeypatch.setattr("megatron_rasft.training.run.time", SimpleNamespace(monotonic=lambda: now[0]))
    args = args_of(save=str(tmp_path), save_interval=4, async_save=True, train_iters=99)
    run, _ = run_of(args, trainer, checkpoints=checkpoints)
    for step, save_s in ((4, 20.0), (8, 5.0)):
        trainer.iteration = step
        run.save_if_due()
        checkpoints.written_at = now[0] + save_s
        now[0] += 9999.0
        trainer.iteration += 1
        run.save_if_due()
        status = RunStatus.read(tmp_path)
        assert status is not None and status.save_s == 20.0
