"""Samples responses from the training model itself, with its live weights and a KV cache.

Works under tensor, pipeline (interleaved too) and context parallelism, on a CPU and on a GPU. The
requests are spread over the data- and context-parallel replicas; inside a replica a batch is
prefilled once per prompt, its cache is repeated for the prompt's samples, and rows that have ended
leave the batch.
"""

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_rasft.training.attention import SdpaCoreAttention
from megatron_rasft.training.ranks import gather_to_rank_zero, on_rank_zero
from megatron_rasft.training.stopping import Stopped
from megatron_rasft.types import FinishReason, Request, Response, SamplingParams

_NUCLEUS_CANDIDATES = 256
"""Top tokens looked at first for top-p; the whole vocabulary is sorted only where they do not reach it."""

_Packed = tuple[array, array, FinishReason]
"""A response in 12 bytes a token: int32 ids, fp64 log-probabilities, and why it ended."""
_TOKENS_PER_LOOK = 32
"""Tokens that a batch grows by between two looks at whether the run is to stop."""


@contextlib.contextmanager
def generation_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Make unwrapped GPTModel chunks fit for decoding one token at a time, and restore them after.

    Switches off sequence parallelism, FP8 and the context-parallel cut of the rotary embedding, and puts
    plain attention, which takes the mask of left-padded prompts, in place of the core attention.
    """
    with contextlib.ExitStack() as undo, torch.no_grad():
        for chunk in chunks:
            undo.callback(chunk.train, chunk.training)
            chunk.eval()
            config: Any = chunk.config
            if config.sequence_parallel:
                undo.callback(set_model_to_sequence_parallel, chunk, True)
                set_model_to_sequence_parallel(chunk, False)
            for name in ("fp8", "fp4"):
                if getattr(config, name, None):
                    undo.callback(setattr, config, name, getattr(config, name))
                    setattr(config, name, None)
            rotary: Any = getattr(chunk, "rotary_pos_emb", None)
            if getattr(rotary, "cp_group", None) is not None:
                undo.callback(setattr, rotary, "cp_group", rotary.cp_group)
                rotary.cp_group = None
            for module in chunk.modules():
                if isinstance(module, SelfAttention) and not isinstance(
                    module.core_attention, SdpaCoreAttention
                ):
                    undo.callback(setattr, module, "core_attention", module.core_attention)
                    module.core_attention = SdpaCoreAttention(
                        config, module.layer_number, attention_dropout=0.0, pg_collection=module.pg_collection
                    )
        yield


class LiveModel:
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

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:
        """Sample every request; a collective of the whole world.

        Replicas sample at their own pace and meet on the patient group of ranks.py alone.

        Args:
            should_stop: a collective of one replica's ranks, asked now and then while a batch is sampled.

        Returns:
            On rank 0, for each request its responses in the order of its seeds; [] on the others.

        Raises:
            Stopped: a replica was to stop; what is sampled by then is lost. Raised on every rank.
        """
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        num_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        # Longest first, dealt in turn: the replicas get alike loads, and a batch pads little.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        mine = order[replica::num_replicas]
        speaks = (
            parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage()
        )
        done: dict[int, list[_Packed]] = {}
        # One that stops still takes part in the gather, where rank 0 learns of it by what is missing.
        with generation_mode(self.chunks), contextlib.suppress(Stopped):
            for batch in _batches(mine, requests, params.max_batch_size):
                groups = self._generate_batch([requests[i] for i in batch], params, should_stop)
                if speaks:
                    done.update(
                        (i, [_pack(r) for r in group]) for i, group in zip(batch, groups, strict=True)
                    )
        merged: dict[int, list[Response]] = {}
        for part in gather_to_rank_zero(done or None):
            merged.update((i, [_unpack(p) for p in group]) for i, group in part.items())
        if not on_rank_zero(lambda: len(merged) == len(requests)):
            raise Stopped
        return [merged[i] for i in range(len(requests))] if dist.get_rank() == 0 else []

    def _generate_batch(
        self, requests: list[Request], params: SamplingParams, should_stop: Callable[[], bool]
    ) -> list[list[Response]]:
        width = max(len(r.prompt_ids) for r in requests)
        pads = torch.tensor([width - len(r.prompt_ids) for r in requests], device=self.device)
        prompts = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests], device=self.device
        )
        rooms = [params.room(len(r.prompt_ids)) for r in requests for _ in r.seeds]
        longest = max(rooms)
        context = StaticInferenceContext(len(requests), width + longest)
        columns = torch.arange(width, device=self.device)
        causal = columns[None, :] <= columns[:, None]
        # A pad attends to itself alone: a row without any key would be NaN and poison its cache.
        seen = causal & (columns[None, None, :] >= pads[:, None, None]) | torch.eye(
            width, dtype=torch.bool, device=self.device
        )
        logits = self._forward(prompts, columns, seen[:, None], context)

        rows = torch.tensor([i for i, r in enumerate(requests) for _ in r.seeds], device=self.device)
        uniforms = torch.stack(
            [
                torch.rand(
                    params.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
                for r in requests
                for seed in r.seeds
            ]
        ).to(self.device)
        _select_rows(context, rows)
        context.enable_decode_mode()
        pads = pads[rows]
        logits = None if logits is None else logits[rows]
        total = len(rows)
        history = prompts[rows] if params.repetition_penalty != 1.0 else None
        alive = torch.arange(total, device=self.device)
        is_done = torch.zeros(total, dtype=torch.bool, device=self.device)
        tokens: list[list[int]] = [[] for _ in range(total)]
        logprobs: list[list[float]] = [[] for _ in range(total)]
        finished = [False] * total
        stops = torch.tensor(sorted(params.stop_ids) or [-1], device=self.device)
        ends = torch.tensor(rooms, device=self.device)
        for step in range(longest):
            if step % _TOKENS_PER_LOOK == 0 and should_stop():
                raise Stopped
            chosen, chosen_logprobs = self._sample(logits, uniforms[alive, step], params, history, pads)
            for row, token, logprob, over in zip(
                alive.tolist(), chosen.tolist(), chosen_logprobs.tolist(), is_done.tolist(), strict=True
            ):
                if not over:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    finished[row] = token in params.stop_ids
            is_done = is_done | torch.isin(chosen, stops) | (ends[alive] == step + 1)
            if bool(is_done.all()):
                break
            if int(is_done.sum()) * 4 >= len(is_done):
                keep = torch.nonzero(~is_done).flatten()
                _select_rows(context, keep)
                alive, pads, chosen, is_done = alive[keep], pads[keep], chosen[keep], is_done[keep]
                history = None if history is None else history[keep]
            if history is not None:
                history = torch.cat([history, chosen[:, None]], dim=1)
            length = context.sequence_len_offset + 1
            keys = torch.arange(length, device=self.device)
            mask = (keys[None, :] >= pads[:, None])[:, None, None]
            logits = self._forward(
                chosen[:, None], torch.tensor([length - 1], device=self.device), mask, context
            )
        out, row = [], 0
        for request in requests:
            group = []
            for _ in request.seeds:
                group.append(
                    Response(
                        token_ids=tokens[row],
                        logprobs=logprobs[row],
                        finish_reason="stop" if finished[row] else "length",
                    )
                )
                row += 1
            out.append(group)
        return out

    def _forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, context: StaticInferenceContext
    ) -> Tensor | None:
        """Run [b, s] tokens through all stages; the last one returns logits [b, v] fp32, others None."""
        group = parallel_state.get_pipeline_model_parallel_group()
        stage, num_stages = group.rank(), group.size()
        ranks = dist.get_process_group_ranks(group)
        context.max_batch_size = tokens.shape[0]
        result: Tensor | None = None
        for place, chunk in enumerate(self.chunks):
            is_first = stage == 0 and place == 0
            is_last = stage == num_stages - 1 and place == len(self.chunks) - 1
            if num_stages > 1 and not is_first:
                shape = (tokens.shape[1], tokens.shape[0], self.config.hidden_size)
                hidden = torch.empty(shape, dtype=self.config.params_dtype, device=self.device)
                dist.recv(hidden, ranks[(stage - 1) % num_stages], group=group)
                chunk.set_input_tensor(hidden)
            out = chunk(
                tokens,
                positions.expand(tokens.shape[0], -1),
                mask,
                inference_context=context,
                runtime_gather_output=True,
                output_processor=_last_position_logits,
            )
            if is_last:
                result = out[:, : self.vocab_size].float()
            elif num_stages > 1:
                dist.send(out.contiguous(), ranks[(stage + 1) % num_stages], group=group)
        for chunk in self.chunks:
            chunk.set_input_tensor(None)
        context.sequence_len_offset += tokens.shape[1]
        return result

    def _sample(
        self,
        logits: Tensor | None,
        uniforms: Tensor,
        params: SamplingParams,
        history: Tensor | None,
        pads: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Draw a token for each row on the last stage and tell every stage; [b] int64 and [b] fp64."""
        drawn = torch.empty(2, len(uniforms), dtype=torch.float64, device=self.device)
        if logits is not None:
            if history is not None:
                logits = _penalised(logits, history, pads, params.repetition_penalty)
            token, logprob = draw(logits, uniforms, params.temperature, params.top_p)
            drawn[0], drawn[1] = token.double(), logprob.double()
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(drawn, dist.get_process_group_ranks(group)[-1], group=group)
        return drawn[0].long(), drawn[1]


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample by inversion: the smallest set of most likely tokens whose mass reaches top_p, then u.

    Args:
        logits: [b, v] fp32.
        uniforms: [b] fp64 in [0, 1).
        temperature: > 0; 0 takes the most likely token.
        top_p: in (0, 1].

    Returns:
        tokens [b] int64, and their log-probabilities [b] fp32 under softmax(logits / temperature).
    """
    if temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None])[:, 0]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.double().exp()
    if top_p >= 1.0:
        ids, ordered = None, probs
    else:
        num = min(_NUCLEUS_CANDIDATES, probs.shape[1])
        ordered, ids = torch.topk(probs, num, dim=-1)
        if bool((ordered.sum(-1) < top_p).any()):
            ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    cumulative = ordered.cumsum(-1)
    place = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    # Rounding can put u on the total: step back to the last token with any mass.
    last = (ordered > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    token = place if ids is None else ids.gather(1, place)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def _last_position_logits(
    *, hidden_states: Tensor, output_layer: Callable, output_weight: Tensor | None, **unused: Any
) -> Tensor:
    """[s, b, h] -> [b, v] at the last position, gathered over the tensor-parallel group."""
    logits, _ = output_layer(hidden_states[-1:], weight=output_weight, runtime_gather_output=False)
    return gather_from_tensor_model_parallel_region(logits)[0]


def _penalised(logits: Tensor, history: Tensor, pads: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): positive logits of seen tokens / penalty, negative * penalty."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    is_real = torch.arange(history.shape[1], device=history.device)[None, :] >= pads[:, None]
    rows = torch.arange(history.shape[0], device=history.device)[:, None].expand_as(history)
    seen[rows[is_real], history[is_real]] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _select_rows(context: StaticInferenceContext, rows: Tensor) -> None:
    """Keep (or repeat) these rows of every layer's cached keys and values, [s, b, n, d] each."""
    for layer, (keys, values) in context.key_value_memory_dict.items():
        context.key_value_memory_dict[layer] = (keys.index_select(1, rows), values.index_select(1, rows))


def _pack(response: Response) -> _Packed:
    return array("i", response.token_ids), array("d", response.logprobs), response.finish_reason


def _unpack(packed: _Packed) -> Response:
    ids, logprobs, reason = packed
    return Response(token_ids=ids.tolist(), logprobs=logprobs.tolist(), finish_reason=reason)


def _batches(order: list[int], requests: Sequence[Request], max_batch_size: int) -> Iterator[list[int]]:
    """Cut requests, in this order, into runs whose samples fit max_batch_size (one request at least)."""
    batch: list[int] = []
    size = 0
    for index in order:
        num = len(requests[index].seeds)
        if batch and size + num > max_batch_size:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += num
    if batch:
        yield batch
