"""Suggests the flag that was meant by a flag that does not exist."""

import difflib
from collections.abc import Iterable

from megatron_rasft.flags import flag_name

HUGGING_FACE = {
    "model_name_or_path": "--hf-model",
    "model_name": "--hf-model",
    "output_dir": "--save",
    "resume_from_checkpoint": "--load",
    "dataset_name": "--train-data",
    "dataset_path": "--train-data",
    "max_steps": "--train-iters",
    "num_train_epochs": "--data-epochs",
    "epochs": "--data-epochs",
    "learning_rate": "--lr",
    "lr_scheduler_type": "--lr-decay-style",
    "warmup_steps": "--lr-warmup-iters",
    "warmup_ratio": "--lr-warmup-fraction",
    "per_device_train_batch_size": "--micro-batch-size",
    "train_batch_size": "--global-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "max_grad_norm": "--clip-grad",
    "max_length": "--seq-length",
    "max_seq_length": "--seq-length",
    "logging_steps": "--log-interval",
    "save_steps": "--save-interval",
    "save_total_limit": "--rasft-keep-checkpoints",
    "report_to": "--wandb-project",
    "num_generations": "--rollout-num-samples",
    "max_completion_length": "--rollout-max-new-tokens",
    "temperature": "--rollout-temperature",
    "top_p": "--rollout-top-p",
    "beta": "--objective-grpo-beta",
    "loss_type": "--objective",
    "gradient_checkpointing": "--recompute-granularity",
    "tp": "--tensor-model-parallel-size",
    "tp_size": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "model": "--hf-model",
    "model_dir": "--hf-model",
    "train_file": "--train-data",
    "data_file": "--train-data",
    "config_file": "--config",
    "steps": "--train-iters",
    "iters": "--train-iters",
    "resume": "--load",
    "save_dir": "--save",
    "save_every": "--save-interval",
    "lr_scheduler": "--lr-decay-style",
    "warmup_iterations": "--lr-warmup-iters",
}
"""Argument of transformers, TRL or another program -> the flag with that meaning."""

_MIN_LIKENESS = 0.72


def suggest(typed: str, known: Iterable[str]) -> str:
    """Returns the known flag that ``typed`` probably means, or an empty string.

    Args:
        typed: a flag that does not exist.
        known: the flags that exist.
    """
    known = list(known)
    name = typed.lstrip("-").replace("-", "_")
    meant = HUGGING_FACE.get(name, "")
    if meant in known:
        return meant
    spelled = flag_name(name)
    if spelled in known:  # -lr
        return spelled
    words = set(_words(spelled))
    longer = [flag for flag in known if words < set(_words(flag))]
    if longer:
        return min(longer, key=lambda flag: (len(_words(flag)), not flag.startswith(spelled), len(flag)))
    best = max(known, key=lambda flag: _likeness(spelled, flag), default="")
    return best if best and _likeness(spelled, best) >= _MIN_LIKENESS else ""


def _likeness(typed: str, flag: str) -> float:
    """Likeness of two flags, 0 to 1. The order of the words does not count, and neither does one missing word of three or more."""
    ordered = difflib.SequenceMatcher(None, typed, flag).ratio()
    words, others = _words(typed), _words(flag)
    unordered = difflib.SequenceMatcher(None, " ".join(sorted(words)), " ".join(sorted(others))).ratio()
    shared = len(set(words) & set(others))
    by_words = 0.9 * shared / max(len(words), len(others), 1)
    return max(ordered, 0.98 * unordered, by_words)


def _words(flag: str) -> list[str]:
    return [word.removesuffix("s") for word in flag.strip("-").split("-")]
