"""The commands that start the run with a chosen layout."""

from megatron_rasft.tools.capacity.choosing import LayoutEstimate
from megatron_rasft.tools.capacity.config import CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.speed import serving_tp


def training_flags(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, *, precision: str = "bf16"
) -> list[str]:
    """The flags of pretrain_rasft.py."""
    flags = ["--hf-model", model.path, "--train-data", config.train_data]
    flags += run_flags(model, estimate, config, precision=precision)
    if config.needs.uses_rollouts():
        flags += _engine_flags(estimate, config)
    if config.save_interval:
        flags += ["--save", "runs/planned/checkpoints"]
    return [*flags, "--export-hf", "runs/planned/hf"]


def run_flags(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, *, precision: str = "bf16"
) -> list[str]:
    """The flags of pretrain_rasft.py without files, folders and the rollout engine."""
    layout = estimate.layout
    flags = ["--objective", config.objective, "--bf16"]
    if precision == "fp8":
        flags += ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    sizes = {
        "--tensor-model-parallel-size": layout.tp,
        "--pipeline-model-parallel-size": layout.pp,
        "--context-parallel-size": layout.cp,
        "--expert-model-parallel-size": layout.ep,
    }
    flags += [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
    if layout.tp > 1:
        flags.append("--sequence-parallel")
    if model.top_k:
        flags.append("--moe-grouped-gemm")
    if layout.ep > 1:
        flags += ["--expert-tensor-parallel-size", str(layout.expert_tp)]
        flags += ["--moe-token-dispatcher-type", "alltoall"]
    if layout.chunks > 1:
        layers = model.shape.num_layers // layout.pp // layout.chunks
        flags += ["--num-layers-per-virtual-pipeline-stage", str(layers)]
    flags += _recompute_flags(model, estimate)
    if layout.num_replicas > 1:
        flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
    flags += ["--seq-length", str(config.seq_length), "--micro-batch-size", str(config.micro_batch_size)]
    flags += ["--global-batch-size", str(config.global_batch_size), "--data-epochs", str(config.epochs)]
    if config.logprob_chunk_tokens is not None:
        flags += ["--objective-logprob-chunk-tokens", str(config.logprob_chunk_tokens)]
    if config.rasft_query_groups is not None:
        flags += ["--rasft-query-groups", str(config.rasft_query_groups)]
    if config.needs.uses_rollouts():
        flags += _rollout_flags(estimate, config)
    if config.save_interval:
        flags += ["--save-interval", str(config.save_interval)]
    return flags


def _recompute_flags(model: Model, estimate: LayoutEstimate) -> list[str]:
    match estimate.layout.recompute:
        case "full":
            flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
            return flags.split()
        case "selective":
            module = "moe" if model.shape.num_experts else "mlp"
            return ["--recompute-granularity", "selective", "--recompute-modules", module]
        case _:
            return []


def _rollout_flags(estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    flags = ["--rasft-refresh-interval", str(config.refresh_interval)]
    flags += ["--rollout-num-samples", str(config.num_samples)]
    flags += ["--rollout-max-new-tokens", str(config.max_new_tokens)]
    if estimate.rollout_gpus:
        flags += ["--sync-bucket-mib", str(config.sync_bucket_mib)]
    else:
        flags += ["--rollout-batch-size", str(config.rollout_batch_size)]
    return flags


def _engine_flags(estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    if not estimate.rollout_gpus:
        return ["--rollout-engine", "embedded"]
    flags = ["--rollout-engine", "sglang", "--rollout-server-file", "runs/planned/servers.txt"]
    return [*flags, "--rollout-lag", str(config.rollout_lag)]


def serving_command(model: Model, config: CapacityConfig) -> list[str]:
    """The command that starts one rollout server."""
    command = ["python", "tools/serve_rollouts.py", "--python", "SGLANG_PYTHON", "--model", model.path]
    return [*command, "--tp", str(serving_tp(model, config)), "--server-file", "runs/planned/servers.txt"]


def launcher(estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    """The command before pretrain_rasft.py: torchrun on one node, srun and torchrun on several."""
    num_gpus = estimate.layout.num_gpus
    if num_gpus <= config.gpus_per_node:
        return ["torchrun", "--nproc-per-node", str(num_gpus)]
    nodes = str(num_gpus // config.gpus_per_node)
    torchrun = ["torchrun", "--nnodes", nodes, "--nproc-per-node", str(config.gpus_per_node)]
    torchrun += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "$SLURM_JOB_ID",
        "--rdzv-endpoint",
        "$HEAD_NODE:29500",
    ]
    return ["srun", "--nodes", nodes, "--ntasks-per-node", "1", *torchrun]


def command_lines(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, *, precision: str = "bf16"
) -> list[str]:
    """All commands as a user types them, with a comment on how many servers to start."""
    lines = []
    if estimate.rollout_gpus:
        tp = serving_tp(model, config)
        assert tp is not None, "an estimate with servers must have servers that fit"
        num, per_node = estimate.rollout_gpus // tp, config.gpus_per_node // tp
        once = f"# {num} servers of {tp} GPUs, at most {per_node} on a node; CUDA_VISIBLE_DEVICES assigns the GPUs"
        lines += [once, " ".join(serving_command(model, config))]
    flags = training_flags(model, estimate, config, precision=precision)
    lines.append(" ".join([*launcher(estimate, config), "pretrain_rasft.py", *flags]))
    return lines
