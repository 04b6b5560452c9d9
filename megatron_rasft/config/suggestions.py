"""Suggests the flag that was meant by a flag that does not exist."""

import difflib
from collections.abc import Collection, Iterable

from megatron_rasft.flags import flag_name

OTHER_NAMES = {
    # the model and the data
    "model_name_or_path": "--hf-model --model",
    "model_name": "--hf-model --model",
    "model": "--hf-model",
    "model_dir": "--hf-model --model",
    "hf_model": "--model",
    "tokenizer_name": "--hf-model --model",
    "dataset_name": "--train-data",
    "dataset_path": "--train-data",
    "train_file": "--train-data",
    "data_file": "--train-data",
    "dataset_text_field": "--data-response-field",
    "max_length": "--seq-length --max-new-tokens",
    "max_seq_length": "--seq-length --max-new-tokens",
    "max_seq_len": "--seq-length",
    "model_max_length": "--seq-length",
    "packing": "--rasft-batch-layout",
    "padding_free": "--rasft-batch-layout",
    "dataloader_num_workers": "--num-workers",
    "eval_dataset": "--heldout-data",
    "eval_steps": "--heldout-interval",
    "eval_strategy": "--heldout-interval",
    "config_file": "--config",
    # the length of the run, batches and memory
    "max_steps": "--train-iters",
    "steps": "--train-iters",
    "iters": "--train-iters",
    "num_train_epochs": "--data-epochs",
    "epochs": "--data-epochs",
    "per_device_train_batch_size": "--micro-batch-size",
    "per_device_eval_batch_size": "--rollout-batch-size --batch-size",
    "train_batch_size": "--global-batch-size",
    "batch_size": "--global-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "gradient_checkpointing": "--recompute-granularity",
    "activation_checkpointing": "--recompute-granularity",
    "torch_dtype": "--bf16 --dtype",
    "dtype": "--bf16",
    "precision": "--bf16 --dtype",
    "mixed_precision": "--bf16 --dtype",
    "attn_implementation": "--attention-backend",
    "tp": "--tensor-model-parallel-size",
    "tp_size": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    # the optimizer
    "learning_rate": "--lr",
    "lr_scheduler_type": "--lr-decay-style",
    "lr_scheduler": "--lr-decay-style",
    "warmup_steps": "--lr-warmup-iters",
    "warmup_iterations": "--lr-warmup-iters",
    "warmup_ratio": "--lr-warmup-fraction",
    "max_grad_norm": "--clip-grad",
    "gradient_clipping": "--clip-grad",
    "optim": "--optimizer",
    "adam_epsilon": "--adam-eps",
    # files and logs
    "output_dir": "--save --output",
    "save_dir": "--save --output",
    "resume_from_checkpoint": "--load --checkpoint",
    "resume": "--load",
    "save_steps": "--save-interval",
    "save_every": "--save-interval",
    "save_strategy": "--save-interval",
    "save_total_limit": "--rasft-keep-checkpoints",
    "logging_steps": "--log-interval",
    "logging_dir": "--tensorboard-dir",
    "report_to": "--wandb-project",
    "run_name": "--wandb-exp-name",
    # rollouts and the objective
    "num_generations": "--rollout-num-samples --num-samples",
    "max_completion_length": "--rollout-max-new-tokens --max-new-tokens",
    "max_new_tokens": "--rollout-max-new-tokens",
    "max_tokens": "--rollout-max-new-tokens --max-new-tokens",
    "temperature": "--rollout-temperature",
    "top_p": "--rollout-top-p",
    "repetition_penalty": "--rollout-repetition-penalty",
    "use_vllm": "--rollout-engine",
    "vllm_server_base_url": "--rollout-urls --server",
    "reward_funcs": "--verify-function",
    "beta": "--objective-grpo-beta",
    "epsilon": "--objective-grpo-clip-low",
    "epsilon_high": "--objective-grpo-clip-high",
    "loss_type": "--objective",
    "tasks": "--benchmarks",
}
"""Argument of transformers' Trainer, of TRL or of another program -> the flags with that meaning, of training and of tools."""

_MIN_LIKENESS = 0.72


def suggest(typed: str, known: Iterable[str]) -> str:
    """Returns the known flag that ``typed`` probably means, or an empty string.

    Args:
        typed: a flag that does not exist.
        known: the flags that exist.
    """
    known = list(known)
    if meant := other_name(typed, known):
        return meant
    spelled = flag_name(_field(typed))
    words = set(_words(spelled))
    longer = [flag for flag in known if words < set(_words(flag))]
    if longer:
        return min(longer, key=lambda flag: (len(_words(flag)), not flag.startswith(spelled), len(flag)))
    best = max(known, key=lambda flag: _likeness(spelled, flag), default="")
    return best if best and _likeness(spelled, best) >= _MIN_LIKENESS else ""


def other_name(typed: str, known: Collection[str]) -> str:
    """Returns the known flag of which ``typed`` is another name or another spelling, such as ``-lr``; else an empty string."""
    name = _field(typed)
    candidates = [*OTHER_NAMES.get(name, "").split(), flag_name(name)]
    return next((flag for flag in candidates if flag in known), "")


def _field(typed: str) -> str:
    return typed.lstrip("-").replace("-", "_")


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
