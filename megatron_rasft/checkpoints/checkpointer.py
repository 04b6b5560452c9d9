"""Saves a run's checkpoints, in the background with --async-save, and loads the one that the run resumes from."""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.training import checkpointing, training
from megatron.training.async_utils import is_empty_async_queue

from megatron_rasft.checkpoints.background_saves import SaveQueue, write_in_background
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.checkpoints.state_files import (
    LOAD_FAILURES,
    architecture_of,
    checkpoint_failure,
    expired,
    incomplete,
    is_lost_peer,
    load_explained,
    read_arrays,
    read_state,
    refuse_other_model,
    save_explained,
    write_state,
)
from megatron_rasft.data.sample_arrays import Array
from megatron_rasft.errors import CheckpointError
from megatron_rasft.machine.megatron_calls import overridden, quiet
from megatron_rasft.model.fp8_scales import DelayedScales, own_scales_loaded
from megatron_rasft.ranks import kept_by_rank_zero, on_rank_zero


class Trained(Protocol):
    """The parts of a Trainer that a checkpoint holds."""

    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    scales: DelayedScales
    iteration: int
    floating_point_operations: float

    def parameters_gathered(self) -> AbstractContextManager[None]: ...

    def pause_preparation(self) -> None: ...


class Checkpointer:
    """A run's checkpoints in --save. Every method is a collective of the world.

    Args:
        args: Megatron's arguments.
        trainer: the trainer to save and load.
        resume: where the run resumes from.
        device: the device of the parameters.
    """

    def __init__(
        self, args: argparse.Namespace, trainer: Trained, resume: Resume, device: torch.device
    ) -> None:
        self._args = args
        self._trainer = trainer
        self.resume = resume
        """Where the run resumes from."""
        self._context: dict[str, Any] = {}
        """State that Megatron's save functions keep between two saves."""
        self._saving_step: int | None = None
        """The step of the checkpoint that is being written in the background."""
        self._saves: SaveQueue | None = None
        if args.async_save:
            self._saves = SaveQueue.for_run(args, device)
            write_in_background(self._saves)

    @property
    def written_at(self) -> float:
        """``time.monotonic()`` at which this rank's part of the last background save was written."""
        return 0.0 if self._saves is None else self._saves.written_at

    def save(self, state: Callable[[], tuple[dict[str, Any], dict[str, Array]]]) -> None:
        """Writes a checkpoint and the run's state. The previous checkpoint stays the newest until this one is complete.

        With --async-save a later ``finish`` completes it. The previous save must be complete.

        Args:
            state: returns values that JSON can hold, and arrays; called on rank 0.
        """
        args, trainer = self._args, self._trainer
        step = trainer.iteration
        folder = Path(checkpointing.get_checkpoint_name(args.save, step, return_base_dir=True))

        def write() -> None:
            values, arrays = state()
            own = {"architecture": architecture_of(args), **trainer.scales.state_dict()}
            write_state(folder, {**values, **own}, arrays)

        with save_explained(f"the checkpoint of step {step}", folder):
            # The run's state comes first: Megatron completes the checkpoint and writes the tracker file last.
            on_rank_zero(write)
            with trainer.parameters_gathered(), quiet(), self._own_deletion():
                checkpointing.save_checkpoint(
                    step,
                    trainer.model,
                    trainer.optimizer,
                    trainer.scheduler,
                    trainer.floating_point_operations,
                    checkpointing_context=self._context,
                )
        if args.async_save:
            self._saving_step = step
        else:
            self._delete_expired(step)

    def load(self) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """Loads the checkpoint that the run resumes from into the trainer.

        Returns:
            The run's state on every rank, and the arrays saved with it on rank 0 ({} on the others); None without a checkpoint.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, of another model, or was not written by this program.
        """
        args, trainer, resume = self._args, self._trainer, self.resume
        folder = resume.checkpoint
        if folder is None:
            return None
        state: dict[str, Any] = on_rank_zero(lambda: read_state(resume, architecture_of(args)))
        # Only rank 0 has the queue of batches, so the arrays of its samples are not broadcast.
        arrays: dict[str, Array] = kept_by_rank_zero(lambda: read_arrays(folder, state), {})
        with (
            load_explained(resume),
            own_scales_loaded(args, is_own=resume.is_own),
            _rates_replaced(args, trainer, folder),
            overridden(args, load=str(resume.folder), ckpt_step=resume.step),
            quiet(),
        ):
            iteration, trainer.floating_point_operations = checkpointing.load_checkpoint(
                trainer.model,
                trainer.optimizer,
                trainer.scheduler,
                checkpointing_context=self._context,
            )
        trainer.iteration = args.iteration = iteration
        trainer.scales.load_state_dict(state)
        return state, arrays

    def finish(self, *, is_blocking: bool = True) -> int | None:
        """Completes the checkpoint that is being written in the background (--async-save).

        Args:
            is_blocking: whether to wait until every rank has written its part.

        Returns:
            The step of the checkpoint that is now complete; None if it is incomplete, or if none was being written.
        """
        if self._saving_step is None:
            return None
        # With --save-retain-interval Megatron forks a process that deletes the previous checkpoint (iter_finalize_fn in
        # megatron/training/checkpointing.py). No other thread may hold a lock then: the forked process could not release it.
        self._trainer.pause_preparation()
        explained = save_explained(f"the checkpoint of step {self._saving_step}", Path(self._args.save))
        with explained, quiet(), self._own_deletion():
            training.maybe_finalize_async_save(blocking=is_blocking)
        if not is_empty_async_queue():
            return None
        step, self._saving_step = self._saving_step, None
        self._delete_expired(step)
        return step

    def _own_deletion(self) -> AbstractContextManager[None]:
        """With --rasft-keep-checkpoints switches off Megatron's deletion, which keeps one checkpoint besides those of the interval."""
        args = self._args
        retain = None if args.rasft_keep_checkpoints else args.save_retain_interval
        return overridden(args, save_retain_interval=retain)

    def lost_save(self, error: BaseException | None) -> CheckpointError | None:
        """Returns the error that ends the run if another rank ended while a checkpoint was being written in the background.

        Args:
            error: raised anywhere in the run, for example by a collective of the next step; None for none.

        Returns:
            None if no checkpoint was being written, or if ``error`` has another cause.
        """
        if self._saving_step is None or error is None or not is_lost_peer(error):
            return None
        return incomplete(f"the checkpoint of step {self._saving_step}", error)

    def _delete_expired(self, newest: int) -> None:
        """Deletes the checkpoints that --rasft-keep-checkpoints does not keep, now that ``newest`` is complete."""
        keep = self._args.rasft_keep_checkpoints
        if keep is None:
            return

        def delete() -> None:
            for folder in expired(Path(self._args.save), newest, keep, self._args.save_retain_interval):
                shutil.rmtree(folder, ignore_errors=True)

        on_rank_zero(delete)


@contextlib.contextmanager
def _rates_replaced(args: argparse.Namespace, trainer: Trained, checkpoint: Path) -> Iterator[None]:
    """Allows a checkpoint to be loaded with another --lr and --min-lr, which --override-opt_param-scheduler and its opposite permit.

    Megatron finds the parameter groups of a checkpoint by their settings, among them the learning rates (load_state_dict in
    core/optimizer/distrib_optimizer.py). While it loads, the groups therefore have the rates of the checkpoint.
    """
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        yield
        return
    schedule = dist_checkpointing.load_common_state_dict(str(checkpoint))["opt_param_scheduler"]
    before = {name: schedule[name] for name in ("max_lr", "min_lr")}
    now = {"max_lr": args.lr, "min_lr": args.min_lr}
    _replace_rates(trainer.optimizer.param_groups, now, before)
    yield
    if args.override_opt_param_scheduler:
        _replace_rates(trainer.optimizer.param_groups, before, now)
        trainer.scheduler.step(0)  # sets the rate of the next step


def _replace_rates(groups: Iterable[dict[str, Any]], old: dict[str, float], new: dict[str, float]) -> None:
    """Replaces the rates of all groups except those with rates of their own (--decoupled-lr)."""
    for group in groups:
        group.update({name: new[name] for name in old if group.get(name) == old[name]})


def load_converted_weights(
    args: argparse.Namespace, model: list[torch.nn.Module], optimizer: Any, scheduler: Any, converted: Path
) -> None:
    """Loads weights without a training state, as tools/convert_checkpoint.py writes them; a collective of the world.

    Args:
        args: Megatron's arguments.
        model: this rank's chunks, as Megatron's set-up returned them.
        optimizer: receives the loaded weights.
        scheduler: is not changed.
        converted: the folder that holds the weights; its parent is --load.

    Raises:
        CheckpointError: the weights are of another model, or damaged.
    """
    try:
        saved_with = dist_checkpointing.load_common_state_dict(str(converted))["args"]
        refuse_other_model(converted, architecture_of(saved_with), architecture_of(args))
        with quiet(), overridden(args, load=str(converted.parent)):
            checkpointing.load_checkpoint(model, optimizer, scheduler)
    except (AssertionError, *LOAD_FAILURES) as error:
        raise CheckpointError(
            f"the weights in {converted.parent} cannot be loaded: {checkpoint_failure(error).rstrip('.')}. They are damaged or "
            "do not fit this model: convert the --hf-model again."
        ) from error
    # Megatron does this itself only with --bf16 or --fp16 (load_checkpoint).
    optimizer.reload_model_params()
