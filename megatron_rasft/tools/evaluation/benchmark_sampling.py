"""Draws the samples of a benchmark that are not stored yet, grades them and stores them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Protocol

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.rollout.store import RolloutStore, read_rollouts, whole_lines
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.training import live
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


def sample_benchmark(
    benchmark: Benchmark,
    prompts: Sequence[list[int]],
    engine: Engine,
    grade: Grade,
    path: Path,
    *,
    num_samples: int,
    seed: int,
    params: SamplingParams,
    decode: Callable[[list[int]], str],
    say: Callable[[str], None] = lambda line: None,
) -> list[Rollout]:
    """Returns every sample of a benchmark. Reads stored samples, and draws, grades and stores the missing ones.

    Samples are stored batch by batch as soon as they are graded, so a killed evaluation repeats at most one batch.

    Args:
        benchmark: the benchmark with its problems.
        prompts: token ids of each problem's prompt.
        engine: draws the responses.
        grade: sets the verdicts.
        path: the store, a file with one JSON object per sample.
        num_samples: samples per problem.
        seed: seed of the evaluation.
        params: sampling parameters.
        decode: converts token ids to text without special tokens.
        say: prints a line, at the beginning and at the end. ``live`` shows the progress between them.

    Returns:
        [problems x num_samples] samples, in the order of the problems.

    Raises:
        ValueError: a stored sample was drawn from another prompt, or a prompt is as long as the model's context.
        RolloutError: some samples could not be drawn. It is raised after the other samples are stored.
    """
    params = fit_to_positions(params, prompts, engine.max_positions)
    assert params.max_batch_size is not None, (
        "an evaluation stores samples in batches, so it needs a batch size"
    )
    problems = {problem.problem_id: problem for problem in benchmark.problems}
    prompt_of = dict(zip(problems, prompts, strict=True))
    finished = _read_finished(path, prompt_of, num_samples)
    missing = [
        _Missing(problem_id, prompt_ids, indices)
        for problem_id, prompt_ids in prompt_of.items()
        if (indices := [i for i in range(num_samples) if (problem_id, i) not in finished])
    ]
    store = RolloutStore(path)
    total = len(problems) * num_samples
    if finished:
        say(f"{benchmark.title}: {len(finished)} of {total} samples are stored already")
    began = time.monotonic()
    with live.work(benchmark.title, "samples", total, lambda: len(finished)):
        # The samples of a problem share the prefill of its prompt, so they stay in one batch
        for batch in batched(missing, max(1, params.max_batch_size // num_samples)):
            requests = [Request(prompt_ids=m.prompt_ids, seeds=m.seeds(seed, benchmark.name)) for m in batch]
            rollouts = _as_rollouts(batch, engine.generate(requests, params), decode)
            with live.verifying(rollouts):
                grade(rollouts, problems)
            store.append(r for r in rollouts if r.finish_reason != "abort")
            finished.update({(r.problem_id, r.sample_index): r for r in rollouts})
    aborted = sum(r.finish_reason == "abort" for r in finished.values())
    if aborted:
        raise RolloutError(
            f"{benchmark.title}: {aborted} of {counted(total, 'sample')} could not be drawn. The others are stored in {path}. Run the "
            "same command again to draw the missing ones."
        )
    if missing:
        say(f"{benchmark.title}: {total} of {total} samples, after {time.monotonic() - began:.0f} s")
    return [finished[problem_id, i] for problem_id in problems for i in range(num_samples)]


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


def fit_to_positions(
    params: SamplingParams, prompts: Sequence[list[int]], max_positions: int
) -> SamplingParams:
    """Returns ``params`` with the total length limited to the model's context, which shortens responses to long prompts.

    Raises:
        ValueError: the longest prompt is as long as the context.
    """
    longest = max(map(len, prompts), default=0)
    if longest >= max_positions:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model's context has {max_positions}. Leave this benchmark out of "
            "--benchmarks."
        )
    return replace(params, max_total_tokens=max_positions)


def _stored(path: Path) -> Iterator[Rollout]:
    """Yields the stored samples, after removing an incomplete last line that a killed evaluation left."""
    if not path.exists():
        return
    RolloutStore(path).truncate(whole_lines(path))
    yield from read_rollouts(path)
