"""Adds this package's flags to Megatron's parser, and sets the arguments that follow from the machine and the model."""

import argparse
import os
import sys
import warnings
from functools import partial
from typing import Any

import torch
from megatron.training.arguments import add_megatron_arguments, parse_args

from megatron_rasft.config import RasftConfig
from megatron_rasft.config.command_line import asked_help, print_once
from megatron_rasft.config.defaults import DEFAULT_SEQ_LENGTH, changed_defaults
from megatron_rasft.config.help import MEGATRON
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.published import published_preset, wants_preset
from megatron_rasft.config.refusals import reasons, refuse_unsupported
from megatron_rasft.machine.requirements import refuse_unrunnable

WARMUP_STEPS = 4
"""Warm-up steps if no --lr-warmup-* flag is given. A shorter run gets fewer. ``training/warmup.py`` counts them."""


def parse_flags() -> argparse.Namespace:
    """Parses this process's command line by Megatron's parser, extended by this package's flags.

    Returns:
        Megatron's arguments. Their ``given_flags`` are the flags that the user typed: destination -> flag as typed.

    Raises:
        ValueError: a flag or a value is unknown, or the flag has no effect in this program.
        SystemExit: --help=WORD has been answered.
    """
    word = asked_help(sys.argv[1:])
    if word is not None:
        print_once(megatron_help(word), sys.stdout)
        sys.exit(0)
    parser: FlagParser | None = None

    def extended(megatron: argparse.ArgumentParser, **defaults: Any) -> argparse.ArgumentParser:
        nonlocal parser
        parser = add_arguments(megatron)
        parser.set_defaults(**defaults)
        return parser

    args = parse_args(extended)
    if wants_preset(args):
        # Parsing again makes the preset's values defaults that a flag can still change.
        args = parse_args(partial(extended, **published_preset()))
    assert parser is not None, "Megatron calls the extension"
    refuse_unsupported(parser, args)
    return args


def add_arguments(megatron: argparse.ArgumentParser) -> FlagParser:
    """Returns Megatron's parser with a group of flags for each package, and with this program's defaults."""
    defaults = changed_defaults(megatron)
    changed = (_as_flag(name, value) for name, value in defaults.items())
    parser = FlagParser(
        parents=[megatron],
        description="Rollout-Adaptive Supervised Fine-Tuning on Megatron-Core.",
        epilog=f"These defaults differ from Megatron's: {', '.join(changed)}, and --lr-warmup-iters {WARMUP_STEPS} "
        "if no warm-up is given. Step k of a warm-up of W steps has k/W of the learning rate, so the first step trains; with "
        "--lr-warmup-init the warm-up is Megatron's, and the first step has that rate.",
        add_help=False,
    )
    for title, section in RasftConfig.sections().items():
        add_flags(parser.add_argument_group(f"rasft {title}", section.__doc__), section)
    for action in parser._actions:
        action.help = _printable(action)
    parser.set_defaults(**defaults)
    return parser


def megatron_help(word: str) -> str:
    """The help on Megatron's flags, with the refused ones marked.

    Args:
        word: shows only the flags whose name or text contains it, also after ``megatron:``. ``megatron``: all flags, and the defaults
            that differ here.

    Raises:
        ValueError: no flag contains the word.
    """
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
    own = {name for section in RasftConfig.sections().values() for name in section.flag_fields()}
    word = word.lower().lstrip("-").replace("_", "-").removeprefix(MEGATRON).lstrip(":")
    refused = reasons(parser)
    shown = set()
    for action in parser._actions:
        text = f"{' '.join(action.option_strings)} {action.help}".lower().replace("_", "-")
        if action.dest in own or word not in text:
            action.help = argparse.SUPPRESS
            continue
        shown.add(action.dest)
        if action.dest in refused:
            action.help = f"[REFUSED: {refused[action.dest].replace('%', '%%')}.] {action.help or ''}"
    if not shown:
        raise ValueError(f"--help={word}: no flag contains this word. --help lists this project's flags.")
    parser._action_groups = [
        group
        for group in parser._action_groups
        if any(action.dest in shown for action in group._group_actions)
    ]
    parser.usage = "pretrain_rasft.py [flags]"
    if word:
        parser.epilog = None
    return parser.format_help()


def _as_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _printable(action: argparse.Action) -> str | None:
    """Returns a help text that argparse can format: a single % would be read as a placeholder, so it is doubled."""
    text = action.help
    if text is None or "%" not in text:
        return text
    try:
        _ = text % {**vars(action), "prog": ""}
    except (ValueError, TypeError, KeyError):
        return text.replace("%", "%%")
    return text


def fill_in(args: argparse.Namespace, architecture: dict[str, Any]) -> None:
    """Sets the arguments that follow from the model's config.json and from this machine.

    Args:
        args: parsed, not yet validated by Megatron.
        architecture: Megatron's argument -> value, from config.json.

    Raises:
        ValueError: a flag contradicts the model, or needs hardware or a library that this machine lacks.
    """
    _check_architecture(args, architecture)
    for name, value in architecture.items():
        setattr(args, name, value)
    _set_warmup(args)
    if args.seq_length is None:
        args.seq_length = min(args.max_position_embeddings, DEFAULT_SEQ_LENGTH)
    if args.seq_length > args.max_position_embeddings:
        raise ValueError(
            f"--seq-length {args.seq_length} is longer than the {args.max_position_embeddings} positions the model "
            "was made for (config.json: max_position_embeddings, or with longrope or llama_4_scaling_beta "
            "original_max_position_embeddings). Give a smaller value."
        )
    args.decoder_seq_length = None
    has_gpu, has_te = torch.cuda.is_available() and _has_device(), has_transformer_engine()
    refuse_unrunnable(args, has_gpu=has_gpu, has_transformer_engine=has_te)
    if not has_te:
        _without_transformer_engine(args)
    elif architecture.get("add_bias_linear") and architecture.get("num_experts"):
        # Otherwise Megatron adds the biases of experts in place to a view, which autograd forbids (MLP.forward in transformer/mlp.py).
        args.moe_grouped_gemm = True
    if not has_gpu:
        if args.given_flags.get("distributed_backend") and args.distributed_backend != "gloo":
            raise ValueError(
                f"--distributed-backend {args.distributed_backend} needs a GPU, and this machine has no usable GPU. "
                "Leave the flag out: on a CPU the backend is gloo."
            )
        args.distributed_backend = "gloo"
        args.masked_softmax_fusion = False
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Overlapped communication must start before the computation that is launched after it (Megatron checks this).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if args.wandb_project:
        _check_wandb(args)
    if args.tensorboard_dir is None and args.save is not None and _importable("tensorboard"):
        args.tensorboard_dir = os.path.join(args.save, "tensorboard")


def _check_architecture(args: argparse.Namespace, architecture: dict[str, Any]) -> None:
    """Refuses a flag that contradicts config.json. ``fill_in`` would overwrite its value."""
    for name, value in architecture.items():
        given = getattr(args, name, None)
        if name not in args.given_flags or given == value:
            continue
        reason = f"{args.hf_model}/config.json has {value}"
        if name.endswith("dropout"):
            reason = "dropout makes log-probabilities random, so policy and reference would differ before the first step"
        if name == "expert_tensor_parallel_size":
            reason = "Megatron does not split experts that have biases"
        raise ValueError(f"{args.given_flags[name]} {given} is refused: {reason}. Leave the flag out.")


def _set_warmup(args: argparse.Namespace) -> None:
    """Sets the default warm-up in the unit of the run's length. Megatron ignores flags in the other unit, so they are refused."""
    own, other = ("samples", "iters") if args.train_samples else ("iters", "samples")
    if args.train_samples and "train_iters" in args.given_flags:
        raise ValueError(
            "--train-iters and --train-samples both give the run's length. Leave one of them out."
        )
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if getattr(args, f"{name}_{other}"):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}-{other} needs --train-{other}, but the run's length is given in {own}. Use {flag}-{own}."
            )
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise ValueError(
            f"--lr-warmup-fraction must be >= 0 and < 1 (a share of the decay), got {args.lr_warmup_fraction}."
        )
    if not has_own_warmup(args):
        args.lr_warmup_iters = 0 if args.train_samples else WARMUP_STEPS
        args.lr_warmup_samples = WARMUP_STEPS * args.global_batch_size if args.train_samples else 0


def has_own_warmup(args: argparse.Namespace) -> bool:
    """Returns whether the user gave a flag about warm-up."""
    return any(name.startswith("lr_warmup_") and name != "lr_warmup_init" for name in args.given_flags)


def _check_wandb(args: argparse.Namespace) -> None:
    # Megatron fails on each of these only on the last rank, with a traceback, while the other ranks wait.
    if not args.wandb_exp_name:
        raise ValueError("--wandb-project needs --wandb-exp-name NAME, the name of the run there.")
    if args.save is None and not args.wandb_save_dir:
        raise ValueError("--wandb-project needs --wandb-save-dir DIR, or --save, for its files.")
    if not _importable("wandb"):
        raise ValueError(
            "--wandb-project needs Weights & Biases, which cannot be imported here. Install it "
            "(pip install 'megatron-rasft[trackers]'), or leave the flag out."
        )


def has_transformer_engine() -> bool:
    """Returns whether this machine has a GPU and Transformer Engine can be imported."""
    return _has_device() and _importable("transformer_engine.pytorch")


def _has_device() -> bool:
    return torch.version.cuda is not None and os.path.exists("/dev/nvidiactl")


def _importable(name: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            __import__(name)
    except ImportError:
        return False
    return True


def _without_transformer_engine(args: argparse.Namespace) -> None:
    args.transformer_impl = "local"
    args.gradient_accumulation_fusion = False
    args.bias_swiglu_fusion = False
    args.bias_dropout_fusion = False
    args.apply_rope_fusion = False
    args.no_persist_layer_norm = True
    args.cross_entropy_loss_fusion = False
