"""Counts memory traffic from the arguments of every torch operator that runs, on the meta device or a real one."""

import math
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_NO_KERNEL = frozenset(
    "_unsafe_view unsafe_split lift_fresh detach reshape empty empty_like empty_strided new_empty".split()
)
"""Operators without memory traffic: views that are not marked as such in their schema, and allocations."""

_WRITE_ONLY = ("zeros", "zero_", "full", "new_zeros", "new_full", "fill", "ones", "scalar_tensor")
_MATMULS = ("mm", "bmm", "addmm", "addmm_")
_GATHERS = ("gather", "index", "index_select", "embedding")
_SCATTERS = ("scatter_", "scatter_add_", "index_put_", "_index_put_impl_")
_NO_OPERATORS = ("prim", "c10d", "_c10d_functional")
"""Namespaces that are not counted: queries about tensors, and collectives."""


def _num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements; an expanded tensor is read once."""
    num = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)
    return num * tensor.element_size()


def _launches(func: Any) -> bool:
    """Returns whether a call of this operator launches a kernel."""
    name = func._schema.name.split("::")[1]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not is_view and name not in _NO_KERNEL and func.namespace not in _NO_OPERATORS


def operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Returns the bytes that a call of a torch operator moves, from its arguments and results."""
    name = func._schema.name.split("::")[1]
    results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
    if name.startswith(_WRITE_ONLY):
        return sum(map(_num_bytes, results))
    read, written = [], list(results)
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [
        (argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs
    ]
    for argument, value in given:
        tensors = [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += [x for x in tensors if not any(x is result for result in results)]
        if not (is_written and (argument.kwarg_only or name == "copy_")):
            read += tensors
    if name in ("addmm", "addmm_") and kwargs.get("beta", 1) == 0:
        read = read[1:]  # the previous content of the result is not read
    if name in _GATHERS:  # only the indexed elements and the indices are read
        return 2 * sum(map(_num_bytes, results)) + sum(map(_num_bytes, read[1:]))
    if name in _SCATTERS:
        return 2 * _num_bytes(read[-1]) + sum(map(_num_bytes, read[1:-1]))
    return sum(map(_num_bytes, read)) + sum(map(_num_bytes, written))


class Traffic(TorchDispatchMode):
    """Counts the kernels and bytes of all operators in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = 0
        self.num_bytes = 0
        """Bytes of all operators except matrix products."""
        self.matmul_bytes = 0
        self.matmul_flops = 0

    @property
    def all_bytes(self) -> int:
        """Bytes of all operators, including matrix products."""
        return self.num_bytes + self.matmul_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if not _launches(func):
            return out
        moved = operator_bytes(func, args, kwargs, out)
        self.num_kernels += 1
        if name in _MATMULS:
            left, right = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)][-2:]
            self.matmul_flops += 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
            self.matmul_bytes += moved
        else:
            self.num_bytes += moved
        return out
