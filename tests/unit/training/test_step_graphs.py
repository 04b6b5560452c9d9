"""When a step is captured, replayed, and run without a graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rasft.training import step_graphs
from megatron_rasft.training.step_graphs import StepGraphs
from tests import recorded_graphs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Records graphs on the CPU; gives the streams that were made."""
    streams: list[Any] = []

    class Stream:
        def __init__(self) -> None:
            streams.append(self)

        def wait_stream(self, other: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    current = Stream()
    streams.clear()
    step_graphs._side_stream.cache_clear()
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
    step_graphs._side_stream.cache_clear()


def counted(given: Tensor) -> tuple[list[int], Any]:
    """How often Python ran the step, and the step: it doubles ``given``."""
    runs: list[int] = []

    def step() -> Tensor:
        runs.append(1)
        return given * 2

    return runs, step


def test_a_captured_step_is_replayed_on_the_tensors_of_now(gpu: list[Any]) -> None:
    given = torch.ones(3)
    runs, step = counted(given)
    graphs = StepGraphs(True, lambda agrees: agrees)
    for value in (1.0, 5.0, -2.0):
        given.fill_(value)
        result = graphs.run("shape", step)
        assert result is not None and torch.equal(result, torch.full((3,), 2 * value))
    assert len(runs) == 2  # to warm up, and in the capture


def test_a_rank_gives_up_its_graphs_where_another_could_not_capture(gpu: list[Any]) -> None:
    """A capture runs the step's collectives once more: ranks that capture and ranks that do not would no longer match."""
    given = torch.ones(3)
    runs, step = counted(given)
    asked: list[bool] = []

    def all_agree(agrees: bool) -> bool:
        asked.append(agrees)
        return len(asked) < 2

    graphs = StepGraphs(True, all_agree)
    graphs.run("first", step)
    with pytest.warns(RuntimeWarning, match="another rank could not capture"):
        result = graphs.run("second", step)
    assert result is not None and torch.equal(result, given * 2)
    assert asked == [True, True] and not graphs.is_enabled
    before = len(runs)
    graphs.run("first", step)
    assert len(runs) == before + 1 and len(asked) == 2


def test_a_failed_capture_ends_on_every_rank_and_for_the_allocator(
    gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, ended = torch.ones(3), []

    def end(*place: Any) -> None:
        ended.append(place)
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    asked: list[bool] = []

    def step() -> Tensor:
        return given * given.sum().item()  # a read, which a capture does not allow

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
