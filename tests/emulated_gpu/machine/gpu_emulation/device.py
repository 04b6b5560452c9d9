"""torch.cuda of the emulated machine."""

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.graphs

_GIB = 1 << 30
_MEMORY_BYTES = 80 * _GIB
_DEVICE_FILE = "/dev/nvidiactl"
"""Objects that torch creates only if there is a GPU."""

current = 0
"""Index of the current device of this process."""


def names_gpu(device: Any) -> bool:
    """Returns whether torch would accept this as a GPU: an index, "cuda", "cuda:1" or a device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class Stream:
    """A CUDA stream or event on which every operation is complete when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.device = torch.device("cuda", current)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "Stream":
        return Stream()

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _set_device(device: Any) -> None:
    global current
    index = device if isinstance(device, int) else torch.device(device).index
    if index is None:
        return
    if not 0 <= index < device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")
    current = index


@contextlib.contextmanager
def _device(device: Any) -> Iterator[None]:
    before = current
    _set_device(before if device is None else device)
    try:
        yield
    finally:
        _set_device(before)


def device_count() -> int:
    """The number of GPUs: the number of processes on this node, but at least 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name="Emulated H100 80GB",
        major=9,
        minor=0,
        total_memory=_MEMORY_BYTES,
        multi_processor_count=132,
        warp_size=32,
        shared_memory_per_block_optin=232448,
        gcnArchName="",
    )


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _answers() -> dict[str, Any]:
    stream = Stream()

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    def in_order(*args: Any, **kwargs: Any) -> Stream:
        return stream

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **kwargs: call(),
        "current_device": lambda: current,
        "device_count": device_count,
        "set_device": _set_device,
        "device": _device,
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "current_stream": in_order,
        "default_stream": in_order,
        "set_stream": nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Stream,
        "is_current_stream_capturing": lambda: False,
        # CPU and GPU share one random generator.
        "default_generators": (torch.default_generator,) * 8,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_capability": lambda *args, **kwargs: (9, 0),
        "get_device_name": lambda *args, **kwargs: _properties().name,
        "get_device_properties": _properties,
        "mem_get_info": lambda *args, **kwargs: (_MEMORY_BYTES - _GIB, _MEMORY_BYTES),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "reset_peak_memory_stats": nothing,
        "reset_max_memory_allocated": nothing,
        "can_device_access_peer": lambda *args, **kwargs: True,
    }
    for counter in ("memory_allocated", "memory_reserved"):
        answers[counter] = answers[f"max_{counter}"] = zero
    return answers


def install() -> None:
    """Makes torch in this process behave as on a machine with GPUs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name, answer in _answers().items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "default_generators"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.cuda.graphs.is_current_stream_capturing = torch.cuda.is_current_stream_capturing  # type: ignore[assignment]
    exists = os.path.exists
    os.path.exists = lambda path: path == _DEVICE_FILE or exists(path)  # type: ignore[assignment]
    # Megatron imports it, and it warns that there is no CUDA runtime.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
