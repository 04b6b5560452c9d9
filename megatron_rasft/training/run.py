"""The state of the training loop: what pretrain_rasft.py steps through, saves and resumes."""

import os
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from typing import Any

from megatron_rasft import metrics
from megatron_rasft.checkpoints.checkpointer import Checkpointer
from megatron_rasft.config import RasftConfig
from megatron_rasft.data.sample_arrays import Array, BatchQueue, SampleArrays
from megatron_rasft.errors import RasftError, first_line
from megatron_rasft.monitoring import stalls
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training.batch_preparation import PreparedBatch
from megatron_rasft.training.heldout import Heldout
from megatron_rasft.training.record import RunRecord
from megatron_rasft.training.refresh_driver import RefreshDriver, Samples
from megatron_rasft.training.rollout_servers import RolloutServers
from megatron_rasft.training.step_report import gpu_tflop_per_s, step_values, step_warning
from megatron_rasft.training.trainer import Diverged, StepResult, Trainer


class Run:
    """A run: its queue of batches, the figures of its last refresh, the step of its last checkpoint.

    Every method is a collective of the world. Use the run as a context manager: it stops the verifier's processes and closes the
    connections to rollout servers.

    Args:
        trainer: model, optimizer and schedule.
        checkpoints: saves and loads the trainer together with the run's own state.
        refresh: refills the queue.
        record: writes metrics, console lines and rollouts.
        heldout: None without --heldout-data.
        verifier: its processes run while the run is open; None on ranks other than 0, and if nothing is graded.
        servers: None if rollouts are not sampled by servers.
        initial_weights: fingerprint of the weights that the run began with; rank 0 only.
        introduction: lines that ``begin`` prints.
    """

    def __init__(
        self,
        args: Any,
        config: RasftConfig,
        *,
        trainer: Trainer,
        checkpoints: Checkpointer,
        refresh: RefreshDriver,
        record: RunRecord,
        heldout: Heldout | None = None,
        verifier: AbstractContextManager[Any] | None = None,
        servers: RolloutServers | None = None,
        initial_weights: str = "",
        introduction: Sequence[str] = (),
    ) -> None:
        self._args = args
        self._config = config
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._refresh = refresh
        self._record = record
        self._heldout = heldout
        self._verifier = verifier
        self._servers = servers
        self._initial_weights = initial_weights
        self._introduction = introduction
        self._open = ExitStack()
        self.queue = BatchQueue()
        """Batches that are not trained yet, including the prepared batch."""
        self._prepared: PreparedBatch | None = None
        """The first batch of the queue, if it has been distributed to the ranks; otherwise None."""
        self._refresh_began = 0.0
        self._last_refresh: dict[str, float] = {}
        """Metric name -> value, for the last refresh."""
        self._verdicts: Counter[str] = Counter()
        """Verdict -> number of rollouts since the run began."""
        self._saved_step = 0
        """Step of the newest checkpoint in --save. Step 0 needs no checkpoint."""
        self._save_began = 0.0
        self._longest_save_s = 0.0
        """The longest save of this start, seconds."""

    def __enter__(self) -> "Run":
        self._open.enter_context(self._trainer.stop.catching_interrupt())
        on_rank_zero(self._start_verifier)
        return self

    def _start_verifier(self) -> None:
        if self._verifier is not None:
            self._verifier.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._open.close()
        if self._verifier is not None:
            self._verifier.__exit__(*exc)
        if self._servers is not None:
            # The frames of a failed step hold its tensors, and servers on this GPU need the memory to wake up.
            traceback.clear_frames(exc[2])
            self._servers.close(is_clean=exc[0] is None)
        self._record.close(is_clean=exc[0] is None)
        lost_save = self._checkpoints.lost_save(exc[1])
        if error := lost_save or exc[1]:
            with suppress(RasftError):  # the disk may be full, which must not hide the run's own error
                self._record.note_status("failed", self._trainer.iteration or None, reason=first_line(error))
        if lost_save is not None:
            raise lost_save from exc[1]

    # ---- begin

    @stalls.phase("load")
    def begin(self) -> None:
        """Resumes from a checkpoint if there is one, opens the run's files, and prints what will be trained.

        Raises:
            CheckpointError: the checkpoint does not fit this run, or cannot be read.
        """
        resumed = self._checkpoints.load()
        if resumed is not None:
            self._load_state(*resumed)
        marks = {} if resumed is None else resumed[0]["files"]
        on_rank_zero(lambda: self._record.open_files(marks, self._checkpoints.resume.folder))
        for line in self._introduction:
            self._record.say(line)
        if resumed is not None:
            self._record.say(f"going on after step {self._trainer.iteration}")
        on_rank_zero(lambda: self._record.note_status("running", self._trainer.iteration))

    def _load_state(self, state: dict[str, Any], arrays: dict[str, Array]) -> None:
        on_rank_zero(lambda: self._record.say_changes(self._checkpoints.resume, state.get("config")))
        self.queue = BatchQueue(state["queue"], SampleArrays.load(arrays) if arrays else None)
        self._last_refresh = state["last_refresh"]
        self._verdicts = Counter(state["verdicts"])
        for line in on_rank_zero(lambda: self._refresh.decisions.load_state_dict(state["refresh"])):
            self._record.say(line)
        if self._checkpoints.resume.is_own:
            self._saved_step = self._trainer.iteration

    # ---- refresh

    @property
    def is_over(self) -> bool:
        return self._trainer.iteration >= self._args.train_iters

    @property
    def needs_refresh(self) -> bool:
        """Whether all batches of the last refresh are trained. A run that resumes between two refreshes has some left."""
        return not self.queue

    def start_refresh(self) -> RefreshDriver:
        """Begins a refresh; the caller runs its phases and then calls ``finish_refresh``."""
        self._refresh_began = time.monotonic()
        self._refresh.start(self._trainer.iteration)
        return self._refresh

    def finish_refresh(self, samples: Samples) -> None:
        """Queues the batches of a refresh, and records it."""
        self.queue, report = self._refresh.finish(samples)
        self._last_refresh = report.values()
        self._verdicts += report.verdicts
        line = report.line(time.monotonic() - self._refresh_began)
        self._record.add_refresh(self._trainer.iteration, self._last_refresh, line)
        for warning in report.warnings(self._config):
            self._record.say(warning)

    # ---- step

    @stalls.phase("step")
    def train_step(self) -> None:
        """Trains the next batch, and records the step."""
        began = time.monotonic()
        # prepare() distributes a batch and returns while a thread cuts it, so the next batch is cut during this step.
        prepared = self._prepared or self._trainer.prepare(self.queue.batch(0))
        self._prepared = self._trainer.prepare(self.queue.batch(1)) if len(self.queue) > 1 else None
        try:
            result = self._trainer.train(prepared)
        except Diverged:
            # The user will resume from the last checkpoint, and a thread may still be writing it.
            self._checkpoints.finish()
            raise
        # Removed only now: if the step fails, its batch is still in the queue.
        self.queue.popleft()
        self._record_step(result, time.monotonic() - began)

    def _record_step(self, result: StepResult, step_s: float) -> None:
        values = step_values(result, step_s=step_s, num_queued=len(self.queue))
        if self._args.log_throughput:
            num_gpus = self._args.world_size
            values[metrics.GPU_TFLOP_PER_S] = gpu_tflop_per_s(result, step_s=step_s, num_gpus=num_gpus)
        # The step belongs to the last refresh, whose solve rate is reported.
        if metrics.SOLVE_RATE in self._last_refresh:
            values[metrics.SOLVE_RATE] = self._last_refresh[metrics.SOLVE_RATE]
        stragglers = "" if result.rank_times is None else result.rank_times.stragglers
        self._record.add_step(self._trainer.iteration, values, stragglers)
        if warning := step_warning(self._trainer.iteration, result):
            self._record.say(warning)

    # ---- measure

    @stalls.phase("measure")
    def measure_if_due(self) -> None:
        """Measures the held-out solve rate before the first step, after the last one, and every --heldout-interval steps."""
        step, interval = self._trainer.iteration, self._config.heldout.heldout_interval
        is_due = step == 0 or self.is_over or (interval > 0 and step % interval == 0)
        if self._heldout is not None and is_due:
            began = time.monotonic()
            values = self._heldout.measure(step)
            line = self._heldout.line(step, values, time.monotonic() - began)
            self._record.add_refresh(step, values, line)

    # ---- save

    def save_if_due(self) -> None:
        """Saves every --save-interval steps and after the last one.

        Raises:
            Stopped: after --exit-signal, --exit-duration-in-mins or --exit-interval.
        """
        step, args = self._trainer.iteration, self._args
        # Only this call makes a background save the newest checkpoint, so it is made after every step.
        self._finish_saves(is_blocking=False)
        if self.is_over or (args.save_interval and step % args.save_interval == 0):
            self._save_once()
        self._trainer.stop.check()
        if args.exit_interval and step % args.exit_interval == 0 and not self.is_over:
            raise Stopped

    @stalls.phase("save")
    def _save_once(self) -> None:
        """Saves, unless the newest checkpoint is of this step."""
        if self._args.save is None or self._saved_step == self._trainer.iteration:
            return
        self._finish_saves()
        self._save_began = time.monotonic()
        self._checkpoints.save(self._state)
        self._saved_step = self._trainer.iteration
        done = "step {} is being saved" if self._args.async_save else "saved step {}"
        self._record.say(f"{done.format(self._saved_step)}, {time.monotonic() - self._save_began:.1f} s")
        if not self._args.async_save:
            self._note_save(time.monotonic())

    def _note_save(self, ended: float) -> None:
        """Keeps the time of a save that is now complete, for --exit-before-end-s and for the next start of the run."""
        seconds = self._longest_save_s = max(self._longest_save_s, ended - self._save_began)
        if self._trainer.stop.allocation is not None:
            self._trainer.stop.allocation.note_save(seconds)
        on_rank_zero(lambda: self._record.note_status("running", self._saved_step, save_s=seconds))

    def _finish_saves(self, *, is_blocking: bool = True) -> None:
        """Completes a background save (--async-save); waits for it if asked to."""
        step = self._checkpoints.finish(is_blocking=is_blocking)
        if step is not None:
            self._record.say(f"saved step {step} in the background")
            # Without waiting this is noticed only after the next step, before which there may be a whole refresh.
            self._note_save(time.monotonic() if is_blocking else self._checkpoints.written_at)

    def _state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """The run's part of a checkpoint: JSON values, and the samples of the queue. Rank 0 only."""
        state = {
            "refresh": self._refresh.decisions.state_dict(),
            "initial_weights": self._initial_weights,
            "files": self._record.file_marks,
            "config": asdict(self._record.configuration),
            "queue": self.queue.sizes,
            "last_refresh": self._last_refresh,
            "verdicts": self._verdicts,
        }
        return state, self.queue.arrays()

    # ---- end

    def stop(self) -> None:
        """Saves a stopped run, so that the same command resumes from the last step, and prints how to resume it."""
        reason = self._trainer.stop.reason() or f"--exit-interval {self._args.exit_interval}"
        self._save_once()
        self._finish_saves()
        step = self._trainer.iteration
        if not step:
            outcome = "before the first step; the same command starts it again"
        elif self._args.save is None:
            outcome = f"after step {step}; --save was not given"
        else:
            outcome = f"after step {step}; saved; the same command resumes it"
        on_rank_zero(lambda: self._record.note_status("stopped", step, reason=reason))
        self._record.say(f"stopped by {reason} {outcome}")

    @stalls.phase("export")
    def finish(self) -> None:
        """Waits for background saves, exports the model, and reports the verdicts of all rollouts."""
        self._finish_saves()
        self._trainer.stop.check()
        step = self._trainer.iteration
        if self._args.export_hf is not None:
            # Written before the export: if the process is killed after it, the next start knows that the folder is its own.
            folder = os.path.abspath(self._args.export_hf)
            on_rank_zero(lambda: self._record.note_status("running", step, export_folder=folder))
            self._trainer.export(self._args.export_hf, self._record.facts(step))
            self._record.say(f"exported to {self._args.export_hf}")
        if self._verdicts:
            counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self._verdicts.items()))
            self._record.say(f"rollouts: {counts}")
        on_rank_zero(lambda: self._record.note_status("finished", step))
