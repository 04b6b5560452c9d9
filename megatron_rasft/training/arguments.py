"""Adds this package's flags to Megatron's parser, and fills in what the machine and the model decide."""

import argparse
import os
import warnings
from functools import partial
from typing import Any

import torch
from megatron.training.arguments import parse_args

from megatron_rasft.config import RasftConfig
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.verify import published_filters
from megatron_rasft.training.refusals import refuse_unsupported
from megatron_rasft.training.requirements import refuse_unrunnable

CHANGED_DEFAULTS = {
    "micro_batch_size": 1,
    "global_batch_size": 256,
    "lr": 5e-5,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "calculate_per_token_loss": True,
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
    "exit_signal_handler": True,
    "log_interval": 1,
    "save_interval": 100,
    "rerun_mode": "disabled",
    "num_workers": 0,
    "position_embedding_type": "rope",
    "tokenizer_type": "NullTokenizer",
    # Megatron's default, delayed, scales by what earlier passes saw, and the first passes of a run have seen nothing.
    "fp8_recipe": "tensorwise",
}
"""Of Megatron's own flags: those of supervised fine-tuning."""

NEWER_DEFAULTS = {
    # From 0.20 on: at the end of a save Megatron would write its own tokenizer, which this program never builds.
    "save_tokenizer_assets": False,
}
"""The same for flags that only a later Megatron-Core has."""

WARMUP_STEPS = 4
"""Where no --lr-warmup-* is given; fewer in a run that is shorter."""


def parse_flags() -> argparse.Namespace:
    """This process's command line, read by Megatron's parser with this package's flags in it.

    Returns:
        Megatron's arguments, and ``given_flags``: the flags that were typed, as typed, by their destination.

    Raises:
        ValueError: a flag or a value is unknown, or means nothing here.
    """
    parser: FlagParser | None = None

    def extended(megatron: argparse.ArgumentParser, **defaults: Any) -> argparse.ArgumentParser:
        nonlocal parser
        parser = add_arguments(megatron)
        parser.set_defaults(**defaults)
        return parser

    args = parse_args(extended)
    if args.objective == "rasft" and args.rasft_weighting == "published":
        # the published script's filters are on, and a flag still says otherwise
        args = parse_args(partial(extended, **published_filters()))
    assert parser is not None, "Megatron has asked for it"
    refuse_unsupported(parser, args)
    return args


def add_arguments(megatron: argparse.ArgumentParser) -> FlagParser:
    """Megatron's parser with one group more per room, and with our defaults of Megatron's flags."""
    known = {action.dest for action in megatron._actions}
    defaults = CHANGED_DEFAULTS | {name: v for name, v in NEWER_DEFAULTS.items() if name in known}
    changed = (_as_flag(name, value) for name, value in defaults.items())
    parser = FlagParser(
        parents=[megatron],
        description="Rollout-Adaptive Supervised Fine-Tuning on Megatron-Core.",
        epilog=f"Defaults of Megatron's flags that differ from Megatron's: {', '.join(changed)}, and --lr-warmup-iters "
        f"{WARMUP_STEPS} where no warm-up is given.",
        add_help=False,
    )
    for title, section in RasftConfig.sections().items():
        add_flags(parser.add_argument_group(f"rasft {title}", section.__doc__), section)
    for action in parser._actions:
        action.help = _printable(action)
    parser.set_defaults(**defaults)
    return parser


def _as_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _printable(action: argparse.Action) -> str | None:
    """The help text as argparse can print it: a lone % (ours and some of Megatron's have one) is doubled."""
    text = action.help
    if text is None or "%" not in text:
        return text
    try:
        _ = text % {**vars(action), "prog": ""}
    except (ValueError, TypeError, KeyError):
        return text.replace("%", "%%")
    return text


def fill_in(args: argparse.Namespace, architecture: dict[str, Any]) -> None:
    """Set what the user need not type: the architecture, and what this machine can run.

    Args:
        args: parsed, not yet validated by Megatron.
        architecture: Megatron argument names and values that the model's config.json implies.
    """
    _check_architecture(args, architecture)
    for name, value in architecture.items():
        setattr(args, name, value)
    _set_warmup(args)
    if args.seq_length is None:
        args.seq_length = min(args.max_position_embeddings, 2048)
    if args.seq_length > args.max_position_embeddings:
        raise ValueError(
            f"--seq-length {args.seq_length} is longer than the {args.max_position_embeddings} positions the model "
            "was made for (config.json, max_position_embeddings). Give a shorter one."
        )
    args.decoder_seq_length = None
    has_gpu, has_te = torch.cuda.is_available() and _has_device(), has_transformer_engine()
    refuse_unrunnable(args, has_gpu=has_gpu, has_transformer_engine=has_te)
    if not has_te:
        _without_transformer_engine(args)
    if not has_gpu:
        if args.given_flags.get("distributed_backend") and args.distributed_backend != "gloo":
            raise ValueError(
                f"--distributed-backend {args.distributed_backend} needs a GPU, and this machine has none that can be used. "
                "Leave the flag out: a CPU takes gloo."
            )
        args.distributed_backend = "gloo"
        args.masked_softmax_fusion = False
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if args.wandb_project:
        _check_wandb(args)
    if args.tensorboard_dir is None and args.save is not None and _importable("tensorboard"):
        args.tensorboard_dir = os.path.join(args.save, "tensorboard")


def _check_architecture(args: argparse.Namespace, architecture: dict[str, Any]) -> None:
    """Refuse a flag that says otherwise than the model: it would be ignored."""
    for name, value in architecture.items():
        given = getattr(args, name)
        if name not in args.given_flags or given == value:
            continue
        reason = f"{args.hf_model}/config.json says {value}"
        if name.endswith("dropout"):
            reason = "with dropout the policy would differ from the reference, and from itself, before the first step"
        raise ValueError(f"{args.given_flags[name]} {given} is refused: {reason}. Leave the flag out.")


def _set_warmup(args: argparse.Namespace) -> None:
    """The default warm-up, in the unit of the run's length; a flag in the other unit would be ignored."""
    own, other = ("samples", "iters") if args.train_samples else ("iters", "samples")
    if args.train_samples and "train_iters" in args.given_flags:
        raise ValueError(
            "--train-iters and --train-samples both give the run's length. Leave one of them out."
        )
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if getattr(args, f"{name}_{other}"):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}-{other} goes with --train-{other}, and the run's length is in {own}. Give {flag}-{own}."
            )
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise ValueError(
            f"--lr-warmup-fraction is a share of the decay, >= 0 and < 1, got {args.lr_warmup_fraction}."
        )
    if not has_own_warmup(args):
        args.lr_warmup_iters = 0 if args.train_samples else WARMUP_STEPS
        args.lr_warmup_samples = WARMUP_STEPS * args.global_batch_size if args.train_samples else 0


def has_own_warmup(args: argparse.Namespace) -> bool:
    """Whether the user said anything about warm-up."""
    return any(name.startswith("lr_warmup_") and name != "lr_warmup_init" for name in args.given_flags)


def _check_wandb(args: argparse.Namespace) -> None:
    # Megatron meets each of these on the last rank only, in a traceback, while the others wait.
    if not args.wandb_exp_name:
        raise ValueError("--wandb-project needs --wandb-exp-name NAME: what the run is called there.")
    if args.save is None and not args.wandb_save_dir:
        raise ValueError("--wandb-project needs --wandb-save-dir DIR, or --save, to keep its files in.")
    if not _importable("wandb"):
        raise ValueError(
            "--wandb-project needs Weights & Biases, which does not import here. Install the extra: "
            "pip install 'megatron-rasft[trackers]', or leave the flag out."
        )


def has_transformer_engine() -> bool:
    """Whether Transformer Engine imports here and there is a GPU for it."""
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
