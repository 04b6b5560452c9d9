"""Checks that a checkpoint fits the flags and the problems of a run. Nothing is built, so --dry-run makes the same checks.

They read the small files of a checkpoint: the run's own state, and Megatron's part that is not tensors.
"""

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_rasft.checkpoints.finished_runs import is_finished
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.checkpoints.state_files import architecture_of, load_explained, read_state, refused_scales
from megatron_rasft.config import RasftConfig
from megatron_rasft.curriculum.curriculum import check_state, problems_fingerprint
from megatron_rasft.data.tokenized_rows import ByProblem, fingerprint_of
from megatron_rasft.errors import CheckpointError
from megatron_rasft.flags import flag_name
from megatron_rasft.model.fp8_scales import needs_unpickling
from megatron_rasft.training.problems import Problems
from megatron_rasft.training.reference import initial_fingerprint

OVERRIDE = "--override-opt_param-scheduler"

_LENGTH = ("train_iters", "train_samples", "global_batch_size")
_DECAY = ("lr_decay_iters", "lr_decay_samples", *_LENGTH)

_SCHEDULE = {
    "max_lr": ("lr",),
    "min_lr": ("min_lr",),
    "lr_decay_style": ("lr_decay_style",),
    "lr_warmup_steps": ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", *_DECAY),
    "lr_decay_steps": _DECAY,
    "start_wd": ("weight_decay", "start_weight_decay"),
    "end_wd": ("weight_decay", "end_weight_decay"),
    "wd_incr_style": ("weight_decay_incr_style",),
    "wd_incr_steps": _LENGTH,
}
"""Setting of Megatron's OptimizerParamScheduler -> the arguments that it is calculated from."""

_FIXED = ("optimizer", "decoupled_lr", "decoupled_min_lr", "data_parallel_random_init")
"""Arguments that must be those of the checkpoint, whatever flags are given: Megatron's load fails otherwise."""


def check_resume(args: argparse.Namespace, config: RasftConfig, resume: Resume, problems: Problems) -> None:
    """Refuses a checkpoint that the run cannot continue. It is for rank 0, and does nothing in a run that begins or is finished.

    Args:
        args: Megatron's arguments with the length of the run.
        problems: those of --train-data.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another model, or was trained with other flags or problems.
    """
    if resume.folder is None or is_finished(args, resume):
        return
    state = read_state(resume, architecture_of(args))
    known = ByProblem(problems.demonstrations, lambda d: d)
    fingerprint = problems_fingerprint(list(known), fingerprint_of(problems.demonstrations))
    check_state(state["refresh"]["curriculum"], fingerprint)
    if config.objective.needs_reference():
        _check_reference(args, resume, state["initial_weights"])
    if needs_unpickling(args, state, is_own=resume.is_own):
        raise refused_scales(resume)
    if not args.no_load_optim and _is_torch_dist(state):
        with load_explained(resume), _quiet_torch():
            common = dist_checkpointing.load_common_state_dict(str(resume.checkpoint))
        if "opt_param_scheduler" not in common:
            raise CheckpointError(
                f"checkpoint {resume.checkpoint} was saved with --no-save-optim. Add --no-load-optim to go on with a new optimizer and "
                "the beginning of the schedule."
            )
        refuse_other_flags(resume, common["args"], common["opt_param_scheduler"], args)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Hides torch's warning that it reads in one process, which is wanted, and the tracebacks that it logs before it raises."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        root.setLevel(level)


def _check_reference(args: argparse.Namespace, resume: Resume, began_with: str) -> None:
    """Refuses to resume with other initial weights: they are the objective's reference."""
    if began_with != initial_fingerprint(Path(args.hf_model), resume.converted):
        raise CheckpointError(
            f"the run began with other weights than those of {resume.converted or args.hf_model}, which would now become its "
            "reference. Give the --hf-model, and the --load of converted weights, that it began with."
        )


def _is_torch_dist(state: dict[str, Any]) -> bool:
    """Returns whether Megatron's part of the checkpoint can be read without the tensors. The load checks other formats."""
    megatron = (state.get("config") or {}).get("megatron", {})
    return megatron.get("ckpt_format", "torch_dist") == "torch_dist"


@dataclass(frozen=True)
class _Change:
    """An argument that differs from that of a checkpoint."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = ("not given" if value is None else value for value in (self.before, self.now))
        return f"{flag_name(self.name)} {before} (now {now})"


def refuse_other_flags(
    resume: Resume, before: argparse.Namespace, schedule: dict[str, Any], now: argparse.Namespace
) -> None:
    """Refuses flags with which Megatron cannot load the optimizer or the schedule of a checkpoint.

    Args:
        before: Megatron's arguments as the checkpoint holds them.
        schedule: the state of Megatron's scheduler in the checkpoint.
        now: Megatron's arguments with the length of the run.

    Raises:
        CheckpointError: the message names each flag with both values, and the way out.
    """
    fixed = list(_differing(_FIXED, before, now))
    if fixed:
        raise CheckpointError(
            f"checkpoint {resume.checkpoint} was trained with {_listed(fixed)}, which a resumed run must keep. Give the former value, or "
            "start a new run from exported weights (tools/convert_checkpoint.py megatron-to-hf, then --hf-model)."
        )
    if now.override_opt_param_scheduler or now.use_checkpoint_opt_param_scheduler:
        return
    changed = list(_schedule_changes(before, schedule, now))
    if changed:
        raise CheckpointError(
            f"checkpoint {resume.checkpoint} was trained with {_listed(changed)}. Give the former values to go on as before, or add "
            f"{OVERRIDE} to go on from step {resume.step} with the new ones."
        )


def _listed(changes: list[_Change]) -> str:
    return ", ".join(map(str, changes))


def _schedule_changes(
    before: argparse.Namespace, schedule: dict[str, Any], now: argparse.Namespace
) -> Iterator[_Change]:
    """Yields the arguments that change the schedule, each once."""
    given, seen = scheduler_settings(now), set()
    for setting, names in _SCHEDULE.items():
        if setting not in schedule or schedule[setting] == given[setting]:
            continue
        found = list(_differing(names, before, now))
        if not found:  # the checkpoint's flags had no effect, because of --use-checkpoint-opt_param-scheduler
            unit = now.global_batch_size if setting.endswith("_steps") and now.train_samples is None else 1
            found = [_Change(names[0], _divided(schedule[setting], unit), _divided(given[setting], unit))]
        for change in found:
            if change.name not in seen:
                seen.add(change.name)
                yield change


def _divided(value: Any, unit: int) -> Any:
    return value if unit == 1 else f"{value / unit:g}"


def _differing(
    names: tuple[str, ...], before: argparse.Namespace, now: argparse.Namespace
) -> Iterator[_Change]:
    for name in names:
        values = _given(before, name), _given(now, name)
        if values[0] != values[1]:
            yield _Change(name, *values)


def _given(args: argparse.Namespace, name: str) -> Any:
    """The value of an argument; None for those that only repeat others, because Megatron filled them in."""
    value = getattr(args, name, None)
    repeats = {
        "lr_decay_iters": "train_iters",
        "lr_decay_samples": "train_samples",
        "start_weight_decay": "weight_decay",
        "end_weight_decay": "weight_decay",
    }
    if name in repeats and value == getattr(args, repeats[name], None):
        return None
    if name == "train_iters" and args.train_samples is not None:
        return None
    return value


def scheduler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the scheduler that Megatron makes from the arguments (get_optimizer_param_scheduler in training.py)."""
    if args.train_samples is None:
        unit, length, decay, warmup = (
            args.global_batch_size,
            args.train_iters,
            args.lr_decay_iters,
            args.lr_warmup_iters,
        )
    else:
        unit, length, decay, warmup = 1, args.train_samples, args.lr_decay_samples, args.lr_warmup_samples
    decay_steps = (length if decay is None else decay) * unit
    fraction = args.lr_warmup_fraction
    return {
        "max_lr": float(args.lr),
        "min_lr": args.min_lr,
        "lr_decay_style": args.lr_decay_style,
        "lr_warmup_steps": warmup * unit if fraction is None else fraction * decay_steps,
        "lr_decay_steps": decay_steps,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_style": args.weight_decay_incr_style,
        "wd_incr_steps": length * unit,
    }
