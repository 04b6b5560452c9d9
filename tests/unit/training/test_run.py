"""What a run keeps of itself and when it ends early, without a model."""

import weakref
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.training.progress import Progress
from megatron_rasft.training.run import Run
from megatron_rasft.training.samples import Batch, BatchQueue, SampleArrays
from megatron_rasft.training.stopping import Stopped, StopRequest
from megatron_rasft.types import TrainingSample


def run_after(step: int) -> Run:
    """A run of 8 steps with --exit-interval 4."""
    run: Any = object.__new__(Run)
    run.args = SimpleNamespace(save_interval=None, exit_interval=4)
    run.trainer = SimpleNamespace(
        iteration=step, stop=StopRequest(lambda: False), finish_saves=lambda is_blocking=True: None
    )
    run.progress = Progress(8)
    run.total_steps, run._save, run._saved_step = 8, None, 0
    return run


class Steps:
    """Takes notes of what it is asked to do."""

    def __init__(self) -> None:
        self.iteration = 0
        self.notes: list[str] = []

    def prepare(self, batch: Batch | None) -> int:
        assert batch is not None
        self.notes.append(f"prepare {batch.num_problems}")
        return batch.num_problems

    def train(self, prepared: int) -> Any:
        self.iteration += 1
        self.notes.append(f"train {prepared}")
        return SimpleNamespace(is_skipped=False, grad_norm=1.0)


def run_on(queue: BatchQueue) -> Any:
    run: Any = object.__new__(Run)
    run.trainer, run.queue, run._prepared, run.is_lead = Steps(), queue, None, False
    run._step_values, run._record = lambda result, seconds: {}, lambda report: None
    return run


def three_batches() -> BatchQueue:
    """Of 5, 6 and 7 problems with one sample each."""
    samples = [
        TrainingSample(problem_id=str(i), kind="demonstration", prompt_ids=[i], response_ids=[9], weight=1.0)
        for i in range(3)
    ]
    return BatchQueue([(5, 1), (6, 1), (7, 1)], SampleArrays.of(samples))


def test_the_next_batch_is_prepared_before_a_step_and_trained_once() -> None:
    run = run_on(three_batches())
    for _ in range(3):
        run.train_step()
    assert run.trainer.notes == ["prepare 5", "prepare 6", "train 5", "prepare 7", "train 6", "train 7"]
    assert not run.queue and run._prepared is None, "a refresh prepares its own"


def test_a_batch_that_is_prepared_but_not_trained_is_saved_as_queued() -> None:
    run = run_on(three_batches())
    run.train_step()
    assert run.queue.sizes == [(6, 1), (7, 1)]
    assert run.queue.arrays()["tokens"].tolist() == [1, 9, 2, 9]
    resumed = run_on(BatchQueue(run.queue.sizes, SampleArrays(**run.queue.arrays())))
    resumed.train_step()
    resumed.train_step()
    assert resumed.trainer.notes == ["prepare 6", "prepare 7", "train 6", "train 7"]


def test_a_step_that_fails_leaves_its_batch_in_the_queue() -> None:
    run = run_on(three_batches())

    def fail(prepared: int) -> None:
        raise RuntimeError("out of memory")

    run.trainer.train = fail
    with pytest.raises(RuntimeError):
        run.train_step()
    assert run.queue.sizes == [(5, 1), (6, 1), (7, 1)]


def test_exit_interval_ends_a_run_that_is_not_over(capsys: pytest.CaptureFixture[str]) -> None:
    run_after(3).save_if_due()
    run_after(8).save_if_due()
    run = run_after(4)
    with pytest.raises(Stopped):
        run.save_if_due()
    run.stop()
    assert "stopped by --exit-interval 4 after step 4; --save was not given" in capsys.readouterr().out


def test_what_a_failed_step_held_is_let_go_before_servers_take_their_memory_back() -> None:
    class Activations:
        pass

    def step() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    held: list[weakref.ref[Activations]] = []
    alive: list[Activations | None] = []
    run: Any = run_after(1)
    run.verifier = None
    run.servers = SimpleNamespace(close=lambda is_clean: alive.append(held[0]()))
    run.progress = SimpleNamespace(close=lambda status: None)
    with pytest.raises(RuntimeError, match="out of memory"), ExitStack() as stack:
        stack.push(run.__exit__)
        step()
    assert alive == [None]
