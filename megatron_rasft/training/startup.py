"""Starts a run up to Megatron's process groups: parses and checks the flags, then initializes everything except the model."""

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training.arguments import validate_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer, set_global_variables
from megatron.training.initialize import initialize_megatron

from megatron_rasft.checkpoints.background_saves import write_in_process
from megatron_rasft.config import RasftConfig
from megatron_rasft.config.command_line import check_given
from megatron_rasft.config.config_file import naming_lines
from megatron_rasft.errors import first_line
from megatron_rasft.machine.gpu_kernels import report_missing_transformer_engine
from megatron_rasft.machine.megatron_calls import VERBOSE, quiet
from megatron_rasft.model.layout_checks import check_layout, check_sampling, check_sinks, check_windows
from megatron_rasft.model.model_source import architecture_args, open_folder
from megatron_rasft.monitoring.status import RunStatus
from megatron_rasft.sync.broadcaster import prepare_nccl
from megatron_rasft.training.arguments import fill_in, parse_flags
from megatron_rasft.training.outputs import check_writable
from megatron_rasft.training.rollout_servers import read_keys
from megatron_rasft.weights.folder import HfFolder, ModelFolder

_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (
        r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
        UserWarning,
    ),
    (r"The argument order of load has been changed", UserWarning),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
)
"""Warnings of torch about calls in Megatron 0.19, which a user cannot change. The first two are printed since torch 2.14 and
2.11, the others when a checkpoint is loaded."""


def parse(
    argv: Sequence[str] | None = None, *, needs_data: bool = True
) -> tuple[Any, RasftConfig, ModelFolder]:
    """Parses and checks the command line. Nothing is initialized, and no weights are read.

    Args:
        argv: the flags; None uses the command line of this process.
        needs_data: whether --train-data must be given; False for a model that only samples.

    Returns:
        Megatron's arguments, this package's configuration, and the opened model folder.

    Raises:
        ValueError, ModelFolderError: the message names the flag or the file, the rule and the way out.
    """
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]  # Megatron's parse_args can read the flags only from sys.argv
    with naming_lines(sys.argv[1:]):
        return _parse(needs_data)


def _parse(needs_data: bool) -> tuple[Any, RasftConfig, ModelFolder]:
    args = parse_flags()
    config = RasftConfig.from_args(args)
    read_keys(config.rollout)
    _check_paths(args, needs_data=needs_data)
    if args.fp16:
        raise ValueError(
            "--fp16 is not supported: it skips steps until the loss scale fits. Use --bf16, which needs no loss scale."
        )
    folder = open_folder(args, config, only_samples=not needs_data)
    fill_in(args, architecture_args(folder, config.run.rasft_query_groups))
    check_layout(args)
    if isinstance(folder, HfFolder):
        check_windows(args, folder.family, config)
        check_sinks(args, folder.family)
    _validate(args)
    check_sampling(args, config)
    if args.vocab_size is not None and args.padded_vocab_size is None:
        # Megatron pads the vocabulary when it builds its tokenizer, which a run here does not have.
        unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = -(-args.vocab_size // unit) * unit
    return args, config, folder


def _check_paths(args: Any, *, needs_data: bool) -> None:
    check_given(args, needs_data=needs_data)
    if args.export_hf is not None and os.path.exists(args.export_hf):
        before = RunStatus.read(args.save)
        if before is not None and before.has_export(args.export_hf):
            return  # finished_before decides, when the length of the run is known
        raise ValueError(
            f"--export-hf {args.export_hf} exists already. Name a folder that does not exist, or move it away."
        )


def _validate(args: Any) -> None:
    """Runs Megatron's own check, which also fills in arguments that follow from others."""
    if args.async_save:
        if args.ckpt_format != "torch_dist":
            raise ValueError(
                f"--async-save cannot be combined with --ckpt-format {args.ckpt_format}: only torch_dist is written in the "
                "background. Leave one of the two out."
            )
        # Megatron's check clears --async-save if there is no persistent worker. SaveQueue takes the worker's place.
        args.use_persistent_ckpt_worker, args.async_strategy = True, "mcore"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            validate_args(args, {})
    except AssertionError as error:
        check = traceback.extract_tb(error.__traceback__)[-1].line  # many have no message
        raise ValueError(first_line(error, f"Megatron rejects these arguments: {check}")) from error
    args.use_persistent_ckpt_worker = False


def start(args: Any) -> None:
    """Initializes torch.distributed and Megatron's groups, timers, writers and random states.

    Raises:
        ValueError: --save cannot be written.
    """
    if args.save is not None:
        check_writable("--save", Path(args.save), Path(args.save))
    if not os.environ.get(VERBOSE):
        args.logging_level = logging.ERROR
        logging.getLogger("megatron").setLevel(logging.ERROR)
        for message, category in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
    import megatron.core.datasets.utils as datasets_utils

    # Megatron runs make to compile a helper. The wheel contains the compiled helper, but no Makefile.
    datasets_utils.compile_helpers = lambda: None
    write_in_process()
    stand_in_for_launcher()
    if args.distributed_backend == "gloo" and not torch.distributed.is_initialized():
        # Megatron would pass a CUDA device id, which gloo does not take.
        torch.distributed.init_process_group("gloo")
    if args.rollout_engine == "sglang" and args.sync_method == "broadcast":
        prepare_nccl(args.sync_interface)  # NCCL reads its environment when the first group is created
    with quiet():
        set_global_variables(args, build_tokenizer=False)
        initialize_megatron(allow_no_cuda=True)
    report_missing_transformer_engine(args)


def stand_in_for_launcher() -> None:
    """Sets the variables that torchrun sets, if the process was started without it. The world then consists of this process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    # gloo and NCCL find the other ranks through these variables.
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)


def writers() -> tuple[Any | None, Any | None]:
    """Returns Megatron's TensorBoard and Weights & Biases writers; None except on the last rank."""
    return get_tensorboard_writer(), get_wandb_writer()
