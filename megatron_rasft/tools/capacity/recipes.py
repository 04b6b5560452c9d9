"""``tools/plan.py --config FILE``: plans the run of a file with flags of pretrain_rasft.py, such as those in examples/recipes."""

import argparse
from collections.abc import Mapping, Sequence

from megatron_rasft.config.command_line import run_parser
from megatron_rasft.config.config_file import CONFIG_FLAG, config_files, read_flags
from megatron_rasft.config.defaults import DEFAULT_SEQ_LENGTH
from megatron_rasft.config.parser import FlagParser
from megatron_rasft.flags import flag_name

PLAN_TABLE = "plan"
"""Table of a file with flags of tools/plan.py."""

_SAME_NAME = (
    "hf_model objective seq_length global_batch_size micro_batch_size rollout_lag rollout_batch_size sync_bucket_mib rasft_query_groups "
    "save_interval tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
    "num_layers_per_virtual_pipeline_stage"
).split()
_OTHER_NAME = {
    "rollout_num_samples": "num_samples",
    "rollout_max_new_tokens": "max_new_tokens",
    "rasft_refresh_interval": "refresh_interval",
    "data_epochs": "epochs",
    "objective_logprob_chunk_tokens": "logprob_chunk_tokens",
    "recompute_granularity": "recompute",
}
"""Flag of pretrain_rasft.py -> flag of tools/plan.py."""


class PlanParser(FlagParser):
    """A parser whose --config takes files of pretrain_rasft.py. The layout is then that of the files."""

    def file_words(self, words: Sequence[str]) -> list[str]:
        files = config_files(words)
        options = self._option_string_actions
        table = [flag for file in files for flag in read_flags(file, PLAN_TABLE)]
        return [*(_words_of_run(files) if files else []), *(w for flag in table for w in flag.words(options))]


def _run_args(files: Sequence[str]) -> argparse.Namespace:
    args: argparse.Namespace = run_parser()[0].parse_args([CONFIG_FLAG, *files])
    return args


def _words_of_run(files: Sequence[str]) -> list[str]:
    """The flags of tools/plan.py with the values of a run. Sizes that the files leave out are fixed too, as in the run."""
    args = _run_args(files)
    unset = {
        "seq_length": DEFAULT_SEQ_LENGTH,
        "recompute_granularity": "none",
        "num_layers_per_virtual_pipeline_stage": 0,
    }
    names = dict.fromkeys(_SAME_NAME) | _OTHER_NAME
    values = {names[name] or name: _set(getattr(args, name), unset.get(name)) for name in names}
    words = [f"{flag_name(name)}={value}" for name, value in values.items() if value is not None]
    words += [f"--train-data={args.train_data[0]}"] if args.train_data else []
    words += ["--fp8"] if args.fp8 else []
    return words + (["--rollout-gpus=0"] if args.rollout_engine == "embedded" else [])


def _set[T](value: T | None, otherwise: T | None) -> T | None:
    return otherwise if value is None else value


def beyond_files(files: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Returns flags of pretrain_rasft.py as --config and the flags that differ from the files."""
    if not files:
        return list(flags)
    in_files, planned = vars(_run_args(files)), run_parser()[0].parse_args(list(flags))
    kept: list[str] = [CONFIG_FLAG, *files]
    is_kept = False
    named: Mapping[str, str] = {flag: name for name, flag in planned.given_flags.items()}
    for word in flags:
        if word in named:
            is_kept = getattr(planned, named[word]) != in_files[named[word]]
        if is_kept:
            kept.append(word)
    return kept
