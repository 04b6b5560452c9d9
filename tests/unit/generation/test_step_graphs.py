"""Capturing and replaying a step, and the fallback to steps without graphs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rasft.generation import step_graphs
from megatron_rasft.generation.step_graphs import StepGraphs
from tests import recorded_graphs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Makes graphs recordable on the CPU. Yields the list of created streams."""
    streams: list[Any] = []

    class Stream:
        def __init__(self) -> None:
            streams.append(self)

        def wait_stream(self, other: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    current = Stream()
    streams.clear()
    step_graphs.capture_stream.cache_clear()
    answers = {
        "CUDAGraph": recorded_graphs.RecordedGraph,
        "graph": recorded_graphs.capture,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": lambda: current,
        "current_device": lambda: 3,
        "set_stream": lambda stream: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    yield streams
    step_graphs.capture_stream.cache_clear()


def counted(given: Tensor) -> tuple[list[int], Any]:
    """A step that doubles ``given``, and a list that grows each time Python runs it."""
    runs: list[int] = []

    def step() -> Tensor:
        runs.append(1)
        return given * 2

    return runs, step


def test_a_replay_computes_from_the_present_content_of_the_tensors(gpu: list[Any]) -> None:
    given = torch.ones(3)
    runs, step = counted(given)
    graphs = StepGraphs(True, lambda agrees: agrees)
    for value in (1.0, 5.0, -2.0):
        given.fill_(value)
        result = graphs.run("shape", step)
        assert result is not None and torch.equal(result, torch.full((3,), 2 * value))
    assert len(runs) == 2  # for the warm-up and for the capture


def test_without_graphs_every_step_runs() -> None:
    runs, step = counted(torch.ones(3))
    graphs = StepGraphs(False, lambda agrees: agrees)
    for _ in range(3):
        result = graphs.run("shape", step)
        assert result is not None and torch.equal(result, torch.full((3,), 2.0))
    assert len(runs) == 3


def test_graphs_of_several_shapes_share_the_memory_of_their_results(gpu: list[Any]) -> None:
    graphs = StepGraphs(True, lambda agrees: agrees)
    results = {}
    for num in (4, 2):
        results[num] = graphs.run(num, counted(torch.full((num,), float(num)))[1])
    large, small = results[4], results[2]
    assert large is not None and small is not None
    assert small.tolist() == [4.0, 4.0] and small.data_ptr() == large.data_ptr()
    again = graphs.run(4, counted(torch.zeros(4))[1])
    assert again is not None and again.tolist() == [8.0] * 4, "a replay uses the tensors of the capture"


def test_a_rank_stops_using_graphs_if_another_could_not_capture(gpu: list[Any]) -> None:
    """A capture runs the step's collectives more often than a step without a graph, so all ranks must do the same."""
    given = torch.ones(3)
    runs, step = counted(given)
    asked: list[bool] = []

    def all_agree(agrees: bool) -> bool:
        asked.append(agrees)
        return len(asked) < 2

    graphs = StepGraphs(True, all_agree)
    graphs.run("first", step)
    with pytest.warns(RuntimeWarning, match="another rank"):
        result = graphs.run("second", step)
    assert result is not None and torch.equal(result, given * 2)
    assert asked == [True, True] and not graphs.is_enabled
    before = len(runs)
    graphs.run("first", step)
    assert len(runs) == before + 1 and len(asked) == 2


def test_a_failed_capture_ends_for_every_rank_and_for_the_allocator(
    gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, ended = torch.ones(3), []

    def end(*place: Any) -> None:
        ended.append(place)
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    # torch.cuda.graph has no public way to end a failed capture, so StepGraphs calls this function of the allocator.
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    asked: list[bool] = []

    def step() -> Tensor:
        return given * given.sum().item()  # this reads from the device, which a capture does not allow

    def all_agree(agrees: bool) -> bool:
        asked.append(agrees)
        return agrees

    graphs = StepGraphs(True, all_agree)
    with pytest.warns(RuntimeWarning, match="not permitted"):
        result = graphs.run("shape", step)
    assert ended == [(3, (0, 1))]
    assert asked == [False] and result is not None and torch.equal(result, torch.full((3,), 3.0))


def test_all_captures_of_a_process_share_one_stream(gpu: list[Any]) -> None:
    for _ in range(3):
        graphs = StepGraphs(True, lambda agrees: agrees)
        graphs.run("shape", counted(torch.ones(3))[1])
    assert len(gpu) == 1
