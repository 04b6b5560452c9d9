"""How long a step, a refresh and the whole run take: counted work over stated speeds."""

import math
from dataclasses import dataclass

from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model, stage_chunks
from megatron_rasft.tools.capacity.memory import cached_token_bytes, logprob_chunk
from megatron_rasft.tools.capacity.sync_time import SyncCosts, estimate_sync

PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""Of an H100 SXM, dense."""

MFU = {"bf16": 0.47, "fp8": 0.27}
"""Measured on one H100 with the shape of Qwen2.5-1.5B and sequences of 2,048 tokens: 47,000 tokens/s in BF16, 54,000 in
FP8. There is neither bubble nor communication on one GPU."""

MIXTURE_MFU = {"bf16": 0.30, "fp8": 0.12}
"""Published for Qwen3-30B-A3B and 235B-A22B: verl 0.31 to 0.40 in BF16, Megatron-Bridge 206 to 253 TFLOP/s in FP8."""

DECODING = 40_000.0 * 1.54e9
"""Tokens per second times parameters: SGLang 0.5.17 on one H100, Qwen2.5-1.5B's shape, 256 sequences at once, measured.
By size that is 7,700 tokens/s for an 8B model, where others publish 16,200: it errs on the slow side."""

PACKING = 0.95
"""Share of a packed micro-batch that is not padding."""

_HBM_SHARE = 0.6
"""Of the memory bandwidth that decoding reaches."""

_OVERLAP_REST = 0.1
"""Share of the data-parallel communication that nothing hides."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Seconds of one step."""

    tokens: float
    """Of all samples, padding left out."""
    num_microbatches: int
    compute_s: float
    """Matrix products of the slowest stage, recomputation included."""
    bubble_s: float
    tensor_s: float
    """Tensor- and expert-parallel communication, and that between stages."""
    context_s: float
    data_s: float
    """Gradients and weights between replicas, as far as nothing hides it."""
    reference_s: float
    """The reference's forward pass, where an objective needs it in each step."""
    mfu: float
    """Model FLOPs (without recomputation) per second over the trainer's peak."""

    @property
    def total_s(self) -> float:
        parts = (self.compute_s, self.bubble_s, self.tensor_s, self.context_s, self.data_s)
        return sum(parts) + self.reference_s


@dataclass(frozen=True, kw_only=True)
class RefreshEstimate:
    """Seconds of one refresh."""

    rollouts_s: float
    verification_s: float
    scoring_s: float
    """Forward passes for log-probabilities of the reference, or of the policy of the moment."""
    sync_s: float

    @property
    def total_s(self) -> float:
        return self.rollouts_s + self.verification_s + self.scoring_s + self.sync_s


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """The whole run."""

    num_steps: int
    num_refreshes: int
    saves_s: float
    hours: float
    gpu_hours: float


def tokens_per_step(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Demonstrations, and the rollouts that are trained on."""
    return config.global_batch_size * (
        assumed.demonstration_tokens + trained_rollouts(config, assumed) * rollout_tokens(config, assumed)
    )


def trained_rollouts(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Per problem."""
    if not config.needs.uses_rollouts():
        return 0.0
    return config.num_samples * (1.0 if config.objective == "grpo" else assumed.solve_rate)


def response_tokens(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Mean length of a rollout without its prompt."""
    return assumed.response_tokens or config.max_new_tokens / 2


def rollout_tokens(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Mean length of a rollout with its prompt."""
    return assumed.prompt_tokens + response_tokens(config, assumed)


def mean_length(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Mean length of a sequence that a token attends in, weighted by tokens."""
    n = trained_rollouts(config, assumed)
    a, b = assumed.demonstration_tokens, rollout_tokens(config, assumed)
    return (a * a + n * b * b) / (a + n * b)


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Of one token, on the whole model."""

    attention: float
    """Of a layer: projections, scores, weighted values."""
    mlp: float
    """Of a layer: the experts that a token passes through, and the router."""
    output: float


def forward_flops(model: Model, length: float) -> ForwardFlops:
    """Two per weight, and causal attention in a sequence of ``length`` tokens."""
    s = model.shape
    q, kv = s.num_attention_heads * s.head_dim, s.num_query_groups * s.head_dim
    mlp = 3 * s.hidden_size * s.ffn_hidden_size * max(1, model.top_k)
    return ForwardFlops(
        attention=2 * s.hidden_size * (2 * q + 2 * kv) + 2 * length * q,
        mlp=2 * (mlp + s.hidden_size * s.num_experts),
        output=2 * s.hidden_size * s.vocab_size,
    )


def estimate_step(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    *,
    precision: str = "bf16",
) -> StepEstimate:
    """Of one training step.

    The slowest stage sets the pace of the pipeline, which fills and drains once a step: its bubble is (pp - 1) micro-batches,
    divided by the model chunks of a stage (Narayanan et al. 2021, arXiv 2104.04473). Tensor-, context- and
    expert-parallel communication is counted as if nothing hid it; data-parallel communication is hidden behind one
    micro-batch.
    """
    flops = forward_flops(model, mean_length(config, assumed))
    tokens = tokens_per_step(config, assumed)
    budget = config.micro_batch_size * config.seq_length
    num = max(1, math.ceil(tokens / PACKING / layout.dp / budget))
    if layout.chunks > 1:
        num = -(-num // layout.pp) * layout.pp
    # micro-batches have the length of the fullest, not of the budget
    width = min(budget, tokens / PACKING / layout.dp / num)
    layers = model.shape.num_layers / layout.pp
    again = {"none": 0.0, "selective": flops.mlp, "full": flops.attention + flops.mlp}[layout.recompute]
    layer_flops = 3 * (flops.attention + flops.mlp) + again
    local = width / layout.cp
    output = (3 if logprob_chunk(model, layout, config, local) >= local else 4) * flops.output
    rate = flops_per_s(model, assumed, precision) * layout.tp * layout.cp
    pace = (layers * layer_flops + output) * width / rate
    tensor_s, context_s = _communication(model, layout, config, assumed, width)
    microbatch_s = pace + tensor_s + context_s
    needs = config.needs
    reference_s = 0.0
    if needs.needs_reference_distribution():
        reference_s = _forward_s(model, layout, config, assumed, precision, num, width)
    peak = (assumed.peak_tflops or PEAK_TFLOPS[precision]) * 1e12 * layout.num_gpus
    parts = {
        "compute_s": num * pace,
        "bubble_s": microbatch_s * (layout.pp - 1) / layout.chunks,
        "tensor_s": num * tensor_s,
        "context_s": num * context_s,
        "data_s": _data_s(model, layout, config, assumed, microbatch_s),
        "reference_s": reference_s,
    }
    model_flops = 3 * ((flops.attention + flops.mlp) * model.shape.num_layers + flops.output) * tokens
    return StepEstimate(
        tokens=tokens, num_microbatches=num, mfu=model_flops / peak / sum(parts.values()), **parts
    )  # fmt: skip


def matrix_share(model: Model, assumed: AssumptionConfig, precision: str) -> float:
    """Of the peak, what matrix products reach: --mfu or its default."""
    return assumed.mfu or (MIXTURE_MFU if model.top_k else MFU)[precision]


def flops_per_s(model: Model, assumed: AssumptionConfig, precision: str) -> float:
    """What matrix products reach on one GPU."""
    peak = assumed.peak_tflops or PEAK_TFLOPS[precision]
    return matrix_share(model, assumed, precision) * peak * 1e12


def _bandwidth(assumed: AssumptionConfig, config: CapacityConfig, span: int) -> float:
    """Bytes per second of a collective over ranks that span so many GPUs, counted from the first of a node."""
    gb_per_s = assumed.nvlink_gb_per_s if span <= config.gpus_per_node else assumed.network_gb_per_s
    return gb_per_s * 1e9


def _communication(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig, width: float
) -> tuple[float, float]:
    """Seconds of a micro-batch on a stage: tensor, expert and pipeline parallel; context parallel."""
    s = model.shape
    tp, cp, ep = layout.tp, layout.cp, layout.ep
    layers = s.num_layers / layout.pp
    hidden = 2 * width / cp * s.hidden_size
    # forward: gather and scatter around attention and MLP; backward the same, and each input gathered once more
    passes = {"none": 10, "selective": 12, "full": 14}[layout.recompute]
    inside = layers * passes * hidden * (tp - 1) / tp / _bandwidth(assumed, config, tp)
    forwards = {"none": 2, "selective": 3, "full": 3}[layout.recompute]
    sent = 2 * hidden / tp * model.top_k * (ep - 1) / ep  # to the experts and back
    inside += layers * forwards * sent / _bandwidth(assumed, config, tp * cp * layout.dp if ep > 1 else 1)
    if layout.pp > 1:
        inside += 2 * layout.chunks * hidden / tp / _bandwidth(assumed, config, layout.num_gpus)
    keys = 2 * 2 * width / cp * max(1, s.num_query_groups / tp) * s.head_dim
    context = layers * (3 + (layout.recompute == "full")) * keys * (cp - 1)
    return inside, context / _bandwidth(assumed, config, tp * cp)


def _data_s(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig, microbatch_s: float
) -> float:
    """fp32 gradients scattered and BF16 weights gathered, hidden behind the last and the first micro-batch."""
    slowest = 0.0
    span = layout.num_gpus // layout.pp
    for stage in (0, layout.pp - 1):
        chunks = stage_chunks(model, layout, stage)
        dense, expert = sum(c.num_dense for c in chunks), sum(c.num_expert for c in chunks)
        moved = dense * (1 - 1 / layout.num_replicas) + expert * (1 - 1 / layout.num_expert_replicas)
        slowest = max(slowest, 6 * moved / _bandwidth(assumed, config, span))
    return max(slowest - microbatch_s, slowest * _OVERLAP_REST)


def _forward_s(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    precision: str,
    num_microbatches: float,
    width: float,
) -> float:
    """A forward pass of the reference: its weights swapped in, and the live ones back."""
    flops = forward_flops(model, mean_length(config, assumed))
    layers = model.shape.num_layers / layout.pp
    rate = flops_per_s(model, assumed, precision) * layout.tp * layout.cp
    pace = (layers * (flops.attention + flops.mlp) + flops.output) * width / rate
    tensor_s, context_s = _communication(model, layout, config, assumed, width)
    once = pace + 0.4 * tensor_s + context_s / 3
    held = sum(c.num_dense + c.num_expert for c in stage_chunks(model, layout, 0))
    return once * (num_microbatches + layout.pp - 1) + 3 * 2 * held / (assumed.pcie_gb_per_s * 1e9)


def serving_tp(model: Model, config: CapacityConfig) -> int | None:
    """GPUs of a server: the fewest whose memory the weights fill to at most 75 %; None if no node is large enough."""
    room = 0.75 * config.gpu_memory_gib * 2**30
    sizes = [n for n in range(1, config.gpus_per_node + 1) if config.gpus_per_node % n == 0]
    fitting = [
        n for n in sizes if model.stored.num_attention_heads % n == 0 and 2 * model.num_parameters / n <= room
    ]
    return min(fitting, default=None)


def decode_tokens_per_s(model: Model, assumed: AssumptionConfig) -> float:
    """Of a server, per GPU."""
    return assumed.decode_tokens_per_s or DECODING / model.num_active_parameters


def estimate_refresh(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    step: StepEstimate,
    *,
    rollout_gpus: int,
    precision: str = "bf16",
) -> RefreshEstimate:
    """Of the refresh before --refresh-interval steps."""
    needs = config.needs
    num_steps = min(config.refresh_interval, _num_steps(config))
    num_samples = num_steps * config.global_batch_size * config.num_samples if needs.uses_rollouts() else 0
    rollouts_s = sync_s = 0.0
    if num_samples and rollout_gpus:
        tp = serving_tp(model, config)
        assert tp is not None, "an estimate with servers has ones that fit"
        tokens = num_samples * response_tokens(config, assumed)
        longest_s = config.max_new_tokens * _read_s(model, tp, assumed)
        rollouts_s = tokens / rollout_gpus / decode_tokens_per_s(model, assumed) + longest_s
        sync_s = _sync_s(model, layout, config, assumed)
    elif num_samples:
        tokens = num_samples / layout.num_replicas * response_tokens(config, assumed)
        # Rows are refilled as they end. At the end no sample waits, and the last row runs alone.
        positions = tokens / config.rollout_batch_size + config.max_new_tokens
        rollouts_s = positions * _embedded_position_s(model, layout, config, assumed)
    num_scored = needs.needs_reference_logprobs() + needs.needs_old_logprobs()
    budget = config.micro_batch_size * config.seq_length
    num_batches = num_steps * step.tokens / PACKING / layout.dp / budget
    return RefreshEstimate(
        rollouts_s=rollouts_s,
        verification_s=num_samples / assumed.verifications_per_s,
        scoring_s=num_scored
        * _forward_s(model, layout, config, assumed, precision, max(1.0, num_batches), budget)
        if num_scored
        else 0.0,
        sync_s=sync_s,
    )


def _embedded_position_s(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig
) -> float:
    """A token of all rows of the embedded engine: kernels, weights, and the rows' keys and values."""
    has_graphs = layout.pp == 1 and not model.shape.num_experts
    layer_ms = assumed.embedded_graph_layer_ms if has_graphs else assumed.embedded_layer_ms
    cached = (
        config.rollout_batch_size * rollout_tokens(config, assumed) * cached_token_bytes(model, layout.tp)
    )
    cache_s = cached / (assumed.hbm_gb_per_s * 1e9 * _HBM_SHARE)
    return model.shape.num_layers * layer_ms / 1e3 + _read_s(model, layout.tp, assumed) + cache_s


def _read_s(model: Model, tp: int, assumed: AssumptionConfig) -> float:
    """All weights read once: the least time of a position."""
    return 2 * model.num_parameters / tp / (assumed.hbm_gb_per_s * 1e9 * _HBM_SHARE)


def _sync_s(model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """A source has one card and gives the servers half of it: SyncCosts as benchmarks/weight_sync.py assumes them."""
    num_bytes = 2 * model.num_parameters
    costs = SyncCosts(
        gather=assumed.nvlink_gb_per_s * 1e9 / 3,
        network=assumed.network_gb_per_s * 1e9 / 2,
        load=assumed.hbm_gb_per_s * 1e9 * 0.3,
        request_s=0.010,
        control_s=0.5,
    )
    num_buckets = max(model.shape.num_layers, math.ceil(num_bytes / (config.sync_bucket_mib * 2**20)))
    return estimate_sync(num_bytes, num_buckets, costs, num_stages=layout.pp).total_s


def _num_steps(config: CapacityConfig) -> int:
    return math.ceil(config.num_problems * config.epochs / config.global_batch_size)


def estimate_run(
    config: CapacityConfig,
    step: StepEstimate,
    refresh: RefreshEstimate,
    *,
    checkpoint_bytes: float,
    assumed: AssumptionConfig,
) -> RunEstimate:
    """All steps, refreshes and saves. With --rollout-lag 1 the servers sample while the trainer steps."""
    num_steps = _num_steps(config)
    num_refreshes = math.ceil(num_steps / config.refresh_interval)
    training_s = num_steps * step.total_s
    rollouts_s = num_refreshes * refresh.rollouts_s
    waited_s = max(training_s, rollouts_s) if config.rollout_lag else training_s + rollouts_s
    saves_s = num_saves(config) * checkpoint_bytes / (assumed.disk_gb_per_s * 1e9)
    rest_s = num_refreshes * (refresh.total_s - refresh.rollouts_s)
    hours = (waited_s + rest_s + saves_s) / 3600
    return RunEstimate(
        num_steps=num_steps,
        num_refreshes=num_refreshes,
        saves_s=saves_s,
        hours=hours,
        gpu_hours=hours * config.num_gpus,
    )


def num_saves(config: CapacityConfig) -> int:
    """Checkpoints of a run: one every --save-interval steps, and one at the end."""
    return math.ceil(_num_steps(config) / config.save_interval) if config.save_interval else 0
