"""Sampling continues after a kill and keeps every sample. A sample depends only on seed, problem and number."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.errors import RolloutError
from megatron_rasft.rollout.store import read_rollouts
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmark_sampling import Grade, Order, sample_benchmarks
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.types import Response, Rollout, SamplingParams
from tests.unit.tools.evaluation.conftest import CountingEngine, grade_even

PARAMS = SamplingParams(
    num_samples=4,
    max_new_tokens=8,
    temperature=1.0,
    top_p=1.0,
    repetition_penalty=1.0,
    stop_ids=frozenset({0}),
    max_batch_size=8,
)


def make_benchmark(num_problems: int = 5, name: str = "own") -> Benchmark:
    problems = [Problem(problem_id=f"p{i}", text=f"{i}?", answer=str(i)) for i in range(num_problems)]
    return Benchmark(
        name=name,
        title=name.title(),
        kind="math",
        path=Path("own.jsonl"),
        problems=problems,
        sha256="",
        is_verified=False,
    )


def order_of(path: Path, benchmark: Benchmark | None = None, grade: Grade = grade_even) -> Order:
    benchmark = benchmark or make_benchmark()
    prompts = [[i] for i in range(len(benchmark.problems))]
    return Order(benchmark, prompts, path, lambda: nullcontext(grade))


def draw(orders: list[Order], engine: Any, **options: Any) -> Iterator[list[Rollout]]:
    """Draws with 4 samples, seed 1 and PARAMS, unless ``options`` say otherwise."""
    return sample_benchmarks(
        orders, engine, **{"num_samples": 4, "seed": 1, "params": PARAMS, "decode": str, **options}
    )


def sample(path: Path, engine: Any, benchmark: Benchmark | None = None, **options: Any) -> list[Rollout]:
    [rollouts] = draw([order_of(path, benchmark)], engine, **options)
    return rollouts


def test_every_sample_is_drawn_once_stored_and_in_order(tmp_path: Path, engine: CountingEngine) -> None:
    rollouts = sample(tmp_path / "s.jsonl", engine)
    assert [(r.problem_id, r.sample_index) for r in rollouts] == [
        (f"p{i}", j) for i in range(5) for j in range(4)
    ]
    assert engine.num_prompts == [2, 2, 1], "batches of whole problems, with at most 8 samples"
    assert len(set(engine.seeds)) == 20
    assert list(read_rollouts(tmp_path / "s.jsonl")) == rollouts
    assert all(r.verdict in ("correct", "wrong") for r in rollouts)


def test_killed_and_restarted_evaluation_equals_an_uninterrupted_one(
    tmp_path: Path, engine: CountingEngine
) -> None:
    whole = sample(tmp_path / "whole.jsonl", engine)
    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample(path, CountingEngine(fails_after=1))
    with path.open("a") as file:
        file.write('{"problem_id": "p2", "sample_')  # the evaluation was killed while it wrote a line
    second = CountingEngine()
    assert sample(path, second) == whole
    assert len(second.seeds) == 12, "the first batch of eight is not drawn again"
    third = CountingEngine()
    assert sample(path, third) == whole and third.seeds == []
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_more_samples_are_added_to_the_stored_ones(tmp_path: Path, engine: CountingEngine) -> None:
    path = tmp_path / "s.jsonl"
    few = sample(path, engine, num_samples=2)
    more = CountingEngine()
    many = sample(path, more, num_samples=4)
    assert len(more.seeds) == 10
    assert [r for r in many if r.sample_index < 2] == few
    assert many == sample(tmp_path / "other.jsonl", CountingEngine(), num_samples=4)


def test_stored_samples_of_another_prompt_are_refused(tmp_path: Path, engine: CountingEngine) -> None:
    path = tmp_path / "s.jsonl"
    sample(path, engine)
    stored = path.read_text()
    moved = make_benchmark()
    moved.problems.insert(0, moved.problems.pop())  # gives every id another prompt
    second = CountingEngine()
    with pytest.raises(ValueError, match=r"s\.jsonl .* p0 .*--output"):
        sample(path, second, benchmark=moved)
    assert second.seeds == [] and path.read_text() == stored


def test_batch_does_not_change_a_sample(tmp_path: Path, engine: CountingEngine) -> None:
    wide = sample(tmp_path / "a.jsonl", engine, params=replace(PARAMS, max_batch_size=64))
    alone = sample(tmp_path / "b.jsonl", CountingEngine(), benchmark=make_benchmark(1))
    assert alone == wide[:4]
    assert sample(tmp_path / "c.jsonl", CountingEngine(), seed=2) != wide


def test_a_batch_goes_on_with_the_next_benchmark(tmp_path: Path, engine: CountingEngine) -> None:
    """Otherwise every benchmark would wait for its longest responses with nearly empty batches."""
    graders: list[str] = []

    def order(name: str, num_problems: int) -> Order:
        @contextmanager
        def open_grader() -> Iterator[Grade]:
            graders.append(f"{name} opens")
            yield grade_even
            graders.append(f"{name} closes")

        plain = order_of(tmp_path / f"{name}.jsonl", make_benchmark(num_problems, name))
        return replace(plain, open_grader=open_grader)

    orders = [order("one", 3), order("two", 1), order("three", 3)]
    lines: list[str] = []
    found = list(draw(orders, engine, say=lines.append))
    assert engine.num_prompts == [2, 2, 2, 1]
    shared_batch = ["one opens", "two opens", "one closes", "two closes"]
    assert graders == [*shared_batch, "three opens", "three closes"]
    assert [line.split(" samples")[0] for line in lines] == [
        "One: 12 of 12",
        "Two: 4 of 4",
        "Three: 12 of 12",
    ]
    for name, num_problems, rollouts in zip(("one", "two", "three"), (3, 1, 3), found, strict=True):
        alone = sample(tmp_path / f"{name}-alone.jsonl", CountingEngine(), make_benchmark(num_problems, name))
        assert rollouts == alone == list(read_rollouts(tmp_path / f"{name}.jsonl"))
    resumed = CountingEngine()
    assert list(draw(orders, resumed)) == found and resumed.seeds == []


def test_graders_are_closed_if_the_engine_fails(tmp_path: Path) -> None:
    is_open = False

    @contextmanager
    def open_grader() -> Iterator[Grade]:
        nonlocal is_open
        is_open = True
        try:
            yield grade_even
        finally:
            is_open = False

    order = replace(order_of(tmp_path / "s.jsonl"), open_grader=open_grader)
    with pytest.raises(KeyboardInterrupt):
        list(draw([order], CountingEngine(fails_after=1)))
    assert not is_open and len(list(read_rollouts(tmp_path / "s.jsonl"))) == 8


def test_responses_are_limited_to_the_context_of_the_model(tmp_path: Path) -> None:
    class Recording(CountingEngine):
        def generate(self, requests: Any, params: SamplingParams) -> list[list[Response]]:
            limits.extend(params.max_response_tokens(length) for length in (1, 90, 92, 95, 99))
            return super().generate(requests, params)

    limits: list[int] = []
    sample(tmp_path / "s.jsonl", Recording(), make_benchmark(1))
    assert limits == [8, 8, 8, 5, 1]
    engine = CountingEngine()
    long = replace(order_of(tmp_path / "long.jsonl", make_benchmark(1, "long")), prompts=[[1] * 100])
    with pytest.raises(ValueError, match=r"Long has 100 tokens.*--benchmarks"):
        list(draw([order_of(tmp_path / "t.jsonl"), long], engine))
    assert engine.seeds == [], "refused before the first benchmark is sampled"


def test_aborted_samples_are_not_stored_and_stop_the_evaluation_at_its_end(tmp_path: Path) -> None:
    class Flaky(CountingEngine):
        def generate(self, requests: Any, params: SamplingParams) -> list[list[Response]]:
            groups = super().generate(requests, params)
            if requests[0].prompt_ids == [0]:
                groups[0][1] = Response(token_ids=[], logprobs=[], finish_reason="abort")
            return groups

    def grade(rollouts: list[Rollout], problems: dict[str, Problem]) -> None:
        grade_even([r for r in rollouts if r.response_ids], problems)

    path = tmp_path / "s.jsonl"
    with pytest.raises(RolloutError, match=r"Own: 1 of 20 samples .*s\.jsonl"):
        list(draw([order_of(path, grade=grade)], Flaky()))
    assert len(path.read_text().splitlines()) == 19
    repaired = CountingEngine()
    assert sample(path, repaired)
    assert len(repaired.seeds) == 1


def test_broken_line_inside_the_store_is_named(tmp_path: Path, engine: CountingEngine) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"what": 1}) + "\n")
    with pytest.raises(RolloutError, match=r"s\.jsonl:1 "):
        sample(path, engine)
