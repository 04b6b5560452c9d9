"""Samples responses from the trainer's own weights, with a KV cache.

Supports tensor, context and (interleaved) pipeline parallelism, on CPUs and GPUs. Requests are divided among the data-
and context-parallel replicas, because each of these holds a complete copy of the model. Within a replica decoding.py
samples them.
"""

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_rasft.generation.decoding import KEY_BUCKET, Decoder, DecoderModel
from megatron_rasft.generation.delta_cache import CachedDeltaNet
from megatron_rasft.generation.kv_cache import (
    CachedAttention,
    Decode,
    KeyValueCache,
    RotaryAtPositions,
    rotary_frequencies,
)
from megatron_rasft.model.attention import SdpaCoreAttention
from megatron_rasft.monitoring import live
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.ranks import gather_to_rank_zero, on_rank_zero
from megatron_rasft.types import FinishReason, Request, Response, SamplingParams

_Packed = tuple[array, array, FinishReason]
"""A response in the form in which it is sent to rank 0: int32 ids, fp64 log-probabilities (12 bytes per token), finish reason."""

_CPU_ROWS = 64
"""Number of sequences decoded at once on a CPU. A larger number is not faster there."""

_MOST_ROWS = 512
"""Upper limit of the number of rows that is derived from free memory."""

_MEMORY_SHARE = 0.8
"""Share of the free memory that rows may take. Prefills and fragmentation need the rest."""

_LOGIT_BYTES = 48
"""Peak memory per row and vocabulary entry while a token is drawn: BF16 and FP32 logits and several FP64 tensors of
probabilities."""

STEPS_PER_READ = {"cuda": 16}
"""Device type -> decode steps between two reads of the device by the host; 1 for other types.

A read makes the host wait for the GPU. Fewer reads keep the GPU busier, but rows that have ended in the meantime are
computed for nothing until the next read. On a CPU a read costs nothing.
"""


@contextlib.contextmanager
def generation_mode(chunks: Sequence[torch.nn.Module], cache: KeyValueCache) -> Iterator[None]:
    """Makes unwrapped GPTModel chunks read and write ``cache``, and restores them at the end.

    Switches off dropout, sequence parallelism and FP8: a decode step has one token per row, too few to split over
    ranks or to fill FP8's multiples of 16. Replaces core attention and rotary embedding with the modules of
    kv_cache.py, and frees their keys and values at the end.
    """
    with contextlib.ExitStack() as undo, torch.no_grad():
        undo.callback(cache.free)

        def change(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for chunk in chunks:
            undo.callback(chunk.train, chunk.training)
            chunk.eval()
            config: Any = chunk.config
            if config.sequence_parallel:
                undo.callback(set_model_to_sequence_parallel, chunk, True)
                set_model_to_sequence_parallel(chunk, False)
            for name in ("fp8", "fp4"):
                if getattr(config, name, None):
                    change(config, name, None)
            for owner in rotary_owners(chunk):
                change(owner, "rotary_pos_emb", RotaryAtPositions(owner.rotary_pos_emb, cache))
            for module in self_attentions(chunk):
                plain = module.core_attention
                # CachedAttention calls SdpaCoreAttention.attend, which Transformer Engine's attention lacks.
                if not isinstance(plain, SdpaCoreAttention):
                    plain = SdpaCoreAttention(
                        config,
                        module.layer_number,
                        attention_dropout=0.0,
                        softmax_scale=getattr(module, "softmax_scale", config.softmax_scale),
                        pg_collection=module.pg_collection,
                    )
                    plain.softmax_offset = getattr(module.core_attention, "softmax_offset", None)
                change(module, "core_attention", CachedAttention(plain, cache))
            for layer in delta_layers(chunk):
                change(layer, "self_attention", CachedDeltaNet(layer.self_attention, cache))
        yield


def delta_layers(chunk: torch.nn.Module) -> list[Any]:
    """Returns the layers of a chunk that have a gated delta net in place of attention."""
    return [m for m in chunk.modules() if isinstance(getattr(m, "self_attention", None), GatedDeltaNet)]


def self_attentions(chunk: torch.nn.Module) -> list[Any]:
    """Returns the attention layers of a chunk."""
    return [module for module in chunk.modules() if isinstance(module, SelfAttention | MLASelfAttention)]


def rotary_owners(chunk: Any) -> list[Any]:
    """Returns the modules that have a rotary embedding: the chunk, or each layer with multi-latent attention."""
    return [chunk] if hasattr(chunk, "rotary_pos_emb") else self_attentions(chunk)


def _cached_elements(attention: Any) -> int:
    """Elements of a token's key and value on this rank."""
    if isinstance(attention, MLASelfAttention):
        return attention.num_attention_heads_per_partition * (
            attention.q_head_dim + attention.config.v_head_dim
        )
    return 2 * attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head


def rows_that_fit(free_bytes: float, row_bytes: float) -> int:
    """The number of rows that fit into the free memory, as a power of two from 1 to 512.

    Free memory varies slightly between runs. A power of two makes the number of rows, and with it the kernels' shapes,
    nearly always the same.
    """
    num = 1
    while num < _MOST_ROWS and 2 * num * row_bytes <= free_bytes:
        num *= 2
    return num


class PolicySampler:
    """Samples responses from the weights of a Megatron model.

    Args:
        chunks: unwrapped GPTModel chunks of this rank, one per virtual pipeline stage.
        vocab_size: size of the tokenizer's vocabulary. The model's padding entries beyond it are never sampled.
    """

    def __init__(self, chunks: Sequence[Any], vocab_size: int) -> None:
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.config = chunks[0].config
        self.device = next(chunks[0].parameters()).device
        self.steps_per_read = STEPS_PER_READ.get(self.device.type, 1)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:
        """Samples every request. A collective of the whole world.

        Replicas take different times, so they communicate only at the end, through ``ranks.patient_group``.

        Args:
            requests: the same on every rank.
            should_stop: a collective of one replica's ranks, called about every 32 tokens.

        Returns:
            On rank 0 each request's responses, in the order of its seeds; [] on the other ranks.

        Raises:
            Stopped: ``should_stop`` returned True on a replica. Raised on every rank; all responses are discarded.
        """
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        num_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        # Dealing requests in turn, longest first, gives replicas similar loads, and prompts of one prefill similar lengths.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        mine = order[replica::num_replicas]
        is_sender = (
            parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage()
        )
        done: dict[int, list[_Packed]] = {}
        # A replica that stops still takes part in the gather. Rank 0 notices that its responses are missing.
        with contextlib.suppress(Stopped):
            groups = self._sample([requests[i] for i in mine], params, should_stop)
            if is_sender:
                done.update((i, [_pack(r) for r in group]) for i, group in zip(mine, groups, strict=True))
        merged: dict[int, list[Response]] = {}
        for part in gather_to_rank_zero(done or None):
            merged.update((i, [_unpack(p) for p in group]) for i, group in part.items())
        if not on_rank_zero(lambda: len(merged) == len(requests)):
            raise Stopped
        return [merged[i] for i in range(len(requests))] if dist.get_rank() == 0 else []

    def _sample(
        self, requests: list[Request], params: SamplingParams, should_stop: Callable[[], bool]
    ) -> list[list[Response]]:
        """Samples the requests of this replica, given with the longest prompt first."""
        if not requests:
            return []
        longest = max(len(r.prompt_ids) + params.max_response_tokens(len(r.prompt_ids)) for r in requests)
        length = -(-longest // KEY_BUCKET) * KEY_BUCKET
        num_rows = min(
            params.max_batch_size or self.num_rows_that_fit(length), sum(len(r.seeds) for r in requests)
        )
        cache = KeyValueCache(num_rows, length, is_fitted=self.device.type == "cpu")
        model = self.decoder_model(cache)
        decoder = Decoder(model, cache, requests, params, should_stop)
        total = sum(len(r.seeds) for r in requests)
        shown = live.work(
            "sampling", _share_of_rollouts(), total, lambda: decoder.num_done, lambda: decoder.num_tokens
        )
        with generation_mode(self.chunks, cache), shown:
            return decoder.run()

    def decoder_model(self, cache: KeyValueCache) -> DecoderModel:
        """Returns the model as ``Decoder`` uses it. Call this before ``generation_mode``, which replaces the rotary embedding."""
        group = parallel_state.get_pipeline_model_parallel_group()

        def broadcast_from_last_stage(tensor: Tensor) -> Tensor:
            if group.size() > 1:
                dist.broadcast(tensor, dist.get_process_group_ranks(group)[-1], group=group)
            return tensor

        def all_agree(agrees: bool) -> bool:
            return self._min_over_ranks(int(agrees)) == 1

        # CUDA graphs cannot capture work that the host decides on: the sends between pipeline stages, and the sizes of
        # the all-to-all of a mixture of experts.
        is_static = group.size() == 1 and not self.config.num_moe_experts
        return DecoderModel(
            forward=partial(self._forward, cache),
            frequencies=rotary_frequencies(rotary_owners(self.chunks[0])[0].rotary_pos_emb, cache.length),
            broadcast_from_last_stage=broadcast_from_last_stage,
            all_agree=all_agree,
            dtype=self.config.params_dtype,
            vocab_size=self.vocab_size,
            has_graphs=self.device.type == "cuda" and is_static,
            steps_per_read=self.steps_per_read,
        )

    def num_rows_that_fit(self, length: int) -> int:
        """The number of rows of ``length`` tokens that fit into the free memory of every rank of the replica."""
        if self.device.type != "cuda":
            return _CPU_ROWS
        free, _ = torch.cuda.mem_get_info(self.device)
        # The device counts the caching allocator's reserve as used, but new tensors can be placed in it.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return self._min_over_ranks(rows_that_fit(_MEMORY_SHARE * free, self.row_bytes(length)))

    def _min_over_ranks(self, number: int) -> int:
        """The smallest ``number`` among the replica's ranks; one all-reduce over them."""
        least = torch.tensor(number, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, parallel_state.get_model_parallel_group())
        return int(least)

    def row_bytes(self, length: int) -> int:
        """Memory of one row on this rank: keys and values, and on the last pipeline stage logits."""
        cached = sum(_cached_elements(module) for chunk in self.chunks for module in self_attentions(chunk))
        nets = [layer.self_attention for chunk in self.chunks for layer in delta_layers(chunk)]
        states = sum(n.num_v_heads_local_tp * n.key_head_dim * n.value_head_dim for n in nets)
        has_logits = any(chunk.post_process for chunk in self.chunks)
        return (
            self.config.params_dtype.itemsize * cached * length
            + 4 * states
            + has_logits * _LOGIT_BYTES * self.vocab_size
        )

    def _forward(self, cache: KeyValueCache, tokens: Tensor) -> Tensor | None:
        """Runs tokens [b, s] through all pipeline stages, with blocking sends and receives between them.

        Returns:
            Logits [s, v] fp32 on the last stage after a Decode; None after a Prefill and on the other stages.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        stage, num_stages = group.rank(), group.size()
        ranks = dist.get_process_group_ranks(group)
        result: Tensor | None = None
        for place, chunk in enumerate(self.chunks):
            is_first = stage == 0 and place == 0
            is_last = stage == num_stages - 1 and place == len(self.chunks) - 1
            if num_stages > 1 and not is_first:
                shape = (tokens.shape[1], tokens.shape[0], self.config.hidden_size)
                hidden = torch.empty(shape, dtype=self.config.params_dtype, device=self.device)
                dist.recv(hidden, ranks[(stage - 1) % num_stages], group=group)
                chunk.set_input_tensor(hidden)
            # No position ids: with rotary embeddings GPTModel reads positions from its rotary_pos_emb alone.
            out = chunk(
                tokens,
                None,
                None,
                runtime_gather_output=True,
                output_processor=_decoded_logits,
                output_processor_context=cache,
            )
            if is_last and out is not None:
                result = out[:, : self.vocab_size].float()
            elif not is_last and num_stages > 1:
                dist.send(out.contiguous(), ranks[(stage + 1) % num_stages], group=group)
        for chunk in self.chunks:
            chunk.set_input_tensor(None)  # the decoder would otherwise keep the last hidden states in memory
        return result


def _share_of_rollouts() -> str:
    num_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return "rollouts" if num_replicas == 1 else f"rollouts of the first of {num_replicas} replicas"


def _decoded_logits(
    *,
    hidden_states: Tensor,
    output_layer: Callable,
    output_weight: Tensor | None,
    context: Any,
    **unused: Any,
) -> Tensor | None:
    """Serves as output processor of GPTModel: hidden states [n, 1, h] -> logits [n, v], gathered over tensor-parallel ranks.

    Returns None after a Prefill, whose logits are not needed.
    """
    if not isinstance(context.step, Decode):
        return None
    logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=False)
    return gather_from_tensor_model_parallel_region(logits)[:, 0]


def _pack(response: Response) -> _Packed:
    return array("i", response.token_ids), array("d", response.logprobs), response.finish_reason


def _unpack(packed: _Packed) -> Response:
    ids, logprobs, reason = packed
    return Response(token_ids=ids.tolist(), logprobs=logprobs.tolist(), finish_reason=reason)
