"""Memory traffic counted from the arguments of every torch operator that runs, on the meta device or a real one."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_VIEWS = frozenset(
    "view _unsafe_view reshape t transpose slice unsqueeze squeeze select detach expand split unbind alias as_strided "
    "permute lift_fresh split_with_sizes empty empty_like empty_strided new_empty unsafe_split".split()
)
_WRITE_ONLY = ("zeros", "zero_", "full", "new_zeros", "new_full", "fill", "ones", "scalar_tensor")
_MATMULS = ("mm", "bmm", "addmm", "addmm_")
_BY_INDEX = ("gather", "scatter", "scatter_add", "scatter_add_", "index_select", "embedding")


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one call of a torch operator moves, from its arguments and results."""
    name = func._schema.name.split("::")[1]
    results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
    if name in _VIEWS:
        return 0
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
        read = read[1:]  # the sum so far is not looked at
    if name in _BY_INDEX:
        # only the elements that are named, and the indices
        return sum(_num_bytes(x) for x in read[1:]) * 2
    return sum(map(_num_bytes, read)) + sum(map(_num_bytes, written))


class Traffic(TorchDispatchMode):
    """Counts kernels and bytes while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = 0
        self.num_bytes = 0
        """Of everything but matrix products."""
        self.matmul_bytes = 0
        self.matmul_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        moved = operator_bytes(func, args, kwargs, out)
        if name in _VIEWS:
            return out
        self.num_kernels += 1
        if name in _MATMULS:
            left, right = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)][-2:]
            self.matmul_flops += 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
            self.matmul_bytes += moved
        else:
            self.num_bytes += moved
        return out
