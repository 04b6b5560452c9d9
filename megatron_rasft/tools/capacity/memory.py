"""What a GPU of the trainer must hold, part by part, on the fullest pipeline stage."""

import math
from collections import Counter
from dataclasses import dataclass

from megatron_rasft.config.loss import fused_chunk_tokens
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model, padded_vocabulary, shards, stage_chunks

GIB = 2**30

_LOGIT_BYTES = 48
"""Per row and vocabulary entry of the embedded engine: PolicySampler.row_bytes."""

_FP32 = 4
_ADAM = 2 * _FP32
"""Two moments of an element."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one GPU.

    Activations, the key-value cache and the sync's buckets are never there together: a step, a refresh and a sync
    follow each other.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """And the last layer's hidden states, gathered over the tensor-parallel ranks."""
    reference: float
    """On the GPU: only an objective with a full-vocabulary KL has it there."""
    sync: float
    kv_cache: float
    margin: float
    host: float
    """In pinned memory of the node, for each GPU: the frozen reference, and the live weights while it scores."""

    @property
    def steady(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.margin

    @property
    def total(self) -> float:
        step = self.activations + self.logits + self.reference
        return self.steady + max(step, self.sync, self.kv_cache)


def estimate_memory(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    *,
    num_microbatches: int,
    is_fp8: bool = False,
    uses_servers: bool = True,
    samples: bool = True,
) -> MemoryEstimate:
    """Of the fullest stage, in BF16 with fp32 gradients and the distributed optimizer.

    Args:
        num_microbatches: of a step, on each data-parallel rank.
        is_fp8: linear layers run in FP8; Transformer Engine then keeps two 8-bit copies of their weights.
        uses_servers: rollouts come from servers, which are sent the weights; else from the trainer.
        samples: whether there are rollouts at all.
    """
    stages = [
        _stage_memory(model, layout, config, assumed, stage, num_microbatches, is_fp8, uses_servers, samples)
        for stage in sorted({0, layout.pp - 1})
    ]
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(
    model: Model,
    layout: Layout,
    config: CapacityConfig,
    assumed: AssumptionConfig,
    stage: int,
    num_microbatches: int,
    is_fp8: bool,
    uses_servers: bool,
    samples: bool,
) -> MemoryEstimate:
    needs = config.needs
    is_last = stage == layout.pp - 1
    dense, expert = buffer_elements(model, layout, stage)
    held = sum(c.num_dense + c.num_expert for c in stage_chunks(model, layout, stage))
    tokens = config.micro_batch_size * config.seq_length / layout.cp
    return MemoryEstimate(
        stage=stage,
        weights=2 * (dense + expert) + (2 * _linear_elements(model, layout) if is_fp8 else 0),
        gradients=_FP32 * (dense + expert),
        optimizer=(_FP32 + _ADAM) * (dense / layout.num_replicas + expert / layout.num_expert_replicas),
        activations=activation_bytes(model, layout, stage, tokens, num_microbatches),
        logits=_logits_bytes(model, layout, config, tokens) if is_last else 0.0,
        reference=_reference_bytes(model, layout, tokens, num_microbatches)
        if is_last and needs.needs_reference_distribution()
        else 0.0,
        sync=sync_bytes(model, layout, stage, config.sync_bucket_mib * 2**20)
        if samples and uses_servers
        else 0.0,
        kv_cache=_kv_cache_bytes(model, layout, config, assumed, is_last)
        if samples and not uses_servers
        else 0.0,
        margin=assumed.margin_gib * GIB,
        host=2 * 2 * held if needs.needs_reference() else 0.0,
    )


def buffer_elements(model: Model, layout: Layout, stage: int) -> tuple[int, int]:
    """Elements of the buffers that Megatron lays parameters and gradients out in: experts have their own.

    Every parameter begins on a multiple of 64, and a buffer ends on one of 128 and of the ranks that share the
    optimizer's states (megatron.core.optimizer.param_layout); with --overlap-grad-reduce so does each of its buckets,
    which is left out here.
    """
    dense = expert = 0
    for chunk in stage_chunks(model, layout, stage):
        dense += _padded(chunk.dense, layout.num_replicas)
        expert += _padded(chunk.expert, layout.num_expert_replicas)
    return dense, expert


def _padded(sizes: Counter[int], num_replicas: int) -> int:
    unit = math.lcm(num_replicas, 128)
    return -(-sum(-(-size // 64) * 64 * count for size, count in sizes.items()) // unit) * unit


def _linear_elements(model: Model, layout: Layout) -> int:
    held = shards(model, layout.tp, layout.expert_tp)
    experts = sum(held.expert) * model.shape.num_experts // layout.ep
    return (held.linear + experts) * model.shape.num_layers // layout.pp


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Elements kept for the backward pass of one layer, per token; fp32 ones count as many as they fill."""

    norms: float
    """Inputs of the two norms, which are the residual stream, and their outputs."""
    attention: float
    mlp: float

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


def layer_activations(model: Model, *, has_te: bool = True, element_bytes: int = 2) -> LayerActivations:
    """After Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for this project's layers.

    Their 34 sbh + 5 as^2b bytes hold for GPT-3's layer. Here there are grouped keys and values, a gated MLP, no
    dropout, and fused attention that keeps its output and one normaliser per head in the place of the matrix of scores.

    Args:
        has_te: Transformer Engine's fused layers. The plain ones also keep the normalised input of each norm's scale, the
            rotation's tables, and the gate's activation and the linear half beside their product.
        element_bytes: of an activation.
    """
    s = model.shape
    q, kv = s.num_attention_heads * s.head_dim, s.num_query_groups * s.head_dim
    f = s.ffn_hidden_size * (3 if has_te else 5)
    if s.num_experts:
        # sent to the experts, returned by them, put in order again; the router's probabilities are fp32
        mlp = model.top_k * (3 * s.hidden_size + f) + s.num_experts * 2 * _FP32 / element_bytes
    else:
        mlp = f
    # projected, rotated (the values are not), and the output with its normalisers
    attention = (q + 2 * kv) + (q + kv) + q + s.num_attention_heads * _FP32 / element_bytes
    if s.has_qk_norm:
        attention += q if has_te else 2 * q + kv
    if not has_te:
        attention += 4 * s.head_dim
    return LayerActivations(norms=(4 if has_te else 6) * s.hidden_size, attention=attention, mlp=mlp)


def activation_bytes(model: Model, layout: Layout, stage: int, tokens: float, num_microbatches: int) -> float:
    """Kept between the forward and the backward pass by all micro-batches that a stage has under way, and what the
    backward pass of one layer makes for itself.

    With sequence parallelism, which every layout with tp > 1 has, all of a layer is split over the tensor-parallel
    ranks. 1F1B has pp - stage micro-batches under way; interleaved, more, of a chunk each (Narayanan et al. 2021,
    arXiv 2104.04473). FP8 keeps less; that is not counted.
    """
    layer = layer_activations(model)
    kept = {
        "none": layer.total,
        "selective": layer.norms + layer.attention,
        "full": float(model.shape.hidden_size),
    }[layout.recompute]
    working = {"none": 0.0, "selective": layer.mlp, "full": layer.total}[layout.recompute] + layer.mlp
    num_layers = model.shape.num_layers // (layout.pp * layout.chunks)
    if layout.chunks > 1:
        ahead = (layout.pp - stage - 1) * 2 + (layout.chunks - 1) * layout.pp + 1
        under_way = min(num_microbatches * layout.chunks, ahead)
    else:
        under_way = min(num_microbatches, layout.pp - stage)
    return 2 * tokens / layout.tp * (kept * num_layers * under_way + working)


def logprob_chunk(model: Model, layout: Layout, config: CapacityConfig, tokens: float) -> float:
    """Tokens whose logits a rank holds at a time; ``tokens`` where none of them is computed twice."""
    chunk = config.logprob_chunk_tokens
    if chunk is None:
        chunk = fused_chunk_tokens(math.ceil(tokens), 2 * padded_vocabulary(model, layout.tp) // layout.tp)
    return min(chunk or tokens, tokens)


def _logits_bytes(model: Model, layout: Layout, config: CapacityConfig, tokens: float) -> float:
    """Logits in BF16, a chunk of tokens at a time: their gradient takes their place."""
    chunk = logprob_chunk(model, layout, config, tokens)
    vocabulary = padded_vocabulary(model, layout.tp) / layout.tp
    copies = 2 if config.needs.needs_reference_distribution() else 1
    hidden = 2 * 2 * tokens * model.shape.hidden_size * (1 + 1 / layout.tp)
    return copies * chunk * vocabulary * 2 + hidden


def _reference_bytes(model: Model, layout: Layout, tokens: float, num_microbatches: int) -> float:
    """The reference's output projection, and its hidden states of the whole step."""
    hidden = tokens * model.shape.hidden_size / layout.tp * num_microbatches
    return 2 * (shards(model, layout.tp, layout.expert_tp).embedding + hidden)


def sync_bytes(model: Model, layout: Layout, stage: int, bucket_bytes: int) -> float:
    """What a sync takes on the rank that sends, in BF16: sync.buckets.MemoryPlan's bound."""
    s = model.stored
    gate_up = 2 * s.ffn_hidden_size * s.hidden_size
    qkv = (s.num_attention_heads + 2 * s.num_query_groups) * s.head_dim * s.hidden_size
    ends = s.vocab_size * s.hidden_size if stage in (0, layout.pp - 1) else 0
    largest = 2 * max(gate_up, qkv, ends)
    gathered = largest if layout.tp > 1 else 0
    return max(2 * bucket_bytes - gathered, largest) + gathered


def _kv_cache_bytes(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig, is_last: bool
) -> float:
    """Of the embedded engine's rows, and their logits while a token is drawn."""
    length = min(config.seq_length, assumed.prompt_tokens + config.max_new_tokens)
    row = cached_token_bytes(model, layout.tp) * length // layout.pp
    logits = _LOGIT_BYTES * model.shape.vocab_size if is_last else 0
    return config.rollout_batch_size * (row + logits)


def cached_token_bytes(model: Model, tp: int) -> int:
    """Keys and values of one token in BF16 on the ranks of all stages together."""
    s = model.shape
    return 2 * 2 * max(1, s.num_query_groups // tp) * s.head_dim * s.num_layers
