"""CUDA graphs of the decode step: one launch starts the hundreds of kernels that compute a token."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def capture_stream() -> Any:
    """The stream on which this process captures all graphs.

    cuBLAS keeps a workspace of 32 MiB (on Hopper) for every stream it has ever run on, so all captures use the same stream.
    """
    return torch.cuda.Stream()


def _end_capture(pool: Any) -> None:
    """Tells the caching allocator that a failed capture has ended.

    capture_end in torch's CUDAGraph.cpp does not do so if CUDA cannot end the capture. The allocator would then never
    again reuse the memory of tensors that several streams have used.
    """
    # Raises if the allocator has no capture, because the step failed before the capture began, or the capture has already ended.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class StepGraphs:
    """Captures a step as a CUDA graph once for each shape, and replays the graph from then on.

    A captured step must read and write the same tensors at every replay, and must not transfer data to the host. The
    graphs live as long as this object.

    Args:
        is_enabled: False runs every step without a graph.
        all_agree: returns True if every rank passes True; a collective of the ranks that run steps together.
    """

    def __init__(self, is_enabled: bool, all_agree: Callable[[bool], bool]) -> None:
        self.is_enabled = is_enabled
        self._all_agree = all_agree
        self._graphs: dict[Hashable, tuple[Any, Tensor]] = {}
        self._pool: Any = None
        self._result: Tensor | None = None

    def run(self, shape: Hashable, step: Callable[[], Tensor | None]) -> Tensor | None:
        """Returns the result of ``step``, which is valid until the next call.

        Args:
            shape: identifies the graph: steps of the same shape run the same kernels on the same tensors. The first shape
                must have the largest result.
        """
        if not self.is_enabled:
            return step()
        if shape not in self._graphs and not self._capture_everywhere(shape, step):
            return step()
        graph, result = self._graphs[shape]
        graph.replay()
        return result

    def _capture_everywhere(self, shape: Hashable, step: Callable[[], Tensor | None]) -> bool:
        """Captures a step. If the capture fails on any rank, all ranks stop using graphs.

        A capture runs the step, and so its collectives, more often than a step without a graph. Ranks with and ranks
        without graphs would therefore no longer match.

        Returns:
            True if the step is captured on all ranks.
        """
        failure = "another rank could not capture the step"
        try:
            self._graphs[shape] = self._capture(step)
            is_captured = True
        except RuntimeError as error:
            failure, is_captured = str(error), False
            _end_capture(self._pool)
        if self._all_agree(is_captured):
            return True
        self.is_enabled = False
        self._graphs.clear()
        warnings.warn(
            f"Sampling continues without CUDA graphs, which is slower: {failure}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

    def _capture(self, step: Callable[[], Tensor | None]) -> tuple[Any, Tensor]:
        stream = torch.cuda.current_stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = capture_stream()
        side.wait_stream(stream)
        try:
            # Kernels allocate workspaces at their first call, which is not allowed in a capture: run the step once before.
            with torch.cuda.stream(side):
                first = step()
            stream.wait_stream(side)
            assert first is not None, "a captured step has a result"
            result = self._result_like(first)
            del first
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may copy to the device meanwhile, which the default mode would treat as an error.
            with torch.cuda.graph(graph, self._pool, stream=side, capture_error_mode="thread_local"):
                captured = step()
                assert captured is not None
                result.copy_(captured)
            del captured  # frees the graph's memory in the pool for the next capture
        finally:
            torch.cuda.set_stream(stream)  # after a failed capture torch leaves the side stream current
        return graph, result

    def _result_like(self, first: Tensor) -> Tensor:
        """Returns a tensor of ``first``'s shape for the result. All graphs share its memory."""
        if self._result is None:
            self._result = torch.empty_like(first)
        return self._result[: len(first)]
