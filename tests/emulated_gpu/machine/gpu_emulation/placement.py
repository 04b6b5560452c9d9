"""Marks the memory of tensors that are on the emulated GPU, and passes the marks on to the results of operations.

All memory is the CPU's. Operations on tensors of both sides fail like on a machine with a GPU, and so does converting a GPU
tensor to numpy. Views and detached tensors share the memory of their base, and therefore its mark.
"""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_emulation import device
from gpu_emulation.device import names_gpu

CPU = torch.device("cpu")

_TAKE_BOTH = (
    "aten::_to_copy",
    "aten::copy_",
    "aten::lift_fresh",
    "aten::set_",
    "c10d::",
    "profiler::",
)
_INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put", "aten::_unsafe_index")
"""Operations that accept index tensors on the CPU for a tensor on the GPU."""

_kernels = threading.local()
"""``made``: the tensors that the running kernel of this thread has created."""

_memory_device = torch._C.TensorBase.device
"""The original property, which ``Tensor.device`` replaces."""


def is_on_gpu(tensor: Tensor) -> bool:
    """Returns whether a tensor is on the GPU.

    A tensor that wraps others, such as an FP8 tensor, is on the side of the wrapped tensors.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return any(is_on_gpu(kept) for kept in vars(tensor).values() if isinstance(kept, Tensor))
    try:
        return getattr(tensor.untyped_storage(), "is_on_gpu", False)
    except (RuntimeError, NotImplementedError):  # the tensor has no memory
        return False


def _mark(tensor: Tensor, *, on_gpu: bool = True) -> Tensor:
    if _memory_device.__get__(tensor).type == "cpu":
        tensor.untyped_storage().is_on_gpu = on_gpu  # type: ignore[attr-defined]
    return tensor


def _leaves(values: Any) -> Iterator[Any]:
    """The values in nested lists, tuples and dictionaries. torch's tree_leaves takes a third of a run's time."""
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        yield values
        return
    for value in values:
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _leaves(value)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, and in the attributes of objects."""
    for leaf in _leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf
        for kept in getattr(leaf, "__dict__", {}).values():
            if isinstance(kept, Tensor):
                yield kept


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return 0


def _mark_new(result: Any, given: list[Tensor]) -> None:
    known = {0, *map(_memory, given)}
    for tensor in _tensors(result):
        if _memory(tensor) not in known:
            _mark(tensor)


class _Places(TorchDispatchMode):
    """Marks the results of operations on GPU tensors, and refuses operations on tensors of both CPU and GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = getattr(_kernels, "made", None)
        if made is not None:
            result = func(*args, **kwargs)
            made.append(result)
            return result
        name = func.name()
        given = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        some_on_gpu = any(map(is_on_gpu, given))
        if some_on_gpu and not name.startswith(_TAKE_BOTH):
            _check(name, given)
        result = func(*args, **kwargs)
        if some_on_gpu:
            _mark_new(result, given)
        return result


def _check(name: str, given: list[Tensor]) -> None:
    if name.startswith(_INDEXING) and is_on_gpu(given[0]):
        return
    for tensor in given:
        # Scalars may come from the CPU.
        if not is_on_gpu(tensor) and tensor.dim() > 0 and _memory_device.__get__(tensor).type == "cpu":
            sides = [(tuple(t.shape), str(t.device)) for t in given]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! {name}: {sides}"
            )


_REPLACED = frozenset(
    getattr(Tensor, name) for name in ("pin_memory", "type", "numpy", "__array__", "cuda", "cpu", "to")
)
"""Methods that differ here even without the keyword argument ``device``."""


class _GpuInHostMemory(TorchFunctionMode):
    """Creates tensors that are requested on a GPU in the CPU's memory, and marks them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func not in _REPLACED:
            return func(*args)
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            name = func(args[0])
            return name.replace("torch.", "torch.cuda.", 1) if is_on_gpu(args[0]) else name
        if func in (Tensor.numpy, Tensor.__array__) and is_on_gpu(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if func in (Tensor.cuda, Tensor.cpu):
            return _moved(args[0], args[0], to_gpu=func is Tensor.cuda)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        target = kwargs.get("device")
        if target is None:
            return func(*args, **kwargs)
        to_gpu = names_gpu(target)
        kwargs["device"] = CPU if to_gpu else target
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            _mark(tensor, on_gpu=to_gpu)
        return result


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    target: Any = kwargs.get("device")
    for value in args:
        if isinstance(value, Tensor):
            target = value.device
        elif isinstance(value, str | torch.device) or names_gpu(value):
            target = value
    to_gpu = names_gpu(target)
    if to_gpu and "device" in kwargs:
        kwargs["device"] = CPU
    result = Tensor.to(tensor, *(CPU if names_gpu(a) else a for a in args), **kwargs)
    if to_gpu or (target is not None and torch.device(target).type == "cpu"):
        return _moved(tensor, result, to_gpu=to_gpu)
    return result


def _moved(source: Tensor, result: Tensor, *, to_gpu: bool) -> Tensor:
    """Returns the tensor on the requested side; a copy if it was on the other."""
    if is_on_gpu(result) == to_gpu:
        return result
    if _memory(result) == _memory(source):
        result = result.clone()
    return _mark(result, on_gpu=to_gpu)


def on_gpu(kernel: Any) -> Any:
    """Runs a kernel of a library.

    Its arguments must be on the GPU, and its results are marked as on the GPU. Operations inside are not checked.
    """

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = list(_tensors((args, kwargs)))
        for tensor in given:
            if not is_on_gpu(tensor) and tensor.numel():
                raise RuntimeError(
                    f"{kernel.__name__} was given a tensor {tuple(tensor.shape)} that is not on the GPU"
                )
        before, _kernels.made = getattr(_kernels, "made", None), []
        try:
            with torch._C.DisableTorchFunction():
                result = kernel(*args, **kwargs)
            _mark_new([result, _kernels.made], given)
        finally:
            _kernels.made = before
        return result

    return call


def _with_mode(run_backward: Any) -> Any:
    """Runs a backward pass with the mode on. torch switches it off while it handles the call of torch.autograd.backward."""

    @functools.wraps(run_backward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _GpuInHostMemory():
            return run_backward(*args, **kwargs)

    return run


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cuda", device.current) if is_on_gpu(tensor) else _memory_device.__get__(tensor)


def _enter() -> None:
    _Places().__enter__()
    _GpuInHostMemory().__enter__()


def install() -> None:
    """Separates CPU and GPU tensors in every thread of this process."""
    Tensor.device = property(_device)  # type: ignore[assignment]
    Tensor.is_cuda = property(is_on_gpu)  # type: ignore[assignment]
    Tensor.is_cpu = property(lambda tensor: not is_on_gpu(tensor))  # type: ignore[assignment]
    for module in (torch.autograd, torch.autograd.graph):
        module._engine_run_backward = _with_mode(module._engine_run_backward)  # type: ignore[attr-defined]
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def begin_with_modes(thread: threading.Thread) -> None:
        _enter()
        begin(thread)

    threading.Thread._bootstrap_inner = begin_with_modes  # type: ignore[attr-defined]
    _enter()
