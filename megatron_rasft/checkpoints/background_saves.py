"""Writes checkpoints on a thread of the training process (--async-save), behind the interface of Megatron's own queue.

Megatron 0.19 writes them in another process: the method it recommends needs nvidia-resiliency-ext, which has wheels for glibc 2.39
only, and the other method hangs the run when its process dies. A thread cannot die unnoticed or outlive the run, and writing
takes little of the interpreter's time: torch computes checksums and writes to files without holding the interpreter's lock.
"""

import argparse
import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from threading import Thread
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.training import async_utils

from megatron_rasft.errors import first_line
from megatron_rasft.monitoring import stalls

_POLL_S = 0.05
"""How often the ranks check whether all of them have written their parts."""

_THREAD = "save"
"""Name of the thread that writes checkpoints."""

_DONE, _WRITING, _LATE = 0, 1, 2
"""The progress of one rank's part. The largest value over all ranks is the progress of the checkpoint."""


class SaveQueue:
    """Takes the place of megatron.core's AsyncCallsQueue, for one checkpoint at a time.

    Every method but ``get_num_unfinalized_calls`` is a collective of the world.

    Args:
        timeout_s: longest time that a blocking call waits for the writers of all ranks.
        copies_cpu_tensors: whether tensors in host memory may change while they are written, as parameters of a run on the CPU
            and of an optimizer in host memory do. Others are gathered for the save and need no second copy.
    """

    def __init__(self, timeout_s: float, *, copies_cpu_tensors: bool) -> None:
        self._timeout_s = timeout_s
        self.copies_cpu_tensors = copies_cpu_tensors
        self._request: AsyncRequest | None = None
        self._writer: Thread | None = None
        self.written_at = 0.0
        """``time.monotonic()`` at which this rank's last writer ended."""

    @classmethod
    def for_run(cls, args: argparse.Namespace, device: torch.device) -> "SaveQueue":
        """Makes the queue of a run whose parameters are on ``device``."""
        return cls(
            60.0 * args.distributed_timeout_minutes,
            copies_cpu_tensors=device.type == "cpu" or args.optimizer_cpu_offload,
        )

    def schedule_async_request(self, request: AsyncRequest) -> int:
        """Copies the checkpoint's tensors into host memory and starts to write them. Training may go on when this returns."""
        assert self._request is None, "an earlier save must be completed first"
        self._request = request
        if request.async_fn is not None:
            arguments = list(request.async_fn_args)
            if request.preload_fn is not None:
                arguments[1] = self._staged(request.preload_fn())
            # A daemon thread: a run that fails elsewhere must not wait for a checkpoint that it can no longer complete.
            self._writer = Thread(target=self._write, args=(request, arguments), name=_THREAD, daemon=True)
            self._writer.start()
        return 0

    def _write(self, request: AsyncRequest, arguments: list[Any]) -> None:
        """Runs Megatron's writer, which puts its result, or most of its errors, into the results queue. Adds the other errors to it."""
        assert request.async_fn is not None
        try:
            request.async_fn(*arguments, **request.async_fn_kwargs)
        except BaseException as error:
            filesystem_async._results_queue.put(RuntimeError(first_line(error)))
        self.written_at = time.monotonic()

    def _staged(self, buckets: Sequence[Any]) -> list[Any]:
        """Returns Megatron's buckets (file, key, (bytes, tensors)) with tensors in host memory that nothing else changes."""
        if not self.copies_cpu_tensors:
            return list(buckets)
        return [
            (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (data, tensors) in buckets
        ]

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list[int]:
        """Completes the checkpoint if every rank has written its part. Rank 0 then writes it into the tracker file as the newest.

        Args:
            blocking: whether to wait until every rank has written its part.
            no_dist: not supported; Megatron passes False.

        Returns:
            [0] if a checkpoint is now complete, else [].

        Raises:
            CheckpointException: a rank could not write.
            RuntimeError: a rank is still writing after ``timeout_s``.
        """
        if self._request is None:
            return []
        ends = time.monotonic() + self._timeout_s
        while (state := self._state(time.monotonic() > ends)) != _DONE:
            if not blocking:
                return []
            if state == _LATE:
                self._request = None
                raise RuntimeError(
                    f"it is still being written after {self._timeout_s:g} s (--distributed-timeout-minutes)"
                )
            stalls.tick()  # This wait has a limit of its own.
            time.sleep(_POLL_S)
        request, self._request, self._writer = self._request, None, None
        for finalize in request.finalize_fns:
            finalize()
        dist.barrier()  # Rank 0 has written the tracker file before any rank goes on.
        return [0]

    def _state(self, is_late: bool) -> int:
        is_writing = self._writer is not None and self._writer.is_alive()
        mine = (_LATE if is_late else _WRITING) if is_writing else _DONE
        state = torch.tensor([mine], device=torch.cuda.current_device())
        dist.all_reduce(state, dist.ReduceOp.MAX)
        return int(state)

    def get_num_unfinalized_calls(self) -> int:
        """Returns the number of checkpoints that are not complete, 0 or 1; the same on every rank."""
        return int(self._request is not None)

    def close(self, abort: bool = False) -> None:
        """Completes the checkpoint, or drops it if ``abort`` is set."""
        if abort:
            self._request = None
        self.maybe_finalize_async_calls(blocking=True)


def end_process(code: int) -> NoReturn:
    """Ends the process with an exit code, even if a thread still writes a checkpoint that no rank will complete.

    sys.exit would end the interpreter under a thread inside torch's C++ code. That aborts the process with exit code 134 and a core
    dump.
    """
    if all(thread.name != _THREAD for thread in threading.enumerate()):
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_in_process() -> None:
    """Makes Megatron's writers pass their results through a queue of this process.

    Megatron's own queue starts another process, which takes seconds and 800 MB, and which survives when this process is killed.
    """
    filesystem_async._results_queue = queue.Queue()


def write_in_background(saves: SaveQueue) -> None:
    """Makes Megatron's save_checkpoint and maybe_finalize_async_save use this queue."""
    async_utils._async_calls_queue = saves
