"""Emulates CUDA graphs on a CPU: a capture records all operations, and a replay repeats them on the same tensors.

Like a real graph, a replay does not run Python code. Values that the host computed stay those of the capture, tensors that
Python replaced later are not used, and an operation that reads data to the host raises an error during a capture.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rasft.generation.policy_sampler import STEPS_PER_READ

FREE_BYTES = 1 << 20
"""Free memory of the emulated GPU."""

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
    "is_nonzero",
}


class RecordedGraph:
    """Replaces torch.cuda.CUDAGraph."""

    num_captured = 0
    num_replayed = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        type(self).num_replayed += 1
        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                again = func(*args, **kwargs)
                if isinstance(again, Tensor):  # the usual case, for which tree_leaves is slow
                    _overwrite(recorded, again)
                    continue
                for value in tree_leaves(again):
                    if isinstance(
                        value, torch.ScriptObject
                    ):  # a collective, which gloo runs in the background
                        value.wait()
                for target, made in zip(tensors(recorded), tensors(again), strict=True):
                    _overwrite(target, made)


def _overwrite(target: Tensor, made: Tensor) -> None:
    if made.data_ptr() != target.data_ptr():
        target.copy_(made)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        if not name.startswith(
            ("empty", "new_empty")
        ):  # they run no kernel, and Megatron later replaces the memory of such tensors
            self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextlib.contextmanager
def capture(graph: RecordedGraph, *unused: Any, **also_unused: Any) -> Iterator[None]:
    """Replaces torch.cuda.graph. Unlike a real capture, this one also computes the results."""
    with _Recording(graph):
        yield
    type(graph).num_captured += 1


@contextlib.contextmanager
def on_a_gpu(sampler: Any) -> Iterator[type[RecordedGraph]]:
    """Makes a PolicySampler take its branches for GPUs, on a CPU whose backend is enabled.

    The value is a class that counts the graphs captured and replayed in this context.
    """
    graphs = type("Graphs", (RecordedGraph,), {"num_captured": 0, "num_replayed": 0})
    answers = {
        "CUDAGraph": graphs,
        "graph": capture,
        "graph_pool_handle": lambda: None,
        "set_stream": lambda stream: None,
        "mem_get_info": lambda *unused: (FREE_BYTES, FREE_BYTES),
    }
    before = {name: getattr(torch.cuda, name) for name in answers}
    device, steps_per_read = sampler.device, sampler.steps_per_read
    sampler.device, sampler.steps_per_read = torch.device("cuda"), STEPS_PER_READ["cuda"]
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        yield graphs
    finally:
        sampler.device, sampler.steps_per_read = device, steps_per_read
        for name, answer in before.items():
            setattr(torch.cuda, name, answer)
