"""--dry-run: what a run would do, from its flags, its data and config.json. It builds no model and writes nothing.

pretrain_rasft.py imports this module for --dry-run only. A run needs no other part of tools/.
"""

import argparse
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rasft.checkpoints.finished_runs import describe_finished, is_finished
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.checkpoints.state_files import architecture_of, read_state
from megatron_rasft.config import RasftConfig
from megatron_rasft.config.saved import SavedConfig
from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.tools.capacity.choosing import checkpoint_bytes
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model
from megatron_rasft.tools.capacity.memory import MemoryEstimate, estimate_memory
from megatron_rasft.training.assembly import describe_run, runs_on_gpu, schedule_of
from megatron_rasft.training.outputs import (
    data_cache,
    kept_nothing,
    metrics_file,
    reference_cache,
    rollouts_file,
)
from megatron_rasft.training.problems import Problems, open_replay, read_problems, set_length
from megatron_rasft.training.record import describe_changes
from megatron_rasft.training.remarks import remarks
from megatron_rasft.training.resume_checks import check_resume
from megatron_rasft.training.schedule import Schedule
from megatron_rasft.weights.shard_files import open_shards, shard_files
from megatron_rasft.wording import counted, size_text


def print_dry_run(args: argparse.Namespace, config: RasftConfig, resume: Resume) -> None:
    """Prints what the run would do, in the first process of the world.

    Args:
        args: Megatron's arguments, parsed and checked.
        resume: where the run would resume from.

    Raises:
        ValueError, RasftError: the run would end with this error before it builds the model.
    """
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(describe(args, config, resume)), flush=True)


def describe(args: argparse.Namespace, config: RasftConfig, resume: Resume) -> list[str]:
    """Returns the lines of the dry run."""
    config = replace(config, run=replace(config.run, dry_run=False))
    outputs = list(_outputs(args, config))
    for flag, path, _ in outputs:
        check_place(flag, path, is_folder=flag in _FOLDERS)
    problems, heldout = _read(args, config)
    set_length(args, config, problems.num)
    if args.save is not None and is_finished(args, resume):
        return [describe_finished(args, resume), _LAST_LINE.format("would do nothing")]
    check_resume(args, config, resume, problems)
    schedule = schedule_of(args, config, problems.num)
    return [
        *filter(None, [kept_nothing(args)]),
        describe_run(args, config, problems.num),
        *problems.summary.splitlines(),
        *(
            []
            if heldout is None
            else [_row("held out", counted(heldout.num, "problem")), *heldout.left_out_lines()]
        ),
        *_schedule_lines(args, config, schedule),
        *_resume_lines(args, config, resume, schedule),
        *_server_lines(config),
        *_memory_lines(args, config, problems),
        *(_row("would write", f"{path}: {content}") for _, path, content in outputs),
        *remarks(config, args.given_flags, problems.num_programs),
        _LAST_LINE.format("starts the run"),
    ]


_LAST_LINE = "dry run: no model was built and nothing was written. Without --dry-run this command {}."


def _row(label: str, text: str) -> str:
    return f"{label:<16}{text}"  # aligned with the lines about the data


def _read(args: argparse.Namespace, config: RasftConfig) -> tuple[Problems, Problems | None]:
    """Reads the data as the run would, but keeps nothing: neither tokenized rows nor the list of rows that are left out."""
    without_save = copy.copy(args)
    without_save.save = None
    uncached = replace(config, data=replace(config.data, data_cache=""))
    problems, heldout = read_problems(without_save, uncached)
    open_replay(config, problems)
    return problems, heldout


def _schedule_lines(args: argparse.Namespace, config: RasftConfig, schedule: Schedule) -> Iterator[str]:
    epochs = schedule.num_visits / schedule.num_problems
    yield _row(
        "steps",
        f"{schedule.num_steps} of {counted(schedule.batch_size, 'problem')}: {counted(epochs, 'epoch', form='.2f')}",
    )
    if schedule.left_out():
        yield schedule.left_out()
    if last := schedule.num_problems % schedule.batch_size:
        yield _row("", f"the last step of an epoch has {counted(last, 'problem')}")
    yield _row(
        "refreshes",
        f"{len(schedule.refreshes)}, every {counted(config.run.rasft_refresh_interval, 'step')}{_rollouts(config, schedule)}",
    )
    unit = "step" if args.train_samples is None else "sample"
    warmup = counted(args.lr_warmup_iters or args.lr_warmup_samples, unit)
    if args.lr_warmup_fraction is not None:
        warmup = f"{args.lr_warmup_fraction:.0%} of its decay"
    yield _row("learning rate", f"{args.lr:g}, {args.lr_decay_style}, warm-up of {warmup}")


def _rollouts(config: RasftConfig, schedule: Schedule) -> str:
    if not config.samples_rollouts:
        return ", without rollouts"
    each = config.rollout.rollout_num_samples
    text = f", {counted(each, 'rollout')} of each problem"
    if config.curriculum.curriculum_mode == "band":
        return f"{text} in the difficulty band"
    return f"{text}: {counted(each * schedule.num_visits, 'rollout')} in the whole run"


def _resume_lines(
    args: argparse.Namespace, config: RasftConfig, resume: Resume, schedule: Schedule
) -> Iterator[str]:
    if resume.folder is None:
        start = args.hf_model if resume.converted is None else resume.converted
        yield _row("starts", f"at step 0, with the weights in {start}")
        return
    left = max(0, schedule.num_steps - resume.step)
    yield _row("resumes", f"after step {resume.step} of {resume.folder}: {counted(left, 'step')} left")
    state = read_state(resume, architecture_of(args))
    yield from describe_changes(resume, state.get("config"), SavedConfig.of(args, config))


def _server_lines(config: RasftConfig) -> Iterator[str]:
    if config.samples_from_servers:
        yield _row("servers", "were not asked. tools/check_servers.py tests them.")


# ---- memory


_PARTS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("logits", "logits"),
    ("reference", "reference"),
    ("kv_cache", "key-value cache"),
    ("sync", "weight sync"),
    ("margin", "left free"),
)
"""(field of MemoryEstimate, label) of the parts of a process's memory. Not all of them exist at the same time."""


_STATE_BYTES = 18
"""Bytes per parameter of weights in BF16, gradients, master weights and two moments in fp32."""


@dataclass(kw_only=True)
class _PlannedRun(CapacityConfig):
    """A run whose objective has the flags of its command line."""

    given: Objective = field(default_factory=Rasft)

    @property
    def needs(self) -> Objective:
        return self.given


def _num_parameters(args: argparse.Namespace, config: RasftConfig) -> int:
    """Number of parameters in the folder --hf-model."""
    if config.run.model_source == "tables":
        return Model.read(Path(args.hf_model), config.run.rasft_query_groups).num_parameters
    path = Path(args.hf_model)
    _, stored = open_shards(path, shard_files(path))
    return sum(math.prod(tensor.shape) for tensor in stored.values())


def _memory_lines(args: argparse.Namespace, config: RasftConfig, problems: Problems) -> Iterator[str]:
    if config.run.model_source == "bridge":
        states = _STATE_BYTES * _num_parameters(args, config)
        yield _row(
            "memory",
            f"not estimated, because Megatron-Bridge builds the layers. Weights, gradients and optimizer states in BF16 have "
            f"{size_text(states)} in one replica",
        )
        return
    model = Model.read(Path(args.hf_model), config.run.rasft_query_groups)
    memory = run_memory(args, config, problems, model)
    parts = [(label, size) for name, label in _PARTS if (size := getattr(memory, name))]
    if runs_on_gpu(args):
        yield _row("memory", _sum_of_parts(memory.total, "on the fullest GPU", parts))
        if memory.host:
            yield _row("", f"{size_text(memory.host)} of host memory a GPU for the reference")
    else:
        total = memory.total + memory.host
        parts += [("copies for the reference", memory.host)] * bool(memory.host)
        yield _row("memory", _sum_of_parts(total, "in the largest process, without Python and torch", parts))
        if args.world_size > 1:
            yield _row("", f"{args.world_size} processes: up to {size_text(total * args.world_size)}")
    if "bfloat16" not in str(args.params_dtype):
        way_out = " (--bf16 trains in BF16)" if runs_on_gpu(args) else ""
        yield _row(
            "",
            f"these flags train in {str(args.params_dtype)[6:]}: weights, activations and logits are twice as large{way_out}",
        )


def _sum_of_parts(total: float, where: str, parts: list[tuple[str, float]]) -> str:
    listed = ", ".join(f"{label} {size_text(size)}" for label, size in parts)
    return f"{size_text(total)} {where}, in BF16 with the distributed optimizer: {listed}"


def run_memory(
    args: argparse.Namespace, config: RasftConfig, problems: Problems, model: Model
) -> MemoryEstimate:
    """Estimates the memory of a process in the layout of the flags, by capacity planning. A CPU needs no margin for CUDA and NCCL."""
    assert problems.rows is not None, "the first process has the rows"
    report, data_parallel = problems.rows.report, args.data_parallel_size
    planned = _PlannedRun(
        given=config.objective,
        num_gpus=args.world_size,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        max_new_tokens=min(config.rollout.rollout_max_new_tokens, args.seq_length - 1),
        rollout_batch_size=config.rollout.rollout_batch_size or CapacityConfig.rollout_batch_size,
        sync_bucket_mib=config.sync.sync_bucket_mib,
        logprob_chunk_tokens=config.loss.objective_logprob_chunk_tokens,
    )
    assumed = AssumptionConfig(prompt_tokens=max(1, report.num_prompt_tokens // report.num_demonstrations))
    if not runs_on_gpu(args):
        assumed = replace(assumed, margin_gib=0.0)
    return estimate_memory(
        model,
        _layout(args),
        planned,
        assumed,
        num_microbatches=args.global_batch_size // (args.micro_batch_size * data_parallel),
        is_fp8=bool(args.fp8),
        uses_servers=config.rollout.rollout_engine != "embedded",
        samples=config.samples_rollouts,
    )


def _layout(args: argparse.Namespace) -> Layout:
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        ep=args.expert_model_parallel_size,
        expert_tp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        chunks=args.virtual_pipeline_model_parallel_size or 1,
        recompute=args.recompute_granularity or "none",
    )


# ---- files

_FOLDERS = frozenset({"--save", "--data-cache", "--tensorboard-dir", "--export-hf"})
"""Flags whose outputs are folders; the others are files."""


def _outputs(args: argparse.Namespace, config: RasftConfig) -> Iterator[tuple[str, Path, str]]:
    """Yields (flag, path, content) of everything that the run would write."""
    num_parameters = _num_parameters(args, config)
    if args.save is not None:
        every = f"every {counted(args.save_interval, 'step')} and " if args.save_interval else ""
        kept = (
            "the newest is kept"
            if config.run.rasft_keep_checkpoints == 1
            else f"the newest {config.run.rasft_keep_checkpoints} are kept"
            if config.run.rasft_keep_checkpoints
            else "all are kept"
        )
        size = f"{size_text(checkpoint_bytes(num_parameters))} each in BF16"
        yield (
            "--save",
            Path(args.save),
            f"checkpoints {every}after the last one ({size}; {kept}), config.json, config.toml, status.json",
        )
    for file, content in (
        (metrics_file(args, config), "all metrics"),
        (rollouts_file(args, config), "all rollouts"),
    ):
        if file is not None:
            yield file.flag, file.path, content
    if (path := reference_cache(args, config)) is not None:
        yield "--rasft-ref-cache", path, "log-probabilities of the reference"
    if (path := data_cache(args, config.data.data_cache)) is not None:
        yield "--data-cache", path, "tokenized rows"
    if args.tensorboard_dir is not None:
        yield "--tensorboard-dir", Path(args.tensorboard_dir), "TensorBoard's files"
    if args.export_hf is not None:
        size = size_text(num_parameters * args.params_dtype.itemsize)
        yield "--export-hf", Path(args.export_hf), f"the trained model at the end, {size}"


def check_place(flag: str, path: Path, *, is_folder: bool) -> None:
    """Checks, without writing, that a file or folder could be created at a path or is writable.

    Raises:
        ValueError: it could not; the message names the flag.
    """
    existing = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    must_be_folder = is_folder or existing != path
    if not os.access(existing, os.W_OK) or existing.is_dir() != must_be_folder:
        raise ValueError(f"{flag} {path} cannot be written, because of {existing}. Name another place.")
