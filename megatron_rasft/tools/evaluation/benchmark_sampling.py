"""Draws the samples of a benchmark that are not in its store yet, grades them and stores them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import batched
from pathlib import Path
from typing import Protocol

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.rollout.store import RolloutStore, read_rollouts, whole_lines
from megatron_rasft.tools.evaluation.benchmarks import Benchmark, Problem
from megatron_rasft.types import Request, Response, Rollout, SamplingParams

_SEED_BITS = 31
"""Rollout servers are asked for seeds that fit a signed 32-bit integer."""


class Engine(Protocol):
    """What can continue a prompt: the embedded model or a server."""

    @property
    def max_positions(self) -> int:
        """Most tokens of prompt and response together."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """For each request one response per seed, in their order; ``abort`` for one that could not be had."""


Grade = Callable[[list[Rollout], dict[str, Problem]], None]
"""Sets verdict and reason of every rollout; the problems by id."""


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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rollout]:
    """Every sample of a benchmark: those in the store, and the missing ones, drawn and graded now.

    A killed evaluation loses the batch it was at: a sample is stored once it is graded, and never drawn again.

    Args:
        benchmark: its problems.
        prompts: token ids of each problem's prompt.
        engine: draws.
        grade: sets the verdicts.
        path: the store, one JSON object a sample.
        num_samples: per problem.
        seed: of the evaluation.
        params: how to draw.
        decode: token ids -> text without special tokens.
        on_progress: told the number of finished and of all samples.

    Returns:
        [problems x num_samples], problem after problem.

    Raises:
        ValueError: a stored sample was drawn from another prompt, or a prompt leaves no room.
        RolloutError: samples could not be drawn, after everything else was.
    """
    params = fit_to_positions(params, prompts, engine.max_positions)
    problems = {problem.problem_id: problem for problem in benchmark.problems}
    finished = {
        (r.problem_id, r.sample_index): r
        for r in _stored(path)
        if r.problem_id in problems and r.sample_index < num_samples
    }
    prompt_of = dict(zip(problems, prompts, strict=True))
    for rollout in finished.values():
        if rollout.prompt_ids != prompt_of[rollout.problem_id]:
            raise ValueError(
                f"{path} holds samples of {rollout.problem_id} drawn from another prompt: question, tokenizer or chat "
                "template was another one. Give another --output, or delete the samples."
            )
    store = RolloutStore(path)
    total = len(problems) * num_samples
    assert params.max_batch_size is not None, (
        "an evaluation saves after each batch, so it says how large one is"
    )
    # One problem's samples share its prefill, so they stay in one batch.
    per_batch = max(1, params.max_batch_size // num_samples)
    missing = [
        (problem, prompt_ids, indices)
        for problem, prompt_ids in zip(benchmark.problems, prompts, strict=True)
        if (indices := [i for i in range(num_samples) if (problem.problem_id, i) not in finished])
    ]
    on_progress(len(finished), total)
    for batch in batched(missing, per_batch):
        requests = [
            Request(
                prompt_ids=prompt_ids,
                seeds=[
                    sample_seed(seed, benchmark.name, problem.problem_id, index, num_bits=_SEED_BITS)
                    for index in indices
                ],
            )
            for problem, prompt_ids, indices in batch
        ]
        responses = engine.generate(requests, params)
        rollouts = [
            Rollout(
                problem_id=problem.problem_id,
                sample_index=index,
                weight_version=0,
                prompt_ids=prompt_ids,
                response_ids=response.token_ids,
                response_logprobs=response.logprobs,
                finish_reason=response.finish_reason,
                text=decode(response.token_ids),
            )
            for (problem, prompt_ids, indices), answers in zip(batch, responses, strict=True)
            for index, response in zip(indices, answers, strict=True)
        ]
        grade(rollouts, problems)
        store.append(r for r in rollouts if r.finish_reason != "abort")
        finished.update({(r.problem_id, r.sample_index): r for r in rollouts})
        on_progress(len(finished), total)
    aborted = sum(r.finish_reason == "abort" for r in finished.values())
    if aborted:
        raise RolloutError(
            f"{benchmark.title}: {aborted} of {total} samples could not be drawn. The others are in {path}: the same "
            "command draws those that are missing."
        )
    return [finished[problem_id, i] for problem_id in problems for i in range(num_samples)]


def fit_to_positions(
    params: SamplingParams, prompts: Sequence[list[int]], max_positions: int
) -> SamplingParams:
    """Fewer new tokens for each prompt that would exceed the model with them.

    Raises:
        ValueError: the longest prompt leaves no room at all.
    """
    longest = max(map(len, prompts), default=0)
    if longest >= max_positions:
        raise ValueError(
            f"a prompt has {longest} tokens, the model only {max_positions} positions: nothing can be "
            "sampled. Leave this benchmark out."
        )
    return replace(params, max_total_tokens=max_positions)


def _stored(path: Path) -> Iterator[Rollout]:
    """What is in the store, after a line that a kill left unfinished was cut away."""
    if not path.exists():
        return
    RolloutStore(path).truncate(whole_lines(path))
    yield from read_rollouts(path)
