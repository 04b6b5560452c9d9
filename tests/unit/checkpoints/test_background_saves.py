"""A checkpoint is written on a thread from copies, completed by all ranks together, and a wait for it has a time-out."""

import atexit
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_rasft.checkpoints.background_saves import SaveQueue, end_process, write_in_process
from megatron_rasft.monitoring import stalls


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    # Megatron's writers look this name up; write_in_process sets it too, and this restores it after the test.
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    write_in_process()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Disk:
    """A file that stores the numbers written to it, once the test allows the write."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.written: list[float] = []
        self.finalized = 0

    def request(self, tensor: torch.Tensor) -> AsyncRequest:
        buckets = [(Path("file"), "key", ([], [("item", tensor)]))]

        def write(rank: int, buckets: Any, results: Any) -> None:
            assert self.may_write.wait(600)
            ((_, _, (_, ((_, kept),))),) = buckets
            self.written = kept.tolist()

        def finalize() -> None:
            self.finalized += 1

        results = filesystem_async._results_queue
        return AsyncRequest(write, (0, None, results), [finalize], preload_fn=lambda: buckets)


def test_the_written_numbers_are_those_of_the_start_of_the_save() -> None:
    disk, weights = Disk(), torch.tensor([1.0, 2.0])
    saves = SaveQueue(600, copies_cpu_tensors=True)
    before = psutil.Process().children(recursive=True)
    saves.schedule_async_request(disk.request(weights))
    weights += 100  # as the optimizer's next step does
    assert saves.maybe_finalize_async_calls() == []
    assert (saves.get_num_unfinalized_calls(), disk.finalized, disk.written) == (1, 0, [])
    assert {*psutil.Process().children(recursive=True)} <= {*before}, "no new process"
    disk.may_write.set()
    assert saves.maybe_finalize_async_calls(blocking=True) == [0]
    assert (saves.get_num_unfinalized_calls(), disk.finalized, disk.written) == (0, 1, [1.0, 2.0])
    assert 0 < saves.written_at <= time.monotonic()
    assert saves.maybe_finalize_async_calls(blocking=True) == []


def test_tensors_that_nothing_changes_are_not_copied() -> None:
    disk, gathered = Disk(), torch.tensor([1.0])
    saves = SaveQueue(600, copies_cpu_tensors=False)
    saves.schedule_async_request(disk.request(gathered))
    gathered += 1
    disk.may_write.set()
    saves.close()
    assert disk.written == [2.0], "the tensor itself"


def test_a_write_without_end_is_an_error() -> None:
    disk = Disk()
    saves = SaveQueue(0.2, copies_cpu_tensors=True)
    saves.schedule_async_request(disk.request(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"0\.2 s .*--distributed-timeout-minutes"):
        saves.maybe_finalize_async_calls(blocking=True)
    assert disk.finalized == 0, "the tracker names the earlier checkpoint"
    disk.may_write.set()


def test_a_wait_for_the_writer_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    saves = SaveQueue(600, copies_cpu_tensors=True)
    saves.schedule_async_request(disk.request(torch.zeros(1)))
    monkeypatch.setattr(stalls, "tick", disk.may_write.set)
    assert saves.maybe_finalize_async_calls(blocking=True) == [0]


def test_an_error_of_the_writer_reaches_megatrons_results() -> None:
    def write(*_: Any) -> None:
        raise OSError("the disk is gone")

    found = []
    saves = SaveQueue(600, copies_cpu_tensors=True)
    results = filesystem_async._results_queue
    request = AsyncRequest(write, (0, [], results), [lambda: found.append(results.get_nowait())])
    saves.schedule_async_request(request)
    saves.maybe_finalize_async_calls(blocking=True)
    assert [str(error) for error in found] == ["the disk is gone"]


def test_a_rank_with_nothing_to_write_takes_part() -> None:
    done = []
    saves = SaveQueue(600, copies_cpu_tensors=True)
    saves.schedule_async_request(AsyncRequest(None, (), [lambda: done.append(True)]))
    assert saves.maybe_finalize_async_calls() == [0]
    assert done == [True]


def test_a_program_that_fails_during_a_save_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """With sys.exit(), five of eight such processes aborted with code 134, because the writer was inside C++ code."""
    done: list[object] = []

    def leave(code: int) -> None:
        done.append(code)
        raise InterruptedError

    # The standard library has no public call that runs the exit handlers and then ends the process at once.
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: done.append("atexit"))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="2"):
        end_process(2)
    assert done == []
    disk = Disk()
    saves = SaveQueue(600, copies_cpu_tensors=True)
    saves.schedule_async_request(disk.request(torch.zeros(1)))
    with pytest.raises(InterruptedError):
        end_process(2)
    assert done == ["atexit", 2]
    disk.may_write.set()
    saves.close()
    with pytest.raises(SystemExit, match="2"):
        end_process(2)


def test_only_memory_that_training_changes_is_copied() -> None:
    args: Any = SimpleNamespace(distributed_timeout_minutes=10, optimizer_cpu_offload=False)
    on_gpu, on_cpu = torch.device("cuda"), torch.device("cpu")
    assert not SaveQueue.for_run(args, on_gpu).copies_cpu_tensors
    assert SaveQueue.for_run(args, on_cpu).copies_cpu_tensors
    args.optimizer_cpu_offload = True
    assert SaveQueue.for_run(args, on_gpu).copies_cpu_tensors
