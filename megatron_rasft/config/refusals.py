"""Refuses Megatron's flags that have no effect in this program, or break it, each with the reason and an alternative."""

import argparse

from megatron_rasft.config.parser import FlagParser

_ONE_SIZE = "every step trains --global-batch-size problems"
_ONE_KIND = "there is one kind of checkpoint, written every --save-interval steps"
_NEW_RUN = (
    "a run either resumes from a complete checkpoint or starts from weights: export the checkpoint "
    "(tools/convert_checkpoint.py megatron-to-hf) and give it as --hf-model, or convert weights with hf-to-megatron and give them "
    "as --load"
)
_LOGS = "all metrics are written to --rasft-metrics, TensorBoard and Weights & Biases at every step"
_ARCHITECTURE = "the architecture is that of config.json in --hf-model"
_ONE_SHAPE = "it supports one number of tokens only, but here the number changes from step to step and from training to sampling"
_FIRST_WEIGHTS = (
    "the run would start from weights rounded to 8 or 4 bits, because Megatron copies the quantized parameters into the fp32 main "
    "parameters. --fp8-format alone computes in FP8 and keeps the weights exact"
)
_WRITER = (
    "--async-save writes on a thread of the training process, so there is no worker process to configure"
)
_RESTART = (
    "nvidia-resiliency-ext restarts Megatron's own training loop, which is not used here. --stall-deadline-s ends a run that stands still, "
    "and the same command resumes it from the last checkpoint; examples/slurm/rasft.sbatch requeues its job"
)

REFUSED = {
    "skip_train": "a run only trains: tools/evaluate.py evaluates a model folder, a checkpoint or rollout servers",
    "rampup_batch_size": _ONE_SIZE,
    "step_batch_size_schedule": _ONE_SIZE,
    "decrease_batch_size_if_needed": _ONE_SIZE,
    "iterations_to_skip": "no batch can be left out: remove the rows from --train-data",
    "phase_transition_iterations": "a run has one phase: start one run after the other",
    "non_persistent_save_interval": _ONE_KIND,
    "non_persistent_ckpt_type": _ONE_KIND,
    "non_persistent_global_ckpt_dir": _ONE_KIND,
    "non_persistent_local_ckpt_dir": _ONE_KIND,
    "replication": _ONE_KIND,
    "replication_jump": _ONE_KIND,
    "replication_factor": _ONE_KIND,
    "ckpt_convert_format": "checkpoints are converted by tools/convert_checkpoint.py",
    "finetune": _NEW_RUN,
    "pretrained_checkpoint": _NEW_RUN,
    "override_ckpt_iteration": _NEW_RUN,
    "use_checkpoint_args": _ARCHITECTURE + ", and the flags set the parallel layout",
    "use_mp_args_from_checkpoint_args": "the flags set the parallel layout: a checkpoint can be loaded into any layout",
    "profile": "start the profiler around the program: nsys profile torchrun ..., or py-spy record",
    "record_memory_history": "start a profiler around the program: nsys profile --cuda-memory-usage=true torchrun ...",
    "train_sync_interval": "the ranks synchronize at every step",
    "check_weight_hash_across_dp_replicas_interval": "replicas are not compared during training",
    "gpu_sniff_test_interval": "test the GPUs before the run",
    "optimizer_cuda_graph": _ONE_SHAPE,
    **dict.fromkeys(
        (
            "enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps inference_cuda_graph_scope "
            "delay_offload_until_cuda_graph moe_pad_experts_for_cuda_graph_inference "
            "tp_comm_overlap tp_comm_overlap_cfg tp_comm_overlap_rs_dgrad tp_comm_bootstrap_backend"
        ).split(),
        _ONE_SHAPE,
    ),
    **dict.fromkeys(
        "fp8_param_gather fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache".split(),
        _FIRST_WEIGHTS,
    ),
    **dict.fromkeys(
        "async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm".split(),
        _WRITER,
    ),
    "cross_entropy_loss_fusion": "--objective selects the loss, and Megatron has no fused kernel for it",
    "cross_entropy_fusion_impl": "--objective selects the loss, and Megatron has no fused kernel for it",
    **dict.fromkeys(
        ("defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
        "the output layer's gradient is calculated together with the log-probabilities, so there is nothing to defer",
    ),
    "overlap_moe_expert_parallel_comm": "its schedule calls Megatron's own loss instead of the one that --objective selects",
    "log_progress": _LOGS,
    "log_timers_to_tensorboard": _LOGS,
    "log_validation_ppl_to_tensorboard": _LOGS,
    "log_memory_to_tensorboard": _LOGS,
    "log_memory_interval": _LOGS,
    "log_device_memory_used": _LOGS,
    "log_world_size_to_tensorboard": _LOGS,
    "log_num_zeros_in_grad": _LOGS,
    "log_max_attention_logit": _LOGS,
    "log_energy": _LOGS,
    "moe_routing_trace_path": _LOGS,
    **dict.fromkeys(
        (
            "multi_latent_attention experimental_attention_variant linear_attention_freq is_hybrid_model spec "
            "hybrid_layer_pattern hybrid_override_pattern heterogeneous_layers_config_path "
            "heterogeneous_layers_config_encoded_json mtp_num_layers use_mup softmax_type attention_output_gate "
            "layernorm_zero_centered_gamma apply_residual_connection_post_layernorm qk_l2_norm openai_gelu squared_relu quick_geglu "
            "glu_linear_offset activation_func_clamp_value window_size window_attn_skip_freq no_rope_freq "
            "rotary_seq_len_interpolation_factor moe_layer_freq "
            "moe_shared_expert_intermediate_size moe_router_num_groups moe_router_group_topk moe_router_score_function "
            "moe_router_topk_scaling_factor moe_router_enable_expert_bias moe_latent_size"
        ).split(),
        _ARCHITECTURE,
    ),
}
"""Destination of a flag -> why it is refused, and the alternative. Flags that config.json also sets are checked in ``fill_in``."""

REFUSED_GROUPS = {
    "rl": "for reinforcement learning use --objective grpo with --objective-grpo-*, --rollout-* and --sync-*",
    "sft": "for supervised fine-tuning use --objective sft with demonstrations from --train-data",
    "data and dataloader": "demonstrations come from --train-data, and the --data-* flags configure how they are read",
    "tokenizer": "the tokenizer is that of --hf-model; --data-chat-template replaces its chat template",
    "validation": "held-out problems are given as --heldout-data and measured every --heldout-interval steps",
    "inference": "the --rollout-* flags configure how rollouts are sampled",
    "Logits Distillation": "there is no distillation from another model; --objective sft_kl and asft keep the policy near a "
    "reference, and --objective sdft distils the model with the demonstration in its prompt",
    "vision": "only language models are supported",
    "biencoder": "only language models are supported",
    "autoresume": "SIGTERM saves and ends a run, and the same command resumes it",
    "In-process restart": _RESTART,
    "ft_package": _RESTART,
    "fault injector": "faults are injected by Megatron's own training loop: kill a process, and the same command resumes the run",
    "straggler": "--straggler-factor names slow ranks in the line of each step, without nvidia-resiliency-ext",
    "workload inspector": _LOGS,
}
"""Title of a group of Megatron's flags -> why its flags are refused, except ``_HONOURED``."""

_HONOURED = {
    "seq_length",
    "encoder_seq_length",
    "decoder_seq_length",
    "num_workers",
    "create_attention_mask_in_dataloader",
    "vocab_size",
    "padded_vocab_size",
    "trust_remote_code",
}
"""Destinations of flags in ``REFUSED_GROUPS`` that this program uses."""


def reasons(parser: FlagParser) -> dict[str, str]:
    """Returns for every refused flag: destination -> why it is refused, and the alternative."""
    grouped = {
        action.dest: REFUSED_GROUPS[group.title]
        for group in parser._action_groups
        if group.title in REFUSED_GROUPS
        for action in group._group_actions
        if action.dest not in _HONOURED
    }
    return grouped | REFUSED


def refuse_unsupported(parser: FlagParser, args: argparse.Namespace) -> None:
    """Refuses the flags that were given and have no effect here. A flag that repeats its default is accepted.

    Raises:
        ValueError: with the flag, the reason and the alternative.
    """
    for name, reason in reasons(parser).items():
        value = getattr(args, name, None)
        if name in args.given_flags and value and value != parser.get_default(name):
            raise ValueError(f"{args.given_flags[name]} is refused: {reason}. Leave it out.")
