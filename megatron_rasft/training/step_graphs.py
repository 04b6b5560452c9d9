"""CUDA graphs of the decode step: one launch for the hundreds of kernels of a token."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _side_stream() -> Any:
    """The stream of all captures of this process: cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream it ever ran on."""
    return torch.cuda.Stream()


def _end_capture(pool: Any) -> None:
    """End a capture that failed for the allocator too.

    capture_end of torch's CUDAGraph.cpp leaves that out where CUDA cannot end the capture. The allocator would then hold back
    the memory of tensors of several streams for the rest of the run.
    """
    with contextlib.suppress(
        RuntimeError
    ):  # the step failed before its capture began, or the capture did end
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class StepGraphs:
    """Captures a step once for each shape and replays it from then on.

    A captured step reads and writes the same tensors at each replay, and must not read anything back. The
    graphs live as long as this object.

    Args:
        is_enabled: False runs every step as it is.
        all_agree: whether every rank says so; a collective of the ranks that take steps together.
    """

    def __init__(self, is_enabled: bool, all_agree: Callable[[bool], bool]) -> None:
        self.is_enabled = is_enabled
        self._all_agree = all_agree
        self._graphs: dict[Hashable, tuple[Any, Tensor]] = {}
        self._pool: Any = None
        self._result: Tensor | None = None

    def run(self, shape: Hashable, step: Callable[[], Tensor | None]) -> Tensor | None:
        """The result of ``step``, valid until the next run.

        Args:
            shape: steps with equal shapes do the same work on the same tensors. The first shape has the largest result.
        """
        if not self.is_enabled:
            return step()
        if shape not in self._graphs and not self._capture_everywhere(shape, step):
            return step()
        graph, result = self._graphs[shape]
        graph.replay()
        return result

    def _capture_everywhere(self, shape: Hashable, step: Callable[[], Tensor | None]) -> bool:
        """Capture a step; where a rank could not, no rank goes on with graphs.

        A capture runs the step and its collectives once more than a rank without graphs does.
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
            f"Sampling goes on without CUDA graphs, which is slower: {failure}", RuntimeWarning, stacklevel=3
        )
        return False

    def _capture(self, step: Callable[[], Tensor | None]) -> tuple[Any, Tensor]:
        stream = torch.cuda.current_stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = _side_stream()
        side.wait_stream(stream)
        try:
            # Kernels allocate their workspaces at the first call, which a capture does not allow.
            with torch.cuda.stream(side):
                first = step()
            stream.wait_stream(side)
            assert first is not None, "a captured step has a result"
            result = self._result_like(first)
            del first
            graph = torch.cuda.CUDAGraph()
            # Other threads of the program may copy to the device meanwhile.
            with torch.cuda.graph(graph, self._pool, stream=side, capture_error_mode="thread_local"):
                captured = step()
                assert captured is not None
                result.copy_(captured)
            del captured  # its memory serves the next capture
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves the side stream current
        return graph, result

    def _result_like(self, first: Tensor) -> Tensor:
        """The graphs share one result, so that none keeps memory of the pool for its own."""
        if self._result is None:
            self._result = torch.empty_like(first)
        return self._result[: len(first)]
