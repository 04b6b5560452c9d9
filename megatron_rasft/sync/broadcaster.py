"""Broadcasts from this rank to the servers over one of torch's backends, without registering a group in torch.distributed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

GroupBackend = Literal["gloo", "nccl"]

_POLL_S = 0.001
"""Interval at which an NCCL broadcast is checked for its end."""


def prepare_nccl(interface: str | None = None) -> None:
    """Sets environment variables so that this process's NCCL can connect to SGLang's. Call it before the first use of NCCL.

    SGLang switches NCCL's cuMem allocator off (_set_envs_and_config in srt/entrypoints/engine.py), and two processes on
    one node with different settings cannot map each other's memory. A value that the user has set is kept.

    Args:
        interface: network interface, or a pattern in NCCL's syntax, for all NCCL traffic of this process.
    """
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    if interface:
        os.environ["NCCL_SOCKET_IFNAME"] = interface


class Broadcaster:
    """Rank 0 of a process group. The constructor returns when all ranks have joined; gloo raises an error after the time-out.

    Args:
        backend: gloo or nccl.
        store: store of the rendezvous.
        name: name of the group, also on the servers.
        world_size: number of ranks.
        interface: network interface for gloo; None lets gloo choose.
        device: device of the memory that will be broadcast.
        timeout: longest time for joining, and for one broadcast.
    """

    def __init__(
        self,
        backend: GroupBackend,
        store: dist.Store,
        name: str,
        world_size: int,
        interface: str | None,
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        self._device = device
        self._use_device()
        # a separate stream: the next bucket is gathered on the trainer's stream, which must not wait for the servers
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # the keys that the servers use (torch's _new_process_group_helper)
        for prefix in (name, f"{name}/", f"{device.type}/"):
            store = dist.PrefixStore(prefix, store)
        self._backend = (_gloo if backend == "gloo" else _nccl)(store, world_size, interface, timeout)

    def send(self, memory: Tensor) -> None:
        """Broadcasts memory ([num_bytes] uint8) and waits until this rank has sent it. Raises the error of a failed broadcast."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        # this thread keeps a reference: gloo's destructor waits for running collectives, which must not block the main thread
        backend = self._backend
        if self._stream is None:
            backend.broadcast([memory], options).wait()
            return
        self._use_device()
        with torch.cuda.stream(self._stream):
            work = backend.broadcast([memory], options)
            # wait() would make a stream wait for the broadcast, and with CUDA_DEVICE_MAX_CONNECTIONS=1 all streams with it
            while not work.is_completed():
                time.sleep(_POLL_S)
            work.wait()  # raises the error of a failed broadcast

    def abort(self) -> None:
        """Ends the group. A running gloo broadcast still runs until its time-out."""
        self._backend.abort()

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a property of each thread


def _gloo(store: dist.Store, world_size: int, interface: str | None, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [
        gloo.create_device(interface=interface) if interface else gloo.create_default_device()
    ]
    options._timeout = timeout
    options._threads = 2
    return gloo(store, 0, world_size, options)


def _nccl(store: dist.Store, world_size: int, interface: str | None, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    # longer than UpdateGroup's own deadline, which aborts first
    options._timeout = timeout * 10 + timedelta(minutes=10)
    # torch's watchdog ends the process at the first NCCL error, for example when a server dies. With these variables,
    # which the group reads when it is created, there is no watchdog, and wait() raises the error (ProcessGroupNCCL.cpp).
    with _environment(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):
        return dist.ProcessGroupNCCL(store, 0, world_size, options)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
