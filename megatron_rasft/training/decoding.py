"""Samples many requests in a fixed number of rows: a row that ends takes the next sample.

The rows' state lives on the device. The host looks at it once every few tokens: it collects the rows that
ended, refills them, and launches the next tokens without reading anything in between.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from megatron_rasft.training.drawing import draw, penalised
from megatron_rasft.training.kv_cache import Decode, KeyValueCache, Prefill
from megatron_rasft.training.step_graphs import StepGraphs
from megatron_rasft.training.stopping import Stopped
from megatron_rasft.types import Request, Response, SamplingParams

KEY_BUCKET = 128
"""Attention runs over a multiple of this many keys, so that few shapes occur and each has one CUDA graph."""

_NUCLEUS_CANDIDATES = 4096
"""Top tokens sorted for top-p. Where a row needs more, tokens are drawn again, and from then on, from eight times as many."""

_TOKENS_PER_STOP = 32
"""Tokens that the rows grow by between two questions whether the run is to stop."""

_REFILL_SHARE = 8
"""Rows are refilled when one in this many is free: a prefill of few prompts costs as much as a token of all rows."""

_PREFILL_TOKENS = 16384
"""Most prompt tokens, with padding, of one forward pass: bounds the memory of its activations."""

_FEWEST_ROWS = 8
"""With CUDA graphs the batch is halved as it empties, down to this."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the decoder needs of the model.

    ``forward``, ``share`` and ``all_agree`` are collectives of one replica's ranks.
    """

    forward: Callable[[Tensor], Tensor | None]
    """Tokens [b, s] -> logits [s, v] fp32 after a Decode on the last pipeline stage, None elsewhere."""
    frequencies: Tensor
    """[length, 1, 1, d] rotary frequencies by position."""
    share: Callable[[Tensor], Tensor]
    """Hands a tensor of the last pipeline stage to the other stages."""
    all_agree: Callable[[bool], bool]
    """Whether every rank of the replica says so."""
    dtype: torch.dtype
    vocab_size: int
    has_graphs: bool
    steps_per_look: int
    """Tokens between two looks of the host at the rows."""


class Rows:
    """State of ``num`` rows on the device. Written in place only: CUDA graphs hold the addresses."""

    def __init__(self, num: int, max_new_tokens: int, num_seen: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token = zeros(num)
        """The token that the model is given next."""
        self.position = zeros(num)
        """Its position."""
        self.count = zeros(num)
        """Tokens sampled so far."""
        self.room = zeros(num)
        """Most tokens to sample."""
        self.is_over = torch.ones(num, dtype=torch.bool, device=device)
        """Also True of a row without a sample. Such a row is computed like the others, and nothing of it is kept."""
        # One column more than tokens: a row that is over goes on writing to the column after its last token.
        self.uniforms = zeros(num, max_new_tokens + 1, dtype=torch.float64)
        self.drawn = zeros(2, num, max_new_tokens + 1, dtype=torch.float64)
        """The sampled tokens, and their log-probabilities."""
        self.seen = zeros(num, num_seen, dtype=torch.bool)
        """Tokens of prompt and response, for the repetition penalty; [num, 0] without one."""

    def _all(self) -> list[Tensor]:
        states = [self.token, self.position, self.count, self.room, self.is_over]
        return [*states, self.uniforms, *self.drawn, self.seen]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows ``sources`` to rows ``targets``."""
        for state in self._all():
            state[targets] = state[sources]

    def save(self) -> Callable[[], None]:
        """Returns a function that puts back what sampling changes, but for tokens that will be sampled again."""
        changing = [self.token, self.position, self.count, self.is_over, self.seen]
        saved = [state.clone() for state in changing]

        def restore() -> None:
            for state, before in zip(changing, saved, strict=True):
                state.copy_(before)

        return restore

    def advance(self, token: Tensor, logprob: Tensor, stops: Tensor) -> None:
        """Append a sampled token to each of the first n rows that is not over."""
        num = len(token)
        count, is_over, place = self.count[:num], self.is_over[:num], self.count[:num, None]
        self.drawn[0, :num].scatter_(1, place, token[:, None])
        self.drawn[1, :num].scatter_(1, place, logprob[:, None])
        ids = token.long()
        if self.seen.shape[1]:
            self.seen[:num].scatter_(1, ids[:, None], True)
        count += ~is_over
        is_over |= (ids[:, None] == stops).any(-1) | (count >= self.room[:num])
        # A row that is over stays where it is, so it never leaves the cache.
        self.token[:num].copy_(torch.where(is_over, self.token[:num], ids))
        self.position[:num] += ~is_over


@dataclass(kw_only=True)
class _Sample:
    """One response to be sampled, and how far the host knows it to be."""

    request: int
    index: int
    prompt_ids: list[int]
    seed: int
    room: int
    count: int = 0

    @property
    def position(self) -> int:
        """Of the token that the model is given next."""
        return len(self.prompt_ids) - 1 + self.count


class Decoder:
    """Samples requests on the ranks of one replica, all of which do the same.

    A prompt's last token is not prefilled: it is the first that the decode step is given, so that
    every token is sampled in the same way.

    Args:
        requests: longest prompt first.
        should_stop: a collective of the replica's ranks, asked every 32 tokens or so.
    """

    def __init__(
        self,
        engine: Engine,
        cache: KeyValueCache,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._params = params
        self._should_stop = should_stop
        self._queue = deque(
            _Sample(
                request=i,
                index=k,
                prompt_ids=request.prompt_ids,
                seed=seed,
                room=params.room(len(request.prompt_ids)),
            )
            for i, request in enumerate(requests)
            for k, seed in enumerate(request.seeds)
        )
        self._device = engine.frequencies.device
        self._num_rows = cache.num_rows
        """Rows in use: all of the cache until no sample waits, then fewer and fewer."""
        num_seen = engine.vocab_size if params.repetition_penalty != 1.0 else 0
        self._rows = Rows(cache.num_rows, params.max_new_tokens, num_seen, self._device)
        self._samples: dict[int, _Sample] = {}
        """The sample of each row that has one."""
        self._stops = self._on_device(sorted(params.stop_ids) or [-1])
        self._num_candidates = _NUCLEUS_CANDIDATES
        self._graphs = StepGraphs(engine.has_graphs, engine.all_agree)
        self._done: list[dict[int, Response]] = [{} for _ in requests]

    def run(self) -> list[list[Response]]:
        """For each request its responses, in the order of its seeds.

        Raises:
            Stopped: ``should_stop`` said so.
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
        """Give waiting samples to free rows, and prefill their prompts."""
        free = [row for row in range(self._num_rows) if row not in self._samples]
        if not self._queue or len(free) * _REFILL_SHARE < self._num_rows:
            return
        taken = [(row, self._queue.popleft()) for row in free[: len(self._queue)]]
        self._samples.update(taken)
        prompts = [list(group) for _, group in groupby(taken, key=lambda item: item[1].request)]
        while prompts:
            # The first prompt is the longest and gives the width.
            width = len(prompts[0][0][1].prompt_ids) - 1
            num = max(1, _PREFILL_TOKENS // max(1, width))
            if width:
                self._prefill(prompts[:num], width)
            prompts = prompts[num:]
        self._start([row for row, _ in taken], [sample for _, sample in taken])

    def _prefill(self, prompts: list[list[tuple[int, _Sample]]], width: int) -> None:
        tokens = [
            (group[0][1].prompt_ids[:-1] + [0] * width)[:width] for group in prompts
        ]  # padded on the right
        self._cache.step = Prefill(
            frequencies=self._engine.frequencies[:width],
            prompts=self._on_device([i for i, group in enumerate(prompts) for _ in group]),
            rows=self._on_device([row for group in prompts for row, _ in group]),
        )
        self._engine.forward(torch.tensor(tokens, device=self._device))

    def _start(self, rows: list[int], samples: list[_Sample]) -> None:
        state, where = self._rows, self._on_device(rows)
        state.token[where] = self._on_device([s.prompt_ids[-1] for s in samples])
        state.position[where] = self._on_device([s.position for s in samples])
        state.count[where] = 0
        state.room[where] = self._on_device([s.room for s in samples])
        state.is_over[where] = False
        state.uniforms[where, :-1] = torch.stack([self._uniforms(s.seed) for s in samples]).to(self._device)
        if state.seen.shape[1]:
            state.seen[where] = False
            owners = [row for row, s in zip(rows, samples, strict=True) for _ in s.prompt_ids]
            state.seen[
                self._on_device(owners), self._on_device([i for s in samples for i in s.prompt_ids])
            ] = True

    def _uniforms(self, seed: int) -> Tensor:
        """The draws of a sample: they depend on its seed only, so it is the same in every batch."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self._params.max_new_tokens, generator=generator, dtype=torch.float64)

    def _shrink(self) -> None:
        """Move the rows in use together once no sample waits, and leave the other rows out."""
        num = self._fewer_rows()
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
        """How many rows would do; with graphs one of few numbers, each of which is captured anew."""
        used = max(1, len(self._samples))
        if not self._engine.has_graphs:
            return used
        num = self._num_rows
        while num >= 2 * max(used, _FEWEST_ROWS):
            num = -(-num // 2)
        return num

    def _sample_tokens(self) -> int:
        """Sample tokens up to the next look, and collect the rows that ended; returns the tokens of a row."""
        left = max(s.room - s.count for s in self._samples.values())
        num_steps = min(self._engine.steps_per_look, left)
        farthest = max(s.position for s in self._samples.values())
        length = min(-(-(farthest + num_steps) // KEY_BUCKET) * KEY_BUCKET, self._cache.length)
        is_cut = (
            self._params.temperature > 0
            and self._params.top_p < 1
            and self._num_candidates < self._engine.vocab_size
        )
        restore = self._rows.save() if is_cut else None
        while True:
            is_exact = torch.ones(self._num_rows, dtype=torch.bool, device=self._device)
            for _ in range(num_steps):
                is_exact &= self.step(length)
            status = torch.stack(
                [self._rows.count[: self._num_rows], self._rows.is_over[: self._num_rows], is_exact]
            )
            counts, is_over, exact = status.tolist()  # the one read of these steps
            if all(exact):
                break
            assert restore is not None, "only a cut nucleus is inexact"
            restore()
            self._num_candidates *= 8
        self._collect(counts, is_over)
        return num_steps

    def step(self, length: int) -> Tensor:
        """Sample one token of each row. Returns [rows] bool, False where the nucleus was not reached."""
        rows, num, params = self._rows, self._num_rows, self._params
        logits = self._graphs.run((num, length), partial(self.logits, num, length))
        drawn = torch.empty(3, num, dtype=torch.float64, device=self._device)
        if logits is not None:
            if rows.seen.shape[1]:
                logits = penalised(logits, rows.seen[:num], params.repetition_penalty)
            uniforms = rows.uniforms[:num].gather(1, rows.count[:num, None])[:, 0]
            for place, part in enumerate(
                draw(logits, uniforms, params.temperature, params.top_p, self._num_candidates)
            ):
                drawn[place] = part
        drawn = self._engine.share(drawn)
        is_exact = drawn[2].bool() | rows.is_over[:num]
        rows.advance(drawn[0], drawn[1], self._stops)
        return is_exact

    def logits(self, num: int, length: int) -> Tensor | None:
        """Run the model on the rows' next tokens. Captured as a CUDA graph: reads and writes fixed tensors only."""
        positions = self._rows.position[:num]
        keys = torch.arange(length, device=self._device)
        seen = keys[None, :] <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=self._engine.dtype, device=self._device)
        self._cache.step = Decode(
            frequencies=self._engine.frequencies[positions],
            rows=torch.arange(num, device=self._device),
            positions=positions,
            mask=mask.masked_fill_(~seen, float("-inf"))[:, None, None],
        )
        return self._engine.forward(self._rows.token[:num][None])

    def _collect(self, counts: list[int], is_over: list[int]) -> None:
        for row, sample in self._samples.items():
            sample.count = counts[row]
        ended = [row for row in self._samples if is_over[row]]
        if not ended:
            return
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
