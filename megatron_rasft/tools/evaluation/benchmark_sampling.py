"""Draws the samples of benchmarks that are not stored yet, grades them and stores them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import batched, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from megatron_rasft.errors import RolloutError
from megatron_rasft.monitoring import live
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.rollout.store import RolloutStore, read_rollouts, whole_lines
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.types import Request, Response, Rollout, SamplingParams
from megatron_rasft.wording import counted

_SEED_BITS = 31
"""Servers accept seeds that fit a signed 32-bit integer."""


class Engine(Protocol):
    """Draws responses: from a model in this program's processes, or from rollout servers."""

    @property
    def max_positions(self) -> int:
        """Largest number of tokens of prompt and response together."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """Returns for each request one response per seed, in the order of the seeds.

        A failed response has finish reason ``abort``.
        """


Grade = Callable[[list[Rollout], dict[str, Problem]], None]
"""Sets verdict and reason of every rollout, given the problems by id."""


@dataclass(frozen=True)
class Order:
    """What to draw of one benchmark, and where to keep it."""

    benchmark: Benchmark
    prompts: Sequence[list[int]]
    """Token ids of each problem's prompt."""
    path: Path
    """The store, a file with one JSON object per sample."""
    open_grader: Callable[[], AbstractContextManager[Grade]]
    """Starts what sets the verdicts. It is open from the first graded batch of the benchmark to the last."""


def sample_benchmarks(
    orders: Sequence[Order],
    engine: Engine,
    *,
    num_samples: int,
    seed: int,
    params: SamplingParams,
    decode: Callable[[list[int]], str],
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Rollout]]:
    """Yields every sample of one benchmark after the other. Reads stored samples, and draws, grades and stores the missing ones.

    Samples are stored batch by batch as soon as they are graded, so a killed evaluation repeats at most one batch. A batch may
    hold the end of one benchmark and the beginning of the next, so that a few long responses do not hold up each benchmark.

    Args:
        orders: the benchmarks.
        engine: draws the responses.
        num_samples: samples per problem.
        seed: seed of the evaluation.
        params: sampling parameters.
        decode: converts token ids to text without special tokens.
        say: prints a line, at the beginning and at the end of a benchmark. ``live`` shows the progress between them.

    Yields:
        [problems x num_samples] samples of a benchmark, in the order of the problems.

    Raises:
        ValueError: a stored sample was drawn from another prompt, or a prompt is as long as the model's context.
        RolloutError: some samples of a benchmark could not be drawn. It is raised after its other samples are stored.
    """
    for order in orders:
        _check_lengths(order, engine.max_positions)
    params = replace(params, max_total_tokens=engine.max_positions)
    assert params.max_batch_size is not None, (
        "an evaluation stores samples in batches, so it needs a batch size"
    )
    drawings = [_Drawing(order, num_samples, decode, say) for order in orders]
    # The samples of a problem share the prefill of its prompt, so they stay in one batch
    missing = [(drawing, part) for drawing in drawings for part in drawing.missing()]
    batches = batched(missing, max(1, params.max_batch_size // num_samples))
    total = sum(drawing.total for drawing in drawings)
    label = orders[0].benchmark.title if len(orders) == 1 else counted(len(orders), "benchmark")
    with (
        ExitStack() as graders,
        live.work(label, "samples", total, lambda: sum(d.num_drawn for d in drawings)),
    ):
        for drawing in drawings:
            while drawing.num_drawn < drawing.total:
                batch = next(batches)
                requests = [
                    Request(prompt_ids=part.prompt_ids, seeds=part.seeds(seed, of.name)) for of, part in batch
                ]
                answers = iter(engine.generate(requests, params))
                for of, group in groupby(batch, key=itemgetter(0)):
                    parts = [part for _, part in group]
                    of.add(parts, list(islice(answers, len(parts))), graders)
            yield drawing.close()


class _Drawing:
    """The samples of one benchmark, while they are drawn."""

    def __init__(
        self,
        order: Order,
        num_samples: int,
        decode: Callable[[list[int]], str],
        say: Callable[[str], None],
    ) -> None:
        self.name = order.benchmark.name
        self.total = len(order.benchmark.problems) * num_samples
        self._order = order
        self._num_samples = num_samples
        self._decode = decode
        self._say = say
        self._problems = {problem.problem_id: problem for problem in order.benchmark.problems}
        self._prompt_of = dict(zip(self._problems, order.prompts, strict=True))
        self._finished = _read_finished(order.path, self._prompt_of, num_samples)
        self._num_stored = len(self._finished)
        self._store = RolloutStore(order.path)
        self._grader = ExitStack()
        self._grade: Grade | None = None
        self._began = time.monotonic()
        if self._finished:
            say(f"{order.benchmark.title}: {len(self._finished)} of {self.total} samples are stored already")

    @property
    def num_drawn(self) -> int:
        """Samples that are drawn, those that were lost included."""
        return len(self._finished)

    def missing(self) -> list["_Missing"]:
        """The problems with samples that are not stored yet."""
        return [
            _Missing(problem_id, prompt_ids, indices)
            for problem_id, prompt_ids in self._prompt_of.items()
            if (indices := [i for i in range(self._num_samples) if (problem_id, i) not in self._finished])
        ]

    def add(
        self, parts: Sequence["_Missing"], answers: Sequence[Sequence[Response]], graders: ExitStack
    ) -> None:
        """Grades and stores responses. The grader that the first ones open is closed with ``graders`` at the latest."""
        if self._grade is None:
            graders.callback(self._grader.close)
            self._grade = self._grader.enter_context(self._order.open_grader())
        rollouts = _as_rollouts(parts, answers, self._decode)
        with live.verifying(rollouts):
            self._grade(rollouts, self._problems)
        self._store.append(r for r in rollouts if r.finish_reason != "abort")
        self._finished.update({(r.problem_id, r.sample_index): r for r in rollouts})

    def close(self) -> list[Rollout]:
        """Closes the grader and returns all samples, in the order of the problems.

        Raises:
            RolloutError: some samples could not be drawn.
        """
        self._grader.close()
        title = self._order.benchmark.title
        aborted = sum(r.finish_reason == "abort" for r in self._finished.values())
        if aborted:
            raise RolloutError(
                f"{title}: {aborted} of {counted(self.total, 'sample')} could not be drawn. The others are stored in "
                f"{self._order.path}. Run the same command again to draw the missing ones."
            )
        if self._num_stored < self.total:
            self._say(
                f"{title}: {self.total} of {self.total} samples, after {time.monotonic() - self._began:.0f} s"
            )
        return [self._finished[name, i] for name in self._problems for i in range(self._num_samples)]


@dataclass(frozen=True)
class _Missing:
    """The samples of one problem that are not stored yet."""

    problem_id: str
    prompt_ids: list[int]
    indices: list[int]
    """Indices of the missing samples."""

    def seeds(self, seed: int, benchmark_name: str) -> list[int]:
        return [
            sample_seed(seed, benchmark_name, self.problem_id, index, num_bits=_SEED_BITS)
            for index in self.indices
        ]


def _read_finished(
    path: Path, prompt_of: Mapping[str, list[int]], num_samples: int
) -> dict[tuple[str, int], Rollout]:
    """Returns the stored samples that belong to this evaluation, by problem id and number."""
    finished = {
        (r.problem_id, r.sample_index): r
        for r in _stored(path)
        if r.problem_id in prompt_of and r.sample_index < num_samples
    }
    for rollout in finished.values():
        if rollout.prompt_ids != prompt_of[rollout.problem_id]:
            raise ValueError(
                f"{path} holds samples of {rollout.problem_id} that were drawn from another prompt: the question, the "
                "tokenizer or the chat template has changed. Give another --output, or delete the samples."
            )
    return finished


def _as_rollouts(
    batch: Sequence[_Missing], responses: Sequence[Sequence[Response]], decode: Callable[[list[int]], str]
) -> list[Rollout]:
    return [
        Rollout(
            problem_id=missing.problem_id,
            sample_index=index,
            weight_version=0,
            prompt_ids=missing.prompt_ids,
            response_ids=response.token_ids,
            response_logprobs=response.logprobs,
            finish_reason=response.finish_reason,
            text=decode(response.token_ids),
        )
        for missing, answers in zip(batch, responses, strict=True)
        for index, response in zip(missing.indices, answers, strict=True)
    ]


def _check_lengths(order: Order, max_positions: int) -> None:
    """Raises ValueError if the longest prompt of a benchmark is as long as the model's context."""
    longest = max(map(len, order.prompts), default=0)
    if longest >= max_positions:
        raise ValueError(
            f"a prompt of {order.benchmark.title} has {longest} tokens, but the model's context has {max_positions}. Leave this "
            "benchmark out of --benchmarks."
        )


def _stored(path: Path) -> Iterator[Rollout]:
    """Yields the stored samples, after removing an incomplete last line that a killed evaluation left."""
    if not path.exists():
        return
    RolloutStore(path).truncate(whole_lines(path))
    yield from read_rollouts(path)
