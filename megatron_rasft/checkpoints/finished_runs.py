"""Finds out whether an earlier start has finished the run, from status.json, the newest checkpoint and the export."""

import argparse
import dataclasses

from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.monitoring.status import RunStatus, State
from megatron_rasft.ranks import on_rank_zero


def finished_before(args: argparse.Namespace, resume: Resume) -> bool:
    """Returns whether an earlier start has finished this run, and prints a line if so. Otherwise writes the state ``running``.

    A collective of the world. Heavy work comes after it: a finished run ends without loading the model.

    Args:
        args: Megatron's arguments with the length of the run. Reads --save and --export-hf too.
        resume: where the run resumes from.

    Raises:
        ValueError: --export-hf holds this run's export, but steps are left that it does not have.
    """

    def check() -> bool:
        if args.save is None:
            return False
        is_over = is_finished(args, resume)
        state: State = "finished" if is_over else "running"
        before, length = RunStatus.read(args.save) or RunStatus(state="running"), num_steps(args)
        status = dataclasses.replace(before, state=state, step=resume.step, num_steps=length, reason="")
        status.write(args.save)
        if is_over:
            print(describe_finished(args, resume), flush=True)
        return is_over

    return on_rank_zero(check)


def is_finished(args: argparse.Namespace, resume: Resume) -> bool:
    """Returns whether an earlier start has finished this run. It is for rank 0, and takes the arguments of ``finished_before``.

    Raises:
        ValueError: --export-hf holds this run's export, but steps are left that it does not have.
    """
    before = RunStatus.read(args.save)
    if before is None:
        return False
    is_over = resume.is_own and resume.step >= num_steps(args)
    is_exported = before.has_export(args.export_hf)
    if is_exported and not is_over:
        raise ValueError(
            f"--export-hf {args.export_hf} is this run's export from an earlier end, and the run goes on from step {resume.step} "
            f"to {num_steps(args)}. Name another folder, or move it away."
        )
    # The export is the last act of a run, so its folder proves the end even if the process was killed right after it.
    return is_over and (is_exported if args.export_hf else before.state == "finished")


def describe_finished(args: argparse.Namespace, resume: Resume) -> str:
    """The console line of a finished run."""
    exported = f", exported to {args.export_hf}" if args.export_hf else ""
    return f"finished before: step {resume.step} of {num_steps(args)} in {args.save}{exported}"


def num_steps(args: argparse.Namespace) -> int:
    """The steps of a run whose length is set."""
    # With --train-samples Megatron calculates the steps only when it builds the optimizer (update_train_iters).
    return int(args.train_iters or args.train_samples // args.global_batch_size)
