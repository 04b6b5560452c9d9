"""From the command line to Megatron's process groups: flags parsed and checked, then everything but the model initialised."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training.arguments import validate_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer, set_global_variables
from megatron.training.initialize import initialize_megatron

from megatron_rasft.config import RasftConfig
from megatron_rasft.errors import first_line
from megatron_rasft.sync.groups import prepare_nccl
from megatron_rasft.training.arguments import fill_in, parse_flags
from megatron_rasft.training.background_saves import write_in_process
from megatron_rasft.training.gpu_kernels import report_missing_transformer_engine
from megatron_rasft.training.megatron_calls import VERBOSE, quiet
from megatron_rasft.training.outputs import check_writable
from megatron_rasft.training.rollout_servers import read_keys
from megatron_rasft.weights.architecture import megatron_args, splits_attention
from megatron_rasft.weights.folder import HfFolder

_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
)
"""What torch (2.14 on, and 2.11) says of the way Megatron 0.19 calls it."""


def parse(argv: Sequence[str] | None = None, *, needs_data: bool = True) -> tuple[Any, RasftConfig, HfFolder]:
    """Parse and check the command line; nothing is initialised, no weight is read.

    Args:
        argv: the flags; None takes the process's own.
        needs_data: whether --train-data must be given; False is for a model that only samples.

    Returns:
        Megatron's arguments, our configuration, and the opened model folder.

    Raises:
        ValueError, ModelFolderError, CheckpointError: with the flag or the file, the rule and the way out.
    """
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    args = parse_flags()
    config = RasftConfig.from_args(args)
    read_keys(config.rollout)
    if args.hf_model is None:
        raise ValueError("--hf-model DIR is missing: the Hugging Face folder of the model to train.")
    if needs_data and not args.train_data:
        raise ValueError(
            "--train-data FILE is missing: the demonstrations to train on (.jsonl, .jsonl.gz or .parquet)."
        )
    if args.export_hf is not None and os.path.exists(args.export_hf):
        raise ValueError(
            f"--export-hf {args.export_hf} exists already. Name a folder that does not, or move it away."
        )
    if args.fp16:
        raise ValueError(
            "--fp16 is not supported: its steps are skipped until the loss scale fits. Use --bf16, which needs none."
        )
    folder = HfFolder.open(args.hf_model)
    fill_in(args, megatron_args(folder, config.run.rasft_query_groups))
    _check_layout(args)
    if args.async_save:
        _choose_async_form(args)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            validate_args(args, {})
    except AssertionError as error:
        raise ValueError(first_line(error, "Megatron refuses these arguments")) from error
    args.use_persistent_ckpt_worker = False
    _check_sampling(args, config)
    if args.vocab_size is not None and args.padded_vocab_size is None:
        unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = -(-args.vocab_size // unit) * unit
    return args, config, folder


def _choose_async_form(args: Any) -> None:
    """Keep Megatron from clearing --async-save: validate_args does so without a persistent worker, which SaveQueue replaces."""
    if args.ckpt_format != "torch_dist":
        raise ValueError(
            f"--async-save does not go with --ckpt-format {args.ckpt_format}: only torch_dist is written in the background. "
            "Leave one of the two out."
        )
    args.use_persistent_ckpt_worker, args.async_strategy = True, "mcore"


def _check_sampling(args: Any, config: RasftConfig) -> None:
    """Replicas sample at their own pace; experts spread over them would need them in step."""
    if args.expert_model_parallel_size == 1:
        return
    flag = f"--expert-model-parallel-size {args.expert_model_parallel_size}"
    if config.samples_rollouts and config.rollout.rollout_engine == "embedded":
        raise ValueError(
            f"{flag} does not go with --rollout-engine embedded: data-parallel ranks sample at their own pace. Sample from "
            "servers (--rollout-engine sglang), or keep every expert on each rank (--expert-model-parallel-size 1)."
        )
    if config.heldout.heldout_data:
        raise ValueError(
            f"{flag} does not go with --heldout-data, which the trainer samples itself: evaluate checkpoints with "
            "tools/evaluate.py instead, or keep every expert on each rank (--expert-model-parallel-size 1)."
        )


def _check_layout(args: Any) -> None:
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    size = tp * pp * cp
    if args.world_size % size:
        raise ValueError(
            f"tensor x pipeline x context parallel = {tp} x {pp} x {cp} = {size} does not fit {args.world_size} "
            f"processes. Start a multiple of {size} with --nproc-per-node, or choose smaller sizes."
        )
    heads, groups = args.num_attention_heads, args.num_query_groups
    if not splits_attention(heads, groups, tp):
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide the model's {heads} heads in {groups} query groups. Use "
            f"another size, or --rasft-query-groups {-(-groups // tp) * tp}, which adds groups of zeros."
        )
    per_step = args.micro_batch_size * args.world_size // size
    if args.global_batch_size % per_step:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of micro batch size x data parallel = "
            f"{args.micro_batch_size} x {args.world_size // size} = {per_step}. Use one that is."
        )


def start(args: Any) -> None:
    """Initialise torch.distributed, Megatron's groups, timers, writers and random states.

    Raises:
        ValueError: --save cannot be written to.
    """
    if args.save is not None:
        check_writable("--save", Path(args.save), Path(args.save))
    if not os.environ.get(VERBOSE):
        args.logging_level = logging.ERROR
        logging.getLogger("megatron").setLevel(logging.ERROR)
        for message, category in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
    import megatron.core.datasets.utils as datasets_utils

    # The wheel has the compiled helper but not the Makefile that this would call.
    datasets_utils.compile_helpers = lambda: None
    write_in_process()
    stand_in_for_launcher()
    if args.distributed_backend == "gloo" and not torch.distributed.is_initialized():
        # Given beforehand, so that no CUDA device id is passed to gloo.
        torch.distributed.init_process_group("gloo")
    if args.rollout_engine == "sglang" and args.sync_method == "broadcast":
        prepare_nccl(args.sync_interface)
    with quiet():
        set_global_variables(args, build_tokenizer=False)
        initialize_megatron(allow_no_cuda=True)
    report_missing_transformer_engine(args)


def stand_in_for_launcher() -> None:
    """Set the variables that torchrun sets, for a process that was started without it: it is a world of its own."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    # The rendezvous of gloo and of NCCL reads these.
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
