"""Lists the layouts of a cluster with the memory and time of each, and orders them: the shortest run that fits comes first."""

import contextlib
import math
from dataclasses import dataclass, replace

from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model, candidates, splits_heads
from megatron_rasft.tools.capacity.memory import GIB, MemoryEstimate, estimate_memory
from megatron_rasft.tools.capacity.speed import (
    RefreshEstimate,
    RunEstimate,
    StepEstimate,
    estimate_refresh,
    estimate_run,
    estimate_step,
    num_saves,
    response_tokens,
    serving_tp,
    trained_demonstrations,
    trained_rollouts,
)


@dataclass(frozen=True, kw_only=True)
class DiskEstimate:
    """Sizes of the files that a run writes, bytes."""

    checkpoint: float
    checkpoints: float
    export: float
    rollout_store: float
    """Rollouts as JSON: 35 bytes per response token (id, log-probability, text) and 6 per prompt token."""
    reference_cache: float
    """Cache of reference log-probabilities: four bytes per trained token, and 100 per sequence."""
    data_cache: float
    """Tokenized rows: eight bytes per token of the demonstrations (id, text), and 150 per demonstration."""

    @property
    def total(self) -> float:
        return self.checkpoints + self.export + self.rollout_store + self.reference_cache + self.data_cache


@dataclass(frozen=True, kw_only=True)
class LayoutEstimate:
    """A layout with its memory and its times."""

    layout: Layout
    rollout_gpus: int
    memory: MemoryEstimate
    step: StepEstimate
    refresh: RefreshEstimate
    run: RunEstimate

    def excess_gib(self, config: CapacityConfig) -> float:
        """Memory that a GPU lacks, GiB; <= 0 if the layout fits."""
        return self.memory.total / GIB - config.gpu_memory_gib


def checkpoint_bytes(num_parameters: int) -> float:
    """Bytes of a checkpoint: weights in BF16, and master weights and two moments in fp32."""
    return 14.0 * num_parameters


def disk_bytes(model: Model, config: CapacityConfig, assumed: AssumptionConfig) -> DiskEstimate:
    """Estimates the sizes of all files of a run."""
    needs = config.needs
    checkpoint = checkpoint_bytes(model.num_parameters)
    problems = config.num_problems * config.epochs
    rollouts = problems * config.num_samples if needs.uses_rollouts() else 0
    response = response_tokens(config, assumed)
    # the reference log-probabilities of a demonstration are cached once for all epochs
    trained = problems * trained_rollouts(config, assumed)
    demonstrations = config.num_problems * trained_demonstrations(config)
    cached = 4 * (demonstrations * assumed.demonstration_tokens + trained * response)
    cached += 100 * (demonstrations + trained)
    return DiskEstimate(
        checkpoint=checkpoint,
        checkpoints=checkpoint * num_saves(config),
        export=2.0 * model.num_parameters,
        rollout_store=rollouts * (35 * response + 6 * assumed.prompt_tokens + 400),
        reference_cache=cached if needs.scores_under_reference() else 0.0,
        # the teacher's prompt holds problem and demonstration once more
        data_cache=config.num_problems
        * ((8 if needs.teacher() is None else 12) * assumed.demonstration_tokens + 150),
    )


def estimate_layouts(
    model: Model, config: CapacityConfig, assumed: AssumptionConfig, *, precision: str = "bf16"
) -> list[LayoutEstimate]:
    """Estimates every layout that pretrain_rasft.py accepts: first those that fit, ordered by the length of the run.

    Raises:
        ValueError: no layout is accepted. The message is one line with the broken rule and a way out.
    """
    check(model, config, assumed)
    made: list[LayoutEstimate] = []
    for rollout_gpus in _rollout_shares(model, config):
        for layout in candidates(model, config, config.num_gpus - rollout_gpus):
            if layout.ep > 1 and not rollout_gpus and config.needs.uses_rollouts():
                continue  # a run refuses this: replicas sample at their own pace, and experts of several replicas must run together
            made.append(_estimate(model, layout, config, assumed, rollout_gpus, precision))
    if not made:
        raise ValueError(_why_none(model, config))
    return sorted(made, key=lambda estimate: _rank(estimate, config))


def _rank(estimate: LayoutEstimate, config: CapacityConfig) -> tuple[float, ...]:
    excess = estimate.excess_gib(config)
    simple = (estimate.layout.chunks, estimate.layout.cp, estimate.layout.pp, estimate.layout.tp)
    return (max(0.0, excess), estimate.run.hours, *simple)


def _estimate(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    rollout_gpus: int,
    precision: str,
) -> LayoutEstimate:
    step = estimate_step(model, layout, config, assumed, precision=precision)
    refresh = estimate_refresh(
        model, layout, config, assumed, step, rollout_gpus=rollout_gpus, precision=precision
    )
    return LayoutEstimate(
        layout=layout,
        rollout_gpus=rollout_gpus,
        memory=estimate_memory(
            model,
            layout,
            config,
            assumed,
            num_microbatches=step.num_microbatches,
            is_fp8=precision == "fp8",
            uses_servers=rollout_gpus > 0,
            samples=config.needs.uses_rollouts(),
        ),
        step=step,
        refresh=refresh,
        run=estimate_run(
            config, step, refresh, checkpoint_bytes=checkpoint_bytes(model.num_parameters), assumed=assumed
        ),
    )


def check(model: Model, config: CapacityConfig, assumed: AssumptionConfig) -> None:
    """Refuses flags that no layout can satisfy.

    Raises:
        ValueError: the message names the flag, the rule and the way out.
    """
    if config.seq_length > model.max_positions:
        raise ValueError(
            f"--seq-length {config.seq_length} is longer than the {model.max_positions} positions of the model "
            "(config.json, max_position_embeddings). Give a shorter length."
        )
    if config.num_gpus > config.gpus_per_node and config.num_gpus % config.gpus_per_node:
        raise ValueError(
            f"--num-gpus {config.num_gpus} is not a multiple of --gpus-per-node {config.gpus_per_node}. Plan for whole nodes."
        )
    if assumed.demonstration_tokens > config.seq_length:
        raise ValueError(
            f"--demonstration-tokens {assumed.demonstration_tokens} is more than --seq-length {config.seq_length}, and a run "
            "drops longer samples. Give a longer --seq-length."
        )
    tp, pp, ep = (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
    )
    shape = model.shape
    if tp is not None and config.gpus_per_node % tp:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide --gpus-per-node {config.gpus_per_node}, and tensor "
            "parallelism between nodes is too slow. Use a divisor."
        )
    if tp is not None and not splits_heads(model, tp):
        groups = -(-shape.num_query_groups // tp) * tp
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide the model's {shape.num_attention_heads} heads in "
            f"{shape.num_query_groups} query groups. Use another size, or --rasft-query-groups {groups}."
        )
    if pp is not None and shape.num_layers % pp:
        raise ValueError(
            f"--pipeline-model-parallel-size {pp} does not divide the model's {shape.num_layers} layers. Use a divisor."
        )
    if ep is not None and max(1, shape.num_experts) % ep:
        raise ValueError(
            f"--expert-model-parallel-size {ep} does not divide the model's {shape.num_experts} experts. Use a divisor, or leave "
            "it out."
        )


def _rollout_shares(model: Model, config: CapacityConfig) -> list[int]:
    """Returns the numbers of GPUs for servers to compare: 0, and full nodes up to half of the cluster, or quarters of a single
    node."""
    if not config.needs.uses_rollouts():
        if config.rollout_gpus:
            raise ValueError(
                f"--objective {config.objective} uses no rollouts, so the servers of --rollout-gpus {config.rollout_gpus} would be idle. Use 0."
            )
        return [0]
    if model.shape.latent is not None:
        if config.rollout_gpus:
            raise ValueError(
                f"--rollout-gpus {config.rollout_gpus}: models with multi-latent attention cannot be sent to servers yet. Use 0."
            )
        return [0]
    tp = serving_tp(model, config)
    if config.rollout_gpus is not None:
        if config.rollout_gpus and tp is None:
            raise ValueError(
                f"the model's {2 * model.num_parameters / GIB:.0f} GiB need more than 75 % of the memory of a server with "
                f"{config.gpus_per_node} GPUs. Use larger GPUs, or --rollout-gpus 0."
            )
        if config.rollout_gpus and tp is not None and config.rollout_gpus % tp:
            raise ValueError(
                f"--rollout-gpus {config.rollout_gpus} is not a multiple of the {tp} GPUs that a server of this model needs. Use "
                f"{max(1, round(config.rollout_gpus / tp)) * tp}."
            )
        left = config.num_gpus - config.rollout_gpus
        if left > config.gpus_per_node and left % config.gpus_per_node:
            raise ValueError(
                f"--rollout-gpus {config.rollout_gpus} leaves {left} GPUs to the trainer, which do not fill nodes of "
                f"{config.gpus_per_node}. Use {-(-config.rollout_gpus // config.gpus_per_node) * config.gpus_per_node}."
            )
        return [config.rollout_gpus]
    unit = config.gpus_per_node if config.num_gpus > config.gpus_per_node else max(1, config.num_gpus // 4)
    shares = [n for n in range(unit, config.num_gpus // 2 + 1, unit) if tp is not None and n % tp == 0]
    if len(shares) > 8:
        shares = [n for n in shares if (config.num_gpus - n) % (4 * unit) == 0 or n == unit]
    return shares if config.rollout_lag else [0, *shares]


def _why_none(model: Model, config: CapacityConfig) -> str:
    """Returns the reason why no layout is possible with any memory."""
    shares = [config.rollout_gpus] if config.rollout_gpus is not None else [0]
    num = config.num_gpus - shares[0]
    chosen = [
        f"--{name.replace('_', '-')} {value}"
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
        )
        if (value := getattr(config, name)) is not None
    ]
    if config.rollout_gpus == 0 and (config.expert_model_parallel_size or 1) > 1:
        return (
            f"{' '.join(chosen)} cannot be combined with --rollout-gpus 0: a trainer with expert parallelism does not sample. "
            "Give GPUs to servers."
        )
    size = 1
    for value in (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
    ):
        size *= value or 1
    if num % size:
        return (
            f"{' '.join(chosen)}: a replica needs {size} GPUs, which does not divide the {num} GPUs that train. Use smaller sizes, or "
            f"--num-gpus {max(1, round(num / size)) * size + shares[0]}."
        )
    for batch in _near(config.global_batch_size):
        if any(True for _ in candidates(model, replace(config, global_batch_size=batch), num)):
            return (
                f"--global-batch-size {config.global_batch_size} does not split over the replicas of any layout of the {num} GPUs "
                f"that train. Use {batch}, or another --rollout-gpus."
            )
    return (
        f"no layout of the {num} training GPUs accepts {' '.join(chosen) or 'this model'}: heads, layers and sequence must "
        "divide by their parallel sizes. Leave out one of them."
    )


def _near(batch: int) -> list[int]:
    """Larger and smaller batch sizes, the nearest first."""
    return [n for d in range(1, batch) for n in (batch + d, batch - d) if n >= 1]


def nothing_fits(
    estimates: list[LayoutEstimate],
    model: Model,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    *,
    precision: str = "bf16",
) -> str | None:
    """Returns one line with the excess of the closest layout and the flags to change; None if a layout fits."""
    closest = estimates[0]
    excess = closest.excess_gib(config)
    if excess <= 0:
        return None
    memory, layout = closest.memory, closest.layout
    ways = [f"--gpu-memory-gib {math.ceil(memory.total / GIB)}"]
    if enough := _enough_gpus(model, config, assumed, precision):
        ways.insert(0, f"--num-gpus {enough}")
    if memory.total - memory.steady > excess * GIB:
        ways.append("a shorter --seq-length")
    if config.recompute in ("none", "selective"):
        ways.append("--recompute full")
    return (
        f"nothing fits {config.num_gpus} GPUs of {config.gpu_memory_gib:g} GiB: the closest layout (tp {layout.tp}, pp "
        f"{layout.pp}, cp {layout.cp}, ep {layout.ep}, dp {layout.dp}, recompute {layout.recompute}) needs "
        f"{memory.total / GIB:.1f} GiB a GPU, {excess:.1f} too much. Change one of: {', '.join(ways)}."
    )


def _enough_gpus(
    model: Model, config: CapacityConfig, assumed: AssumptionConfig, precision: str
) -> int | None:
    """The smallest of two, four and eight times the cluster on which a layout fits; None if none is large enough."""
    for num_gpus in (2 * config.num_gpus, 4 * config.num_gpus, 8 * config.num_gpus):
        larger = replace(config, num_gpus=num_gpus)
        with contextlib.suppress(ValueError):
            if estimate_layouts(model, larger, assumed, precision=precision)[0].excess_gib(larger) <= 0:
                return num_gpus
    return None
