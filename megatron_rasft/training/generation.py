"""Samples responses from the training model itself, with its live weights and a KV cache.

Works under tensor, pipeline (interleaved too) and context parallelism, on a CPU and on a GPU. The
requests are spread over the data- and context-parallel replicas; inside a replica decoding.py samples them.
"""

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_rasft.ranks import gather_to_rank_zero, on_rank_zero
from megatron_rasft.training.attention import SdpaCoreAttention
from megatron_rasft.training.decoding import KEY_BUCKET, Decoder, Engine
from megatron_rasft.training.kv_cache import CachedAttention, Decode, KeyValueCache, RotaryAtPositions
from megatron_rasft.training.stopping import Stopped
from megatron_rasft.types import FinishReason, Request, Response, SamplingParams

_Packed = tuple[array, array, FinishReason]
"""A response in 12 bytes a token: int32 ids, fp64 log-probabilities, and why it ended."""

_CPU_ROWS = 64
"""Rows of a CPU, where more are not faster."""

_MOST_ROWS = 512
"""Most rows that are chosen from free memory."""

_MEMORY_SHARE = 0.8
"""Share of the free memory that the rows are given; the rest is for prefills and fragmentation."""

_LOGIT_BYTES = 48
"""Memory per row and vocabulary entry while a token is drawn: the logits in BF16 and FP32, probabilities in FP64."""

STEPS_PER_LOOK = {"cuda": 16}
"""Tokens between two reads of the device. More keep it busier, and compute more tokens after a row's last one. A CPU
waits for nothing, so it looks at each token."""


@contextlib.contextmanager
def generation_mode(chunks: Sequence[torch.nn.Module], cache: KeyValueCache) -> Iterator[None]:
    """Make unwrapped GPTModel chunks read and write ``cache``, and restore them after.

    Switches off sequence parallelism and FP8. Replaces the core attention and the rotary embedding with the modules
    of kv_cache.py, whose keys and values are freed at the end.
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
            change(chunk, "rotary_pos_emb", RotaryAtPositions(cache))
            for module in self_attentions(chunk):
                plain = module.core_attention
                if not isinstance(plain, SdpaCoreAttention):
                    plain = SdpaCoreAttention(
                        config,
                        module.layer_number,
                        attention_dropout=0.0,
                        softmax_scale=config.softmax_scale,
                        pg_collection=module.pg_collection,
                    )
                change(module, "core_attention", CachedAttention(plain, cache))
        yield


def self_attentions(chunk: torch.nn.Module) -> list[Any]:
    """The attention layers of a chunk."""
    return [module for module in chunk.modules() if isinstance(module, SelfAttention)]


def rows_that_fit(free_bytes: float, row_bytes: float) -> int:
    """A power of two, at most 512 and at least 1: free memory differs a little from run to run, the rows then seldom do."""
    num = 1
    while num < _MOST_ROWS and 2 * num * row_bytes <= free_bytes:
        num *= 2
    return num


class PolicySampler:
    """The training model as a rollout engine.

    Args:
        chunks: unwrapped GPTModel chunks of this rank, one per virtual pipeline stage.
        vocab_size: true vocabulary; padded entries are never sampled.
    """

    def __init__(self, chunks: Sequence[Any], vocab_size: int) -> None:
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.config = chunks[0].config
        self.device = next(chunks[0].parameters()).device
        self.steps_per_look = STEPS_PER_LOOK.get(self.device.type, 1)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:
        """Sample every request; a collective of the whole world.

        Replicas sample at their own pace and meet on the patient group of ranks.py alone.

        Args:
            should_stop: a collective of one replica's ranks, asked now and then.

        Returns:
            On rank 0, for each request its responses in the order of its seeds; [] on the others.

        Raises:
            Stopped: a replica was to stop; what is sampled by then is lost. Raised on every rank.
        """
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        num_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        # Longest first, dealt in turn: the replicas get alike loads, and a prefill pads little.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        mine = order[replica::num_replicas]
        speaks = (
            parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage()
        )
        done: dict[int, list[_Packed]] = {}
        # One that stops still takes part in the gather, where rank 0 learns of it by what is missing.
        with contextlib.suppress(Stopped):
            groups = self._sample([requests[i] for i in mine], params, should_stop)
            if speaks:
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
        """Sample this replica's requests, longest prompt first."""
        if not requests:
            return []
        longest = max(len(r.prompt_ids) + params.room(len(r.prompt_ids)) for r in requests)
        length = -(-longest // KEY_BUCKET) * KEY_BUCKET
        num_rows = min(
            params.max_batch_size or self.num_rows_that_fit(length), sum(len(r.seeds) for r in requests)
        )
        cache = KeyValueCache(num_rows, length)
        engine = self.engine(cache)
        with generation_mode(self.chunks, cache):
            return Decoder(engine, cache, requests, params, should_stop).run()

    def engine(self, cache: KeyValueCache) -> Engine:
        """This model for the decoder; made outside of ``generation_mode``."""
        group = parallel_state.get_pipeline_model_parallel_group()

        def share(tensor: Tensor) -> Tensor:
            if group.size() > 1:
                dist.broadcast(tensor, dist.get_process_group_ranks(group)[-1], group=group)
            return tensor

        def all_agree(says_so: bool) -> bool:
            return self._least(int(says_so)) == 1

        # A mixture's token counts and a stage's sends are known to the host only.
        is_static = group.size() == 1 and not self.config.num_moe_experts
        return Engine(
            forward=partial(self._forward, cache),
            # get_emb returns the uncut frequencies of every position and, unlike forward, caches nothing.
            frequencies=self.chunks[0].rotary_pos_emb.get_emb(cache.length),
            share=share,
            all_agree=all_agree,
            dtype=self.config.params_dtype,
            vocab_size=self.vocab_size,
            has_graphs=self.device.type == "cuda" and is_static,
            steps_per_look=self.steps_per_look,
        )

    def num_rows_that_fit(self, length: int) -> int:
        """Rows of ``length`` tokens for the memory that is free on all ranks of the replica."""
        if self.device.type != "cuda":
            return _CPU_ROWS
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return self._least(rows_that_fit(_MEMORY_SHARE * free, self.row_bytes(length)))

    def _least(self, number: int) -> int:
        """The smallest number of the replica's ranks."""
        least = torch.tensor(number, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, parallel_state.get_model_parallel_group())
        return int(least)

    def row_bytes(self, length: int) -> int:
        """Memory of one row on this rank: its keys and values, and its logits on the last pipeline stage."""
        head_bytes = sum(
            module.num_query_groups_per_partition * module.hidden_size_per_attention_head
            for chunk in self.chunks
            for module in self_attentions(chunk)
        )
        has_logits = any(chunk.post_process for chunk in self.chunks)
        return (
            2 * self.config.params_dtype.itemsize * head_bytes * length
            + has_logits * _LOGIT_BYTES * self.vocab_size
        )

    def _forward(self, cache: KeyValueCache, tokens: Tensor) -> Tensor | None:
        """Run [b, s] tokens through all stages; after a Decode the last one returns logits [s, v] fp32, others None."""
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
            # Positions reach the model through the rotary frequencies alone.
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
            chunk.set_input_tensor(None)
        return result


def _decoded_logits(
    *,
    hidden_states: Tensor,
    output_layer: Callable,
    output_weight: Tensor | None,
    context: Any,
    **unused: Any,
) -> Tensor | None:
    """[n, 1, h] -> [n, v] gathered over the tensor-parallel group; None after a prefill, of which nothing is sampled."""
    if not isinstance(context.step, Decode):
        return None
    logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=False)
    return gather_from_tensor_model_parallel_region(logits)[:, 0]


def _pack(response: Response) -> _Packed:
    return array("i", response.token_ids), array("d", response.logprobs), response.finish_reason


def _unpack(packed: _Packed) -> Response:
    ids, logprobs, reason = packed
    return Response(token_ids=ids.tolist(), logprobs=logprobs.tolist(), finish_reason=reason)
