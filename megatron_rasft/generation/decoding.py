"""Samples many requests in a fixed number of rows of a batch. A row whose response ends takes the next waiting sample.

The state of the rows is on the device. The host reads it once every few tokens, collects the responses that have ended,
refills their rows, and launches the next tokens without another read.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from megatron_rasft.generation.drawing import apply_repetition_penalty, draw
from megatron_rasft.generation.kv_cache import Decode, KeyValueCache, Prefill
from megatron_rasft.generation.step_graphs import StepGraphs
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.types import Request, Response, SamplingParams

KEY_BUCKET = 128
"""With CUDA graphs the number of keys that attention reads is a multiple of this. Each number needs its own graph, so there should be few."""

PLAIN_KEY_BUCKET = 16
"""The same without CUDA graphs, where another number costs nothing and each key does."""

NUCLEUS_CANDIDATES = 4096
"""How many of the most likely tokens are sorted for top-p sampling. If the nucleus of a row has more tokens, the step is repeated
with eight times as many candidates, which later steps keep."""

_TOKENS_PER_STOP = 32
"""Decode steps between two calls of ``should_stop``, which is a collective and would slow every step down."""

_REFILL_SHARE = 8
"""Rows are refilled once 1 / 8 of them are free. A prefill of few prompts takes as long as a decode step of all rows."""

PREFILL_TOKENS = 16384
"""Maximum number of prompt tokens in one prefill, padding included. This bounds the memory of its activations."""

FEWEST_ROWS = 8
"""With CUDA graphs the number of computed rows is halved as rows become free, but not below this."""


@dataclass(frozen=True, kw_only=True)
class DecoderModel:
    """The model's functions and properties that the decoder uses.

    ``forward``, ``broadcast_from_last_stage`` and ``all_agree`` are collectives of one replica's ranks.
    """

    forward: Callable[[Tensor], Tensor | None]
    """Runs the model on tokens [b, s]. Returns logits [s, v] fp32 for a Decode on the last pipeline stage, otherwise None."""
    frequencies: Tensor
    """[length, 1, 1, d] rotary frequencies of every position."""
    broadcast_from_last_stage: Callable[[Tensor], Tensor]
    """Overwrites a tensor with the last pipeline stage's tensor, and returns it."""
    all_agree: Callable[[bool], bool]
    """Returns True if every rank of the replica passes True."""
    dtype: torch.dtype
    """Data type of the model's activations."""
    vocab_size: int
    has_graphs: bool
    """Whether decode steps can be captured as CUDA graphs."""
    steps_per_read: int
    """Decode steps between two reads of the rows' state by the host."""


class Rows:
    """State of ``num`` rows on the device. Tensors are only written in place, because CUDA graphs hold their addresses."""

    def __init__(self, num: int, max_new_tokens: int, num_seen: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token = zeros(num)
        """[num] the next input token of the model."""
        self.position = zeros(num)
        """[num] position of ``token`` in its sequence."""
        self.count = zeros(num)
        """[num] tokens sampled so far."""
        self.limit = zeros(num)
        """[num] maximum number of tokens to sample."""
        self.is_over = torch.ones(num, dtype=torch.bool, device=device)
        """[num] the response has ended, or the row has no sample. Such rows are still computed, but not collected."""
        # One column more than a response has tokens: ended rows keep writing to the column after their last token.
        self.uniforms = zeros(num, max_new_tokens + 1, dtype=torch.float64)
        """[num, max_new_tokens + 1] one uniform random number for each token."""
        self.drawn = zeros(2, num, max_new_tokens + 1, dtype=torch.float64)
        """[2, num, max_new_tokens + 1] sampled token ids, and their log-probabilities."""
        self.seen = zeros(num, num_seen, dtype=torch.bool)
        """[num, v] tokens that occur in prompt or response, for the repetition penalty; [num, 0] without a penalty."""

    def _all(self) -> list[Tensor]:
        states = [self.token, self.position, self.count, self.limit, self.is_over]
        return [*states, self.uniforms, *self.drawn, self.seen]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies the state of rows ``sources`` to rows ``targets``."""
        for state in self._all():
            state[targets] = state[sources]

    def save(self) -> Callable[[], None]:
        """Saves the state that decode steps change, and returns a function that restores it.

        ``drawn`` is not saved, because the repeated steps overwrite it.
        """
        changing = [self.token, self.position, self.count, self.is_over, self.seen]
        saved = [state.clone() for state in changing]

        def restore() -> None:
            for state, before in zip(changing, saved, strict=True):
                state.copy_(before)

        return restore

    def advance(self, token: Tensor, logprob: Tensor, stops: Tensor) -> None:
        """Appends a sampled token to each of the first n rows, except rows whose response has ended.

        Args:
            token: [n] fp64 token ids.
            logprob: [n] fp64 log-probabilities of the tokens.
            stops: [k] int64 token ids that end a response.
        """
        num = len(token)
        count, is_over, place = self.count[:num], self.is_over[:num], self.count[:num, None]
        self.drawn[0, :num].scatter_(1, place, token[:, None])
        self.drawn[1, :num].scatter_(1, place, logprob[:, None])
        ids = token.long()
        if self.seen.shape[1]:
            self.seen[:num].scatter_(1, ids[:, None], True)
        count += ~is_over
        is_over |= (ids[:, None] == stops).any(-1) | (count >= self.limit[:num])
        # The position of an ended row no longer grows, so it never exceeds the cache.
        self.token[:num].copy_(torch.where(is_over, self.token[:num], ids))
        self.position[:num] += ~is_over


@dataclass(kw_only=True)
class _Sample:
    """A response that is being sampled, and its length when the host last read the rows."""

    request: int
    """Index of the request to which the sample belongs."""
    index: int
    """Index of this sample among its request's samples."""
    prompt_ids: list[int]
    seed: int
    limit: int
    """Maximum number of tokens to sample."""
    count: int = 0
    """Tokens sampled when the host last read the rows."""

    @property
    def position(self) -> int:
        """Position of the next input token."""
        return len(self.prompt_ids) - 1 + self.count


class Decoder:
    """Samples requests on the ranks of one replica, which all hold the same state and make the same decisions.

    The last token of a prompt is not prefilled. It is the input of the row's first decode step, so the first response
    token is sampled like all others.

    Args:
        model: the model that is sampled from.
        cache: the model's keys and values; its number of rows is the batch size.
        requests: sorted by prompt length, longest first.
        params: how tokens are drawn.
        should_stop: a collective of the replica's ranks, called about every 32 decode steps.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: KeyValueCache,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool],
    ) -> None:
        self._model = model
        self._cache = cache
        self._params = params
        self._should_stop = should_stop
        self._queue = deque(
            _Sample(
                request=i,
                index=k,
                prompt_ids=request.prompt_ids,
                seed=seed,
                limit=params.max_response_tokens(len(request.prompt_ids)),
            )
            for i, request in enumerate(requests)
            for k, seed in enumerate(request.seeds)
        )
        self._device = model.frequencies.device
        self._num_rows = cache.num_rows
        """Number of rows that a decode step computes: all rows of the cache while samples wait, then fewer."""
        num_seen = model.vocab_size if params.repetition_penalty != 1.0 else 0
        self._rows = Rows(cache.num_rows, params.max_new_tokens, num_seen, self._device)
        self._samples: dict[int, _Sample] = {}
        """Row -> the sample in it, for all rows in use."""
        self._stops = self._on_device(sorted(params.stop_ids) or [-1])
        self._num_candidates = NUCLEUS_CANDIDATES
        self._graphs = StepGraphs(model.has_graphs, model.all_agree)
        self._done: list[dict[int, Response]] = [{} for _ in requests]
        self.num_done = 0
        """Finished responses."""
        self.num_tokens = 0
        """Tokens sampled so far, those of unfinished responses included."""

    def run(self) -> list[list[Response]]:
        """Samples all requests.

        Returns:
            The responses of each request, in the order of its seeds.

        Raises:
            Stopped: ``should_stop`` returned True.
        """
        steps, asked_at = 0, 0
        while self._queue or self._samples:
            if steps >= asked_at:
                if self._should_stop():
                    raise Stopped
                asked_at = steps + _TOKENS_PER_STOP
            self._refill()
            self._shrink()
            steps += self._sample_tokens()
        return [[done[k] for k in range(len(done))] for done in self._done]

    def _on_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _refill(self) -> None:
        """Assigns waiting samples to free rows, and prefills their prompts."""
        free = [row for row in range(self._num_rows) if row not in self._samples]
        if not self._queue or len(free) * _REFILL_SHARE < self._num_rows:
            return
        taken = [(row, self._queue.popleft()) for row in free[: len(self._queue)]]
        self._samples.update(taken)
        prompts = [list(group) for _, group in groupby(taken, key=lambda item: item[1].request)]
        while prompts:
            # Prompts are sorted with the longest first, so the first determines the width.
            width = len(prompts[0][0][1].prompt_ids) - 1
            num = max(1, PREFILL_TOKENS // max(1, width))
            if width:
                self._prefill(prompts[:num], width)
            else:
                self._cache.clear(self._on_device([row for group in prompts[:num] for row, _ in group]))
            prompts = prompts[num:]
        self._start([row for row, _ in taken], [sample for _, sample in taken])

    def _prefill(self, prompts: list[list[tuple[int, _Sample]]], width: int) -> None:
        """Stores the keys of prompts in the rows of their samples. Prompts are cut to ``width`` tokens."""
        # Padded on the right: under causal attention real tokens do not see the padding.
        tokens = [(group[0][1].prompt_ids[:-1] + [0] * width)[:width] for group in prompts]
        self._cache.step = Prefill(
            frequencies=self._model.frequencies[:width],
            prompts=self._on_device([i for i, group in enumerate(prompts) for _ in group]),
            rows=self._on_device([row for group in prompts for row, _ in group]),
            lengths=self._on_device([len(group[0][1].prompt_ids) - 1 for group in prompts]),
        )
        self._model.forward(torch.tensor(tokens, device=self._device))

    def _start(self, rows: list[int], samples: list[_Sample]) -> None:
        """Sets the state of rows that begin new samples."""
        state, where = self._rows, self._on_device(rows)
        state.token[where] = self._on_device([s.prompt_ids[-1] for s in samples])
        state.position[where] = self._on_device([s.position for s in samples])
        state.count[where] = 0
        state.limit[where] = self._on_device([s.limit for s in samples])
        state.is_over[where] = False
        state.uniforms[where, :-1] = torch.stack([self._uniforms(s.seed) for s in samples]).to(self._device)
        if state.seen.shape[1]:
            state.seen[where] = False
            owners = [row for row, s in zip(rows, samples, strict=True) for _ in s.prompt_ids]
            state.seen[
                self._on_device(owners), self._on_device([i for s in samples for i in s.prompt_ids])
            ] = True

    def _uniforms(self, seed: int) -> Tensor:
        """Returns the random numbers of a sample. They depend only on its seed, so other samples of the batch cannot change it."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self._params.max_new_tokens, generator=generator, dtype=torch.float64)

    def _shrink(self) -> None:
        """If no sample is waiting, moves the occupied rows to the front and stops computing the others."""
        num = self._fewer_rows()
        # Moving rows copies their keys, so it must save at least a quarter of the rows.
        if self._queue or num * 4 > self._num_rows * 3:
            return
        sources = [row for row in self._samples if row >= num]
        targets = [row for row in range(num) if row not in self._samples]
        pairs = list(zip(sources, targets, strict=False))
        if pairs:
            where, to = self._on_device([s for s, _ in pairs]), self._on_device([t for _, t in pairs])
            self._rows.move(where, to)
            self._cache.move(where, to, max(self._samples[s].position for s, _ in pairs))
            self._samples.update({t: self._samples.pop(s) for s, t in pairs})
        self._num_rows = num

    def _fewer_rows(self) -> int:
        """Returns the smallest useful number of rows. With CUDA graphs it is only halved: each number needs a capture."""
        used = max(1, len(self._samples))
        if not self._model.has_graphs:
            return used
        num = self._num_rows
        while num >= 2 * max(used, FEWEST_ROWS):
            num = -(-num // 2)
        return num

    def _sample_tokens(self) -> int:
        """Samples tokens until the host reads the rows, and collects ended responses. Returns the number of decode steps."""
        left = max(s.limit - s.count for s in self._samples.values())
        num_steps = min(self._model.steps_per_read, left)
        farthest = max(s.position for s in self._samples.values())
        bucket = KEY_BUCKET if self._model.has_graphs else PLAIN_KEY_BUCKET
        length = min(-(-(farthest + num_steps) // bucket) * bucket, self._cache.length)
        is_cut = (
            self._params.temperature > 0
            and self._params.top_p < 1
            and self._num_candidates < self._model.vocab_size
        )
        restores = [self._rows.save(), self._cache.save()] if is_cut else []
        while True:
            is_exact = torch.ones(self._num_rows, dtype=torch.bool, device=self._device)
            for _ in range(num_steps):
                is_exact &= self.step(length)
            status = torch.stack(
                [self._rows.count[: self._num_rows], self._rows.is_over[: self._num_rows], is_exact]
            )
            # The host reads the device only here, once after these steps
            counts, is_over, exact = status.tolist()
            if all(exact):
                break
            assert restores, "only a limited number of candidates can make a draw inexact"
            for restore in restores:
                restore()
            self._num_candidates *= 8
        self._collect(counts, is_over)
        return num_steps

    def step(self, length: int) -> Tensor:
        """Samples one token of each row.

        Returns:
            [rows] bool: False for rows whose nucleus has more tokens than were sorted.
        """
        rows, num, params = self._rows, self._num_rows, self._params
        logits = self._graphs.run((num, length), partial(self.logits, num, length))
        drawn = torch.empty(3, num, dtype=torch.float64, device=self._device)
        if logits is not None:
            if rows.seen.shape[1]:
                logits = apply_repetition_penalty(logits, rows.seen[:num], params.repetition_penalty)
            uniforms = rows.uniforms[:num].gather(1, rows.count[:num, None])[:, 0]
            for place, part in enumerate(
                draw(logits, uniforms, params.temperature, params.top_p, self._num_candidates)
            ):
                drawn[place] = part
        # Every pipeline stage needs the tokens to keep its copy of the rows' state.
        drawn = self._model.broadcast_from_last_stage(drawn)
        is_exact = drawn[2].bool() | rows.is_over[:num]
        rows.advance(drawn[0], drawn[1], self._stops)
        return is_exact

    def logits(self, num: int, length: int) -> Tensor | None:
        """Runs the model on the rows' next tokens.

        CUDA graphs capture this function, so it reads and writes the same tensors at every call.
        """
        # An ended row may be longer than all others. What is computed for it is not used.
        positions = self._rows.position[:num].clamp(max=length - 1)
        keys = torch.arange(length, device=self._device)
        seen = keys[None, :] <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=self._device)
        self._cache.step = Decode(
            frequencies=self._model.frequencies[positions],
            rows=torch.arange(num, device=self._device),
            positions=positions,
            mask=mask.masked_fill_(~seen, float("-inf"))[:, None, None],
        )
        return self._model.forward(self._rows.token[:num][None])

    def _collect(self, counts: list[int], is_over: list[int]) -> None:
        """Reads the rows' counts, and turns ended responses into results."""
        for row, sample in self._samples.items():
            self.num_tokens += counts[row] - sample.count
            sample.count = counts[row]
        ended = [row for row in self._samples if is_over[row]]
        if not ended:
            return
        self.num_done += len(ended)
        longest = max(counts[row] for row in ended)
        tokens, logprobs = self._rows.drawn[:, self._on_device(ended), :longest].cpu()
        for row, ids, values in zip(ended, tokens, logprobs, strict=True):
            sample = self._samples.pop(row)
            token_ids = ids[: sample.count].long().tolist()
            self._done[sample.request][sample.index] = Response(
                token_ids=token_ids,
                logprobs=values[: sample.count].tolist(),
                finish_reason="stop" if token_ids[-1] in self._params.stop_ids else "length",
            )
