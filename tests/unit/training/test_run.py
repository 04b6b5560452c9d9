"""What a run keeps of itself and when it ends early, without a model."""

import weakref
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.report.progress import Progress
from megatron_rasft.training.run import Run, plain
from megatron_rasft.training.stopping import Stopped, StopRequest
from megatron_rasft.training.window import Batch
from megatron_rasft.types import TrainingSample


def test_a_batch_is_made_plain_without_copying_its_tokens() -> None:
    sample = TrainingSample(
        problem_id="p", kind="rollout", prompt_ids=[1, 2], response_ids=[3], weight=0.5, ref_logprobs=[-0.25]
    )
    batch = Batch(num_problems=1, samples=[sample])
    made = plain(batch)
    assert made == asdict(batch)
    assert made["samples"][0]["prompt_ids"] is sample.prompt_ids


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
