"""The memory that a GPU of the trainer needs, part by part, on the pipeline stage that needs most."""

import math
from collections import Counter
from dataclasses import dataclass

from megatron_rasft.config.loss import fused_chunk_tokens
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import (
    Layout,
    Model,
    Recompute,
    chunk_layers,
    padded_vocabulary,
    shards,
    stage_chunks,
)
from megatron_rasft.weights.families.shape import LatentShape, ModelShape

GIB = 2**30

_LOGIT_BYTES = 48
"""Bytes per sequence and vocabulary entry while the trainer draws a token; see PolicySampler.row_bytes."""

_FP32 = 4
_ADAM = 2 * _FP32
"""Bytes of Adam's two moments of one element."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory on one GPU, in bytes by part.

    Activations, the key-value cache and the buckets of a weight sync never exist at the same time, because step, refresh
    and sync run one after the other.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """Logits of the last stage, with the last layer's hidden states gathered over the tensor-parallel ranks."""
    reference: float
    """Reference weights on the GPU, which only an objective with a full-vocabulary KL needs."""
    sync: float
    kv_cache: float
    margin: float
    host: float
    """Pinned memory of the node, per GPU: the frozen reference, and the trainer's weights while the reference scores."""

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
    """Estimates the memory of the fullest stage, in BF16 with fp32 gradients and the distributed optimizer.

    Args:
        num_microbatches: micro-batches of a step on each data-parallel rank.
        is_fp8: whether linear layers run in FP8, for which Transformer Engine keeps two 8-bit copies of their weights.
        uses_servers: whether rollout servers sample and receive the weights; False: the trainer samples.
        samples: whether the objective uses rollouts.
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
        weights=2 * (dense + expert) + (2 * _linear_elements(model, layout, stage) if is_fp8 else 0),
        gradients=_FP32 * (dense + expert),
        optimizer=(_FP32 + _ADAM) * (dense / layout.num_replicas + expert / layout.num_expert_replicas),
        activations=activation_bytes(model, layout, stage, tokens, num_microbatches, is_fp8=is_fp8),
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
    """The number of elements in Megatron's buffers of parameters and gradients: outside experts, and of experts.

    Megatron pads: every parameter begins at a multiple of 64 elements, and every buffer ends at a multiple of 128 and of the
    number of ranks that share the optimizer's states (megatron.core.optimizer.param_layout). With --overlap-grad-reduce every
    bucket is padded too. This estimate ignores that.
    """
    dense = expert = 0
    for chunk in stage_chunks(model, layout, stage):
        dense += _padded(chunk.dense, layout.num_replicas)
        expert += _padded(chunk.expert, layout.num_expert_replicas)
    return dense, expert


def _padded(sizes: Counter[int], num_replicas: int) -> int:
    unit = math.lcm(num_replicas, 128)
    return -(-sum(-(-size // 64) * 64 * count for size, count in sizes.items()) // unit) * unit


def _linear_elements(model: Model, layout: Layout, stage: int) -> int:
    held = shards(model, layout.tp, layout.expert_tp).layers
    num_experts = model.shape.num_experts // layout.ep
    layers = (held[layer] for chunk in chunk_layers(model, layout, stage) for layer in chunk)
    return sum(layer.linear + sum(layer.expert) * num_experts for layer in layers)


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Elements that one layer keeps per token for its backward pass. An fp32 element counts as two BF16 elements."""

    norms: float
    """Inputs (the residual stream) and outputs of the two norms, but for an output that belongs to the MLP."""
    attention: float
    mlp: float
    """The MLP. Transformer Engine's first layer of a dense MLP computes the norm before it too, whose output counts here."""

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


def layer_activations(
    model: Model,
    *,
    has_experts: bool | None = None,
    is_delta: bool = False,
    has_te: bool = True,
    is_fp8: bool = False,
    element_bytes: int = 2,
) -> LayerActivations:
    """Counts the activations of one layer like Korthikanti et al. 2022 (arXiv 2205.05198, section 4).

    Their formula, 34 sbh + 5 as^2b bytes, holds for GPT-3's layer. The layers here differ: grouped keys and values, a gated
    MLP, no dropout, and fused attention, which keeps its output and one normaliser per head instead of the matrix of scores.
    The tests compare every term with the tensors that the layers' own code saves.

    Args:
        has_experts: whether the layer has experts; None: as the model's last layer.
        is_delta: whether the layer has a gated delta net in place of attention. Its count is calculated, not compared.
        has_te: whether the layers are Transformer Engine's fused layers. Plain layers also keep the unrotated queries, keys and
            values, the normalised input of each norm's scale, the tables of the rotary embedding, and both factors of the gated product.
        is_fp8: whether Transformer Engine's linear layers compute in FP8. They then keep their own inputs in one byte. Mixtures of
            experts are counted as in BF16.
        element_bytes: bytes of one activation.
    """
    s = model.shape
    norms = (4.0 if has_te else 6.0) * s.hidden_size
    has_experts = bool(s.num_experts) if has_experts is None else has_experts
    mlp = _mixture_activations(model, has_te, element_bytes) if has_experts else _gated(s.mlp_size, has_te)
    if has_te and not has_experts:
        norms, mlp = norms - s.hidden_size, mlp + s.hidden_size
        if is_fp8:
            norms -= s.hidden_size / 2
            mlp -= (s.hidden_size + s.mlp_size) / 2
    if (
        model.family.has_post_norms
    ):  # plain torch in Transformer Engine's layers too: they keep input and result in fp32
        kept = 2 * s.hidden_size * _FP32 / element_bytes
        norms, mlp = norms + kept, mlp + kept
    if is_delta:
        attention = _delta_activations(model, element_bytes)
    else:
        attention = _attention_activations(model, has_te, element_bytes)
    return LayerActivations(norms=norms, attention=attention, mlp=mlp)


def _attention_activations(model: Model, has_te: bool, element_bytes: int) -> float:
    s = model.shape
    if s.latent is not None:
        return _latent_activations(s.num_attention_heads, s.latent, _FP32 / element_bytes)
    q, kv = s.num_attention_heads * s.head_dim, s.num_query_groups * s.head_dim
    per_head = _FP32 / element_bytes
    # rotated queries and keys, values, and the output with its normalisers
    kept = (q + 2 * kv) + q + s.num_attention_heads * per_head
    if not has_te:
        kept += q + kv + 4 * s.head_dim * model.rotary_percent
    if s.has_qk_norm and has_te:
        kept += q + kv + (s.num_attention_heads + s.num_query_groups) * per_head
    elif s.has_qk_norm:
        kept += 2 * q + kv
    # the gate, and the output before it is multiplied by the gate
    return kept + (2 * q if s.delta is not None else 0)


def _delta_activations(model: Model, element_bytes: int) -> float:
    """Elements that a gated delta net keeps: inputs and outputs of projection, convolution, delta rule and gated norm."""
    delta = model.shape.delta
    assert delta is not None, "the model has gated delta nets"
    keys = delta.num_value_heads * delta.key_dim  # repeated for every value head
    projected = 2 * delta.keys + 2 * delta.values
    rule = 2 * keys + 2 * delta.values + 3 * delta.num_value_heads * _FP32 / element_bytes
    return projected + 2 * delta.keys + delta.values + rule + delta.values


def _latent_activations(heads: int, latent: LatentShape, fp32: float) -> float:
    """Elements that multi-latent attention keeps, without its input. An fp32 element counts ``fp32`` times.

    Its norms and its rotation are plain torch in Transformer Engine's layers too.
    """
    norms = ((latent.query_rank or 0) + latent.key_value_rank) * (fp32 + 2)
    tables = 4 * latent.rotary_dim  # of the rotary embedding
    return norms + tables + latent.rotary_dim + heads * (2 * latent.key_dim + 2 * latent.value_dim + fp32)


def _gated(size: int, has_te: bool) -> float:
    """Elements that a gated MLP of this inner size keeps, without its input."""
    return size * (3 if has_te else 5)


def _mixture_activations(model: Model, has_te: bool, element_bytes: int) -> float:
    s = model.shape
    # tokens as the experts receive them; plain layers also keep those that the experts return, and those restored in order
    received = s.hidden_size * (1 if has_te else 3)
    experts = model.top_k * (received + _gated(s.ffn_hidden_size, has_te))
    return experts + _gated(s.shared_ffn_hidden_size, has_te) + s.num_experts * 2 * _FP32 / element_bytes


def kept_elements(model: Model, layer: LayerActivations, recompute: Recompute) -> float:
    """Elements per token that a layer keeps for its backward pass with this recomputation."""
    return {
        "none": layer.total,
        "selective": layer.norms + layer.attention,
        "full": float(model.shape.hidden_size),
    }[recompute]


def activation_bytes(
    model: Model, layout: Layout, stage: int, tokens: float, num_microbatches: int, *, is_fp8: bool = False
) -> float:
    """Bytes that a stage keeps between forward and backward passes, plus the temporary memory of one layer's backward pass.

    Every layout with tp > 1 uses sequence parallelism, which splits all activations of a layer over the tensor-parallel ranks.
    The 1F1B schedule has pp - stage micro-batches in flight; the interleaved schedule has more, each with the activations of
    one model chunk (Narayanan et al. 2021, arXiv 2104.04473).
    """
    chunks = [
        [(layer in model.layers_with_experts, model.shape.delta_layers[layer]) for layer in layers]
        for layers in chunk_layers(model, layout, stage)
    ]
    kinds = {
        (has, is_delta): layer_activations(model, has_experts=has, is_delta=is_delta, is_fp8=is_fp8)
        for has, is_delta in set().union(*chunks)
    }
    kept = {kind: kept_elements(model, layer, layout.recompute) for kind, layer in kinds.items()}
    held = max(sum(kept[kind] for kind in layers) for layers in chunks)
    recomputes = layout.recompute != "none"
    working = max((layer.total - kept[kind]) * recomputes + layer.mlp for kind, layer in kinds.items())
    if layout.chunks > 1:
        ahead = (layout.pp - stage - 1) * 2 + (layout.chunks - 1) * layout.pp + 1
        under_way = min(num_microbatches * layout.chunks, ahead)
    else:
        under_way = min(num_microbatches, layout.pp - stage)
    return 2 * tokens / layout.tp * (held * under_way + working)


def logprob_chunk(model: Model, layout: Layout, config: CapacityConfig, tokens: float) -> float:
    """Number of tokens whose logits a rank holds at a time; ``tokens`` if none is computed twice."""
    chunk = config.logprob_chunk_tokens
    if chunk is None:
        chunk = fused_chunk_tokens(math.ceil(tokens), 2 * padded_vocabulary(model, layout.tp) // layout.tp)
    return min(chunk or tokens, tokens)


def _logits_bytes(model: Model, layout: Layout, config: CapacityConfig, tokens: float) -> float:
    """Logits in BF16 of one chunk of tokens. Their gradient is written in place, so it is not counted again."""
    chunk = logprob_chunk(model, layout, config, tokens)
    vocabulary = padded_vocabulary(model, layout.tp) / layout.tp
    copies = 2 if config.needs.needs_reference_distribution() else 1
    hidden = 2 * 2 * tokens * model.shape.hidden_size * (1 + 1 / layout.tp)
    return copies * chunk * vocabulary * 2 + hidden


def _reference_bytes(model: Model, layout: Layout, tokens: float, num_microbatches: int) -> float:
    """The reference's output projection, and its hidden states for all micro-batches of a step."""
    hidden = tokens * model.shape.hidden_size / layout.tp * num_microbatches
    return 2 * (shards(model, layout.tp, layout.expert_tp).embedding + hidden)


def sync_bytes(model: Model, layout: Layout, stage: int, bucket_bytes: int) -> float:
    """Peak memory of a weight sync on the sending rank, in BF16: the bound that sync.buckets.MemoryPlan keeps."""
    s = model.stored
    gate_up = 2 * max(s.ffn_hidden_size, s.dense_ffn_hidden_size, s.shared_ffn_hidden_size) * s.hidden_size
    qkv = _largest_projection(s)
    if s.delta is not None:
        gates = s.num_attention_heads * s.head_dim * s.hidden_size
        qkv = max(qkv + gates, 2 * (s.delta.keys + s.delta.values + s.delta.num_value_heads) * s.hidden_size)
    ends = s.vocab_size * s.hidden_size if stage in (0, layout.pp - 1) else 0
    largest = 2 * max(gate_up, qkv, ends)
    gathered = largest if layout.tp > 1 else 0
    return max(2 * bucket_bytes - gathered, largest) + gathered


def _largest_projection(s: ModelShape) -> int:
    """Elements of the largest parameter of a layer's attention."""
    if s.latent is None:
        return (s.num_attention_heads + 2 * s.num_query_groups) * s.head_dim * s.hidden_size
    query = s.latent.key_dim * (s.latent.query_rank or s.hidden_size)
    key_value = (s.latent.plain_dim + s.latent.value_dim) * s.latent.key_value_rank
    return s.num_attention_heads * max(query, key_value, s.latent.value_dim * s.hidden_size)


def _kv_cache_bytes(
    model: Model, layout: Layout, config: CapacityConfig, assumed: AssumptionConfig, is_last: bool
) -> float:
    """The key-value cache of all sequences that the trainer decodes at once, and the logits while it draws a token."""
    length = min(config.seq_length, assumed.prompt_tokens + config.max_new_tokens)
    row = (cached_token_bytes(model, layout.tp) * length + state_bytes(model, layout.tp)) // layout.pp
    logits = _LOGIT_BYTES * model.shape.vocab_size if is_last else 0
    return config.rollout_batch_size * (row + logits)


def cached_token_bytes(model: Model, tp: int) -> int:
    """Bytes of one token's keys and values in BF16, summed over the stages."""
    s = model.shape
    return 2 * s.cached_elements(tp) * (s.num_layers - sum(s.delta_layers))


def state_bytes(model: Model, tp: int) -> int:
    """Bytes of one sequence's states of gated delta nets in fp32, summed over the stages. They do not grow with the sequence."""
    delta = model.shape.delta
    return 0 if delta is None else _FP32 * delta.values // tp * delta.key_dim * sum(delta.is_delta)
