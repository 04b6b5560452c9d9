"""Checks that a run's parallel layout fits the processes, the model and the run's kind of sampling."""

import argparse
import math

from megatron_rasft.config import RasftConfig
from megatron_rasft.weights.architecture import splits_attention
from megatron_rasft.weights.families import Family
from megatron_rasft.weights.rope import Rope


def check_layout(args: argparse.Namespace) -> None:
    """Checks the sizes of the layout and of the batches, before Megatron's own check, whose assertions do not say what to change.

    Raises:
        ValueError: a size does not fit; the message names the flag.
    """
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
        more = f", or --rasft-query-groups {-(-groups // tp) * tp}, which adds groups of zeros"
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide the model's {heads} heads in {groups} query groups. Use "
            f"another size{more if args.model_source == 'tables' else ''}."
        )
    _check_delta_heads(args)
    dp = args.world_size // size
    per_step = args.micro_batch_size * dp
    if args.global_batch_size % per_step:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of micro batch size x data parallel = "
            f"{args.micro_batch_size} x {dp} = {per_step}. Use a multiple."
        )


def _check_delta_heads(args: argparse.Namespace) -> None:
    """Refuses a layout that cuts the heads of gated delta nets, which Megatron spreads over context-parallel ranks too."""
    if args.experimental_attention_variant != "gated_delta_net":
        return
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    keys, values = args.linear_num_key_heads, args.linear_num_value_heads
    if keys % (tp * cp) or values % (tp * cp):
        raise ValueError(
            f"--tensor-model-parallel-size {tp} times --context-parallel-size {cp} does not divide the {keys} key heads and "
            f"{values} value heads of the model's gated delta nets. Choose smaller sizes, or --pipeline-model-parallel-size."
        )
    if args.deterministic_mode:
        raise ValueError(
            "--deterministic-mode is refused: Megatron's gated delta nets then compute without packed sequences. Leave the flag "
            "out."
        )


def check_sampling(args: argparse.Namespace, config: RasftConfig) -> None:
    """Refuses expert parallelism if the trainer samples: data-parallel ranks then run different numbers of passes.

    The experts of a layer would be spread over these ranks, and every pass needs all of them.

    Raises:
        ValueError: a size does not fit; the message names the flag.
    """
    if args.expert_model_parallel_size > 1:
        flag = f"--expert-model-parallel-size {args.expert_model_parallel_size}"
        refuse_own_sampling(config, flag, "the ranks that share a layer's experts sample at their own pace")


def refuse_own_sampling(config: RasftConfig, flag: str, reason: str) -> None:
    """Refuses a run in which the trainer itself would sample, rollouts or held-out problems.

    Args:
        flag: the flag with which it cannot sample.
        reason: why it cannot.

    Raises:
        ValueError: the message names both flags.
    """
    if config.samples_rollouts and config.rollout.rollout_engine == "embedded":
        raise ValueError(
            f"--rollout-engine embedded cannot be combined with {flag}: {reason}. Sample from servers (--rollout-engine sglang), "
            "replay rollouts (--rollout-engine replay), or leave that flag out."
        )
    if config.heldout.heldout_data:
        raise ValueError(
            f"--heldout-data, which the trainer samples itself, cannot be combined with {flag}: {reason}. Evaluate exported folders "
            "with tools/evaluate.py instead, or leave that flag out."
        )


def check_windows(args: argparse.Namespace, family: Family, config: RasftConfig) -> None:
    """Refuses sliding windows where Transformer Engine or SGLang does not have them.

    Raises:
        ValueError: the message names the flag.
    """
    if args.window_size is None:
        return
    exchanges = {"p2p", "a2a+p2p"}.intersection(args.cp_comm_type)
    if args.context_parallel_size > 1 and args.transformer_impl == "transformer_engine" and exchanges:
        raise ValueError(
            f"--cp-comm-type {exchanges.pop()} cannot be combined with the sliding windows of {family.architecture}: Transformer Engine "
            "does not have them in a ring of keys. Use --cp-comm-type a2a, or --context-parallel-size 1."
        )
    window = args.window_size[0] + 1
    if config.samples_from_servers and not family.is_window_served and args.seq_length > window:
        raise ValueError(
            f"--rollout-engine sglang would sample from another model: SGLang's {family.architecture} attends to all tokens, the trainer "
            f"to the latest {window} (sliding_window in config.json), which --seq-length {args.seq_length} exceeds. Use "
            f"--rollout-engine embedded, or --seq-length {window}."
        )


def check_sinks(args: argparse.Namespace, family: Family) -> None:
    """Refuses context parallelism in which Transformer Engine does not compute attention sinks.

    Raises:
        ValueError: the message names the flag.
    """
    others = [kind for kind in args.cp_comm_type if kind != "a2a"]
    is_split = args.context_parallel_size > 1 and args.transformer_impl == "transformer_engine"
    if family.has_sinks and is_split and others:
        raise ValueError(
            f"--cp-comm-type {others[0]} cannot be combined with the attention sinks of {family.architecture}: Transformer Engine "
            "has them only with a2a. Use --cp-comm-type a2a, or --context-parallel-size 1."
        )


def check_served(family: Family, rope: Rope, config: RasftConfig) -> None:
    """Refuses rollouts of SGLang for a model that SGLang computes differently, or whose weights it has not been sent before.

    Raises:
        ValueError: no server has taken weights of the family, its experts have biases, or SGLang multiplies YaRN's embedding by another factor than transformers.
    """
    if not config.samples_from_servers:
        return
    if not family.is_served:
        raise ValueError(
            f"--rollout-engine sglang is not supported for {family.architecture}: its weights have not been sent to a server yet. Use "
            "--rollout-engine embedded."
        )
    if family.has_expert_biases:
        raise ValueError(
            f"--rollout-engine sglang is not supported for {family.architecture}: SGLang loads the experts of a layer only together, "
            "and the trainer sends them one by one. Use --rollout-engine embedded or replay, or an --objective without rollouts."
        )
    yarn = rope.yarn
    if yarn is not None and not math.isclose(yarn.served_factor, yarn.attention_factor, rel_tol=1e-6):
        raise ValueError(
            f"--rollout-engine sglang would sample from another model: SGLang multiplies the rotary embedding by "
            f"{yarn.served_factor:.6g}, transformers and the trainer by {yarn.attention_factor:.6g} (rope_scaling in "
            f"config.json: SGLang reads attn_factor, transformers attention_factor). To train the model that SGLang serves, "
            f"set attention_factor to {yarn.served_factor:.6g}. Otherwise use --rollout-engine embedded."
        )
