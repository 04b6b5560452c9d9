"""Defaults of Megatron's own flags that differ in this program."""

import argparse
from typing import Any

DEFAULT_SEQ_LENGTH = 2048
"""--seq-length if it is not given and the model has as many positions."""

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
    # Longer than three times --stall-deadline-s: otherwise torch ends a stalled run first, without the name of the rank.
    "distributed_timeout_minutes": 60,
    "num_workers": 0,
    "position_embedding_type": "rope",
    "tokenizer_type": "NullTokenizer",
    # Megatron's default, delayed, scales by the maxima of earlier passes, which a run's first passes do not have.
    "fp8_recipe": "tensorwise",
}
"""Flag of Megatron -> its default in this program, chosen for supervised fine-tuning."""

NEWER_DEFAULTS = {
    # Since 0.20 Megatron saves its own tokenizer with a checkpoint. This program never builds that tokenizer.
    "save_tokenizer_assets": False,
}
"""Like CHANGED_DEFAULTS, for flags that only later versions of Megatron-Core have."""


def changed_defaults(megatron: argparse.ArgumentParser) -> dict[str, Any]:
    """Destination -> default, for the flags that Megatron's parser has."""
    known = {action.dest for action in megatron._actions}
    return CHANGED_DEFAULTS | {name: v for name, v in NEWER_DEFAULTS.items() if name in known}
