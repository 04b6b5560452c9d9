"""Estimates the time of a step, a refresh and the whole run: counted work divided by assumed speeds."""

import math
from dataclasses import dataclass

from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model, stage_chunks
from megatron_rasft.tools.capacity.memory import cached_token_bytes, logprob_chunk
from megatron_rasft.tools.capacity.sync_time import SyncCosts, estimate_sync
from megatron_rasft.weights.families.shape import ModelShape

PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""Dense peak of an H100 SXM."""

MFU = {"bf16": 0.47, "fp8": 0.27}
"""Measured on one H100 with the shape of Qwen2.5-1.5B and sequences of 2,048 tokens: 47,000 tokens/s in BF16, 54,000 in
FP8. One GPU has neither pipeline bubble nor communication."""

MIXTURE_MFU = {"bf16": 0.30, "fp8": 0.12}
"""Published for Qwen3-30B-A3B and 235B-A22B: verl 0.31 to 0.40 in BF16, Megatron-Bridge 206 to 253 TFLOP/s in FP8."""

DECODING = 40_000.0 * 1.54e9
"""Tokens per second times parameters: SGLang 0.5.17 on one H100, Qwen2.5-1.5B's shape, 256 sequences at once, measured.
For an 8B model this scales to 7,700 tokens/s, less than the published 16,200, so times are rather overestimated."""

PACKING = 0.95
"""Share of a packed micro-batch that is not padding."""

_HBM_SHARE = 0.6
"""Share of the memory bandwidth that decoding reaches."""

_OVERLAP_REST = 0.1
"""Share of the data-parallel communication that no computation hides."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """The time of one step, in seconds."""

    tokens: float
    """Tokens of all samples, without padding."""
    num_microbatches: int
    compute_s: float
    """Seconds of the slowest stage's matrix products, including recomputation."""
    bubble_s: float
    tensor_s: float
    """Seconds of communication of tensor and expert parallelism and between pipeline stages."""
    context_s: float
    data_s: float
    """Seconds of communication of gradients and weights between replicas that no computation hides."""
    reference_s: float
    """Seconds of the reference's forward pass, if the objective needs it in each step."""
    mfu: float
    """Model FLOPs per second (without recomputation) as a share of the trainer's peak."""

    @property
    def total_s(self) -> float:
        parts = (self.compute_s, self.bubble_s, self.tensor_s, self.context_s, self.data_s)
        return sum(parts) + self.reference_s


@dataclass(frozen=True, kw_only=True)
class RefreshEstimate:
    """The time of one refresh, in seconds."""

    rollouts_s: float
    verification_s: float
    scoring_s: float
    """Seconds of forward passes for log-probabilities under the reference or the current policy."""
    sync_s: float

    @property
    def total_s(self) -> float:
        return self.rollouts_s + self.verification_s + self.scoring_s + self.sync_s


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Steps, refreshes and time of the whole run."""

    num_steps: int
    num_refreshes: int
    saves_s: float
    hours: float
    gpu_hours: float


def tokens_per_step(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Tokens of a step: demonstrations, and the rollouts that are trained on."""
    demonstrations = trained_demonstrations(config) * assumed.demonstration_tokens
    rollouts = trained_rollouts(config, assumed) * rollout_tokens(config, assumed)
    return config.global_batch_size * (demonstrations + rollouts)


def trained_demonstrations(config: CapacityConfig) -> int:
    """Demonstrations per problem that are trained on: 1, or 0 if the objective trains on rollouts only."""
    return 0 if config.needs.trains_on == "rollouts" else 1


def trained_rollouts(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Rollouts per problem that are trained on: all of them, or the correct ones."""
    if not config.needs.uses_rollouts():
        return 0.0
    return config.num_samples * (1.0 if config.needs.trains_on_wrong_rollouts else assumed.solve_rate)


def response_tokens(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Mean length of a rollout without its prompt."""
    return assumed.response_tokens or config.max_new_tokens / 2


def rollout_tokens(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Mean length of a rollout with its prompt."""
    return assumed.prompt_tokens + response_tokens(config, assumed)


def mean_length(config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Mean sequence length, weighted by tokens, on which attention's cost of a token depends."""
    m, n = trained_demonstrations(config), trained_rollouts(config, assumed)
    a, b = assumed.demonstration_tokens, rollout_tokens(config, assumed)
    return (m * a * a + n * b * b) / (m * a + n * b) if m or n else 0.0


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of one token's forward pass, summed over all ranks."""

    attention: float
    """Attention of one layer: projections, scores, weighted values; the mean over the layers if some have gated delta nets."""
    mlp: float
    """MLP of one layer, or the token's experts and the router; the mean over the layers if they differ."""
    output: float


def forward_flops(model: Model, length: float) -> ForwardFlops:
    """Counts two FLOPs per weight, and causal attention in a sequence of ``length`` tokens."""
    s = model.shape
    share = len(model.layers_with_experts) / s.num_layers
    sparse = 3 * (s.ffn_hidden_size * model.top_k + s.shared_ffn_hidden_size) + s.num_experts
    mlp = s.hidden_size * (share * sparse + (1 - share) * 3 * s.mlp_size)
    gate = s.num_attention_heads * s.head_dim if s.delta is not None else 0
    scores = _seen_length(model, length) * _scored_elements(s)
    attention = 2 * (_attention_weights(s) + s.hidden_size * gate) + scores
    delta_share = sum(s.delta_layers) / s.num_layers
    return ForwardFlops(
        attention=(1 - delta_share) * attention + delta_share * _delta_flops(model),
        mlp=2 * mlp,
        output=2 * s.hidden_size * s.vocab_size,
    )


def _seen_length(model: Model, length: float) -> float:
    """Twice the mean number of tokens that a token of a sequence sees, in the mean of all layers."""
    windows = [length if window is None else min(window, length) for window in model.windows] or [length]
    return sum(window * (2 - window / length) if length else 0.0 for window in windows) / len(windows)


def _attention_weights(s: ModelShape) -> int:
    """Elements of the matrices of one layer's attention."""
    heads = s.num_attention_heads
    if s.latent is None:
        return 2 * s.hidden_size * s.head_dim * (heads + s.num_query_groups)
    a = s.latent
    query = heads * a.key_dim * (a.query_rank or s.hidden_size) + s.hidden_size * (a.query_rank or 0)
    key_value = s.hidden_size * (a.key_value_rank + a.rotary_dim)
    key_value += heads * (a.plain_dim + a.value_dim) * a.key_value_rank
    return query + key_value + heads * a.value_dim * s.hidden_size


def _scored_elements(s: ModelShape) -> int:
    """Elements of a token's queries and of its weighted values."""
    if s.latent is None:
        return 2 * s.num_attention_heads * s.head_dim
    return s.num_attention_heads * (s.latent.key_dim + s.latent.value_dim)


def _delta_flops(model: Model) -> float:
    """FLOPs of one token in a gated delta net: projections, and reading, correcting and querying the state."""
    delta = model.shape.delta
    if delta is None:
        return 0.0
    projections = 2 * delta.keys + 3 * delta.values + 2 * delta.num_value_heads
    return 2 * (model.shape.hidden_size * projections + 3 * delta.values * delta.key_dim)


def estimate_step(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    *,
    precision: str = "bf16",
) -> StepEstimate:
    """Estimates one training step.

    The slowest stage sets the pace of the pipeline. The pipeline fills and drains once per step, so its bubble is pp - 1
    micro-batches, divided by the model chunks of a stage (Narayanan et al. 2021, arXiv 2104.04473). Communication of tensor,
    context and expert parallelism counts in full; data-parallel communication overlaps with one micro-batch.
    """
    flops = forward_flops(model, mean_length(config, assumed))
    tokens = tokens_per_step(config, assumed)
    budget = config.micro_batch_size * config.seq_length
    num = max(1, math.ceil(tokens / PACKING / layout.dp / budget))
    if layout.chunks > 1:  # Megatron's interleaved schedule needs a multiple of the number of stages
        num = -(-num // layout.pp) * layout.pp
    # a packed micro-batch is as long as its samples, not padded to the budget
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
    """Share of the peak that matrix products reach: --mfu or its default."""
    return assumed.mfu or (MIXTURE_MFU if model.top_k else MFU)[precision]


def flops_per_s(model: Model, assumed: AssumptionConfig, precision: str) -> float:
    """FLOPs per second of matrix products on one GPU."""
    peak = assumed.peak_tflops or PEAK_TFLOPS[precision]
    return matrix_share(model, assumed, precision) * peak * 1e12


def _bandwidth(assumed: AssumptionConfig, config: CapacityConfig, span: int) -> float:
    """Bytes per second of a collective whose ranks lie within ``span`` consecutive GPUs, starting at the first GPU of a node."""
    gb_per_s = assumed.nvlink_gb_per_s if span <= config.gpus_per_node else assumed.network_gb_per_s
    return gb_per_s * 1e9


def _communication(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig, width: float
) -> tuple[float, float]:
    """Seconds of communication of a micro-batch on a stage: first tensor, expert and pipeline parallelism, then context
    parallelism."""
    s = model.shape
    tp, cp, ep = layout.tp, layout.cp, layout.ep
    layers = s.num_layers / layout.pp
    hidden = 2 * width / cp * s.hidden_size
    # forward: gather and scatter around attention and MLP; backward: the same, and each input is gathered once more
    passes = {"none": 10, "selective": 12, "full": 14}[layout.recompute]
    inside = layers * passes * hidden * (tp - 1) / tp / _bandwidth(assumed, config, tp)
    forwards = {"none": 2, "selective": 3, "full": 3}[layout.recompute]
    sent = 2 * hidden / tp * model.top_k * (ep - 1) / ep  # tokens are sent to the experts and back
    mixtures = len(model.layers_with_experts) / layout.pp
    inside += mixtures * forwards * sent / _bandwidth(assumed, config, tp * cp * layout.dp if ep > 1 else 1)
    if layout.pp > 1:
        inside += 2 * layout.chunks * hidden / tp / _bandwidth(assumed, config, layout.num_gpus)
    keys = 2 * width / cp * s.cached_elements(tp)
    context = layers * (3 + (layout.recompute == "full")) * keys * (cp - 1)
    return inside, context / _bandwidth(assumed, config, tp * cp)


def _data_s(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig, microbatch_s: float
) -> float:
    """Seconds to scatter fp32 gradients and gather BF16 weights, less the overlap with the last and the first micro-batch."""
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
    """Seconds of a forward pass of the reference, including swapping its weights in and the trainer's weights back."""
    flops = forward_flops(model, mean_length(config, assumed))
    layers = model.shape.num_layers / layout.pp
    rate = flops_per_s(model, assumed, precision) * layout.tp * layout.cp
    pace = (layers * (flops.attention + flops.mlp) + flops.output) * width / rate
    tensor_s, context_s = _communication(model, layout, config, assumed, width)
    once = pace + 0.4 * tensor_s + context_s / 3
    held = sum(c.num_dense + c.num_expert for c in stage_chunks(model, layout, 0))
    return once * (num_microbatches + layout.pp - 1) + 3 * 2 * held / (assumed.pcie_gb_per_s * 1e9)


def serving_tp(model: Model, config: CapacityConfig) -> int | None:
    """Returns the GPUs of a server: the fewest whose memory the weights fill to at most 75 %; None if a node is too small."""
    memory = 0.75 * config.gpu_memory_gib * 2**30
    sizes = [n for n in range(1, config.gpus_per_node + 1) if config.gpus_per_node % n == 0]
    fitting = [
        n
        for n in sizes
        if model.stored.num_attention_heads % n == 0 and 2 * model.num_parameters / n <= memory
    ]
    return min(fitting, default=None)


def decode_tokens_per_s(model: Model, assumed: AssumptionConfig) -> float:
    """Decoded tokens per second of a server, per GPU."""
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
    """Estimates the refresh before --refresh-interval steps."""
    needs = config.needs
    num_steps = min(config.refresh_interval, _num_steps(config))
    num_samples = num_steps * config.global_batch_size * config.num_samples if needs.uses_rollouts() else 0
    rollouts_s = sync_s = 0.0
    if num_samples and rollout_gpus:
        tp = serving_tp(model, config)
        assert tp is not None, "an estimate with servers must have servers that fit"
        tokens = num_samples * response_tokens(config, assumed)
        longest_s = config.max_new_tokens * _read_s(model, tp, assumed)
        rollouts_s = tokens / rollout_gpus / decode_tokens_per_s(model, assumed) + longest_s
        sync_s = _sync_s(model, layout, config, assumed)
    elif num_samples:
        tokens = num_samples / layout.num_replicas * response_tokens(config, assumed)
        # a finished row is refilled at once; when no sample waits any more, rows end one after the other
        positions = tokens / config.rollout_batch_size + config.max_new_tokens
        rollouts_s = positions * _embedded_position_s(model, layout, config, assumed)
    budget = config.micro_batch_size * config.seq_length
    num_batches = num_steps * step.tokens / PACKING / layout.dp / budget
    scored = [num_batches] * (needs.needs_reference_logprobs() + needs.needs_old_logprobs())
    if needs.teacher() is not None:
        # The teacher's prompt holds the demonstration too.
        scored.append(num_batches * (1 + assumed.demonstration_tokens / rollout_tokens(config, assumed)))
    return RefreshEstimate(
        rollouts_s=rollouts_s,
        verification_s=num_samples / assumed.verifications_per_s if needs.needs_verdicts else 0.0,
        scoring_s=sum(
            _forward_s(model, layout, config, assumed, precision, max(1.0, num), budget) for num in scored
        ),
        sync_s=sync_s,
    )


def _embedded_position_s(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig
) -> float:
    """Seconds to decode one token of every row in the trainer: kernels, reading the weights, reading keys and values."""
    has_graphs = layout.pp == 1 and not model.shape.num_experts
    layer_ms = assumed.embedded_graph_layer_ms if has_graphs else assumed.embedded_layer_ms
    cached = (
        config.rollout_batch_size * rollout_tokens(config, assumed) * cached_token_bytes(model, layout.tp)
    )
    cache_s = cached / (assumed.hbm_gb_per_s * 1e9 * _HBM_SHARE)
    return model.shape.num_layers * layer_ms / 1e3 + _read_s(model, layout.tp, assumed) + cache_s


def _read_s(model: Model, tp: int, assumed: AssumptionConfig) -> float:
    """Seconds to read all weights once: the minimum time to decode a position."""
    return 2 * model.num_parameters / tp / (assumed.hbm_gb_per_s * 1e9 * _HBM_SHARE)


def _sync_s(model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig) -> float:
    """Seconds of a weight sync. A sender has one network card and sends at half its speed, as benchmarks/weight_sync.py assumes."""
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
    """Adds up all steps, refreshes and saves. With --rollout-lag 1 the servers sample while the trainer steps."""
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
    """Number of checkpoints of a run: one every --save-interval steps, and one at the end."""
    return math.ceil(_num_steps(config) / config.save_interval) if config.save_interval else 0
