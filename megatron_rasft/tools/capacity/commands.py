"""The commands that start the run with a chosen layout."""

import shlex

from megatron_rasft.tools.capacity.choosing import LayoutEstimate
from megatron_rasft.tools.capacity.config import CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.recipes import beyond_files
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
    """The flags of pretrain_rasft.py without files, folders and the rollout engine; of those that --config sets, only the changed ones."""
    return beyond_files(config.config, _all_run_flags(model, estimate, config, precision))


def _all_run_flags(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, precision: str
) -> list[str]:
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
            num_mixtures = len(model.layers_with_experts)
            modules = ["moe"] * (num_mixtures > 0) + ["mlp"] * (num_mixtures < model.shape.num_layers)
            return ["--recompute-granularity", "selective", "--recompute-modules", *modules]
        case _:
            return []


def _rollout_flags(estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    flags = ["--rasft-refresh-interval", str(config.refresh_interval)]
    flags += ["--rollout-num-samples", str(config.num_samples)]
    flags += ["--rollout-max-new-tokens", str(config.max_new_tokens)]
    if estimate.rollout_gpus:
        flags += ["--rollout-lag", str(config.rollout_lag), "--sync-bucket-mib", str(config.sync_bucket_mib)]
    else:
        flags += ["--rollout-batch-size", str(config.rollout_batch_size)]
    return flags


def _engine_flags(estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    if not estimate.rollout_gpus:
        # A file of --config may be for servers
        return ["--rollout-engine", "embedded", *(["--rollout-lag", "0"] if config.config else [])]
    return ["--rollout-engine", "sglang", "--rollout-server-file", "runs/planned/servers.txt"]


def spans_nodes(config: CapacityConfig) -> bool:
    """Returns whether the cluster has several nodes, so that srun starts the programs."""
    return config.num_gpus > config.gpus_per_node


def serving_command(model: Model, estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    """The command that starts the rollout servers of one node."""
    tp = serving_tp(model, config)
    assert tp is not None, "an estimate with servers must have servers that fit"
    num = min(estimate.rollout_gpus, config.gpus_per_node) // tp
    command = [
        "python",
        "tools/serve_node.py",
        "--num-servers",
        str(num),
        "--tp",
        str(tp),
        "--model",
        model.path,
    ]
    return [*command, "--server-file", "runs/planned/servers.txt", "--python", "${SGLANG_PYTHON:-python3}"]


def launcher(estimate: LayoutEstimate, config: CapacityConfig) -> list[str]:
    """The command before pretrain_rasft.py: torchrun on one node, srun and torchrun on several."""
    num_gpus = estimate.layout.num_gpus
    if not spans_nodes(config):
        return ["torchrun", "--nproc-per-node", str(num_gpus)]
    nodes = str(-(-num_gpus // config.gpus_per_node))
    per_node = str(min(num_gpus, config.gpus_per_node))
    torchrun = ["torchrun", "--nnodes", nodes, "--nproc-per-node", per_node, "--rdzv-backend", "c10d"]
    torchrun += [
        "--rdzv-id",
        "$SLURM_JOB_ID",
        "--rdzv-endpoint",
        "$(scontrol show hostnames | head -1):29500",
    ]
    return ["srun", "--nodes", nodes, "--ntasks-per-node", "1", *torchrun]


def _servers_line(model: Model, estimate: LayoutEstimate, config: CapacityConfig) -> str:
    """Starts the servers of all nodes in the background: on the nodes, or the GPUs, after those of the trainer."""
    serving = _line(serving_command(model, estimate, config))
    num_gpus = estimate.layout.num_gpus
    if not spans_nodes(config):
        return f"{_gpus(num_gpus, num_gpus + estimate.rollout_gpus)} {serving} &"
    nodes, first = estimate.rollout_gpus // config.gpus_per_node, -(-num_gpus // config.gpus_per_node)
    return f"srun --nodes {nodes} --relative {first} --ntasks-per-node 1 {serving} &"


def _gpus(first: int, end: int) -> str:
    return f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(first, end)))}"


def _line(words: list[str]) -> str:
    """Joins words for a shell, which expands those with a dollar sign."""
    return " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)


def command_lines(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, *, precision: str = "bf16"
) -> list[str]:
    """All commands as a user pastes them."""
    flags = training_flags(model, estimate, config, precision=precision)
    training = _line([*launcher(estimate, config), "pretrain_rasft.py", *flags])
    lines = []
    if spans_nodes(config):
        num_nodes = -(-config.num_gpus // config.gpus_per_node)
        lines.append(
            f"# in `salloc --nodes {num_nodes}`; --slurm DIR writes a job script in place of these commands"
        )
    elif estimate.rollout_gpus:
        training = f"{_gpus(0, estimate.layout.num_gpus)} {training}"
    if estimate.rollout_gpus:
        lines.append(_servers_line(model, estimate, config))
    return [*lines, training]
