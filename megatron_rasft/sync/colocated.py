"""Sends weights to servers on the trainer's machine inside the request, without a process group (--sync-method tensor).

On GPUs the request holds a CUDA IPC handle: the server maps the bucket and copies from it. The server's processes must see the same
GPUs in the same order as the trainer's. On a CPU the request holds the bytes themselves.
"""

import base64
import io
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.multiprocessing  # this import registers tensors with ForkingPickler
from torch import Tensor

from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import call_all
from megatron_rasft.sync.buckets import Bucket
from megatron_rasft.sync.groups import GroupFailure


class _StoragePickler(pickle._Pickler):
    """Pickles tensors in a form that a server can read.

    Megatron replaces torch's loader of storages with its own (megatron/core/__init__.py), which a plain pickle would name. A server
    has no Megatron, and SGLang's unpickler accepts only the names that it knows.
    """

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def _save_function(self: Any, function: Any, name: str | None = None) -> None:
        if function is torch.storage._load_from_bytes:
            self.write(pickle.GLOBAL + b"torch.storage\n_load_from_bytes\n")
            self.memoize(function)
        else:
            self.save_global(function, name)

    dispatch[FunctionType] = _save_function


def serialize_bucket(bucket: Bucket, memory: Tensor) -> str:
    """Returns the payload of /update_weights_from_tensor for one tensor-parallel rank: a ``flattened_bucket`` in base64.

    Memory ([num_bytes] uint8) on a GPU must not change until that rank has closed the handle. torch counts the readers (the
    deleter in torch/csrc/StorageSharing.cpp waits for their copies). The server's answer is not sufficient: it comes from rank
    0, and in SGLang 0.5.23 the other ranks may still be reading then.
    """
    # SGLang reads only these fields (_update_weights_from_flattened_bucket), and its unpickler accepts this class
    places = [
        SimpleNamespace(
            name=wire.name,
            shape=wire.shape,
            dtype=wire.dtype,
            start_idx=start,
            end_idx=stop,
            numel=stop - start,
        )
        for wire, start, stop in bucket.slots
    ]
    # pickling a view would include the whole storage behind it
    sent = {"flattened_tensor": memory if memory.is_cuda else memory.clone(), "metadata": places}
    content = io.BytesIO()
    if memory.is_cuda:
        # pickled once per rank, because the handle counts its readers
        ForkingPickler(content, pickle.HIGHEST_PROTOCOL).dump(sent)
    else:
        _StoragePickler(content).dump(sent)
    return base64.b64encode(content.getbuffer()).decode("ascii")


class RequestSender:
    """Sends buckets in requests, as an alternative to ``UpdateGroup.broadcast``.

    Args:
        servers: the receivers.
        tp_sizes: tensor-parallel size of each server.
        timeout_s: longest time for one bucket.
    """

    def __init__(self, servers: Sequence[ServerClient], tp_sizes: Sequence[int], timeout_s: float) -> None:
        self._servers = list(servers)
        self._tp_sizes = {server.url: size for server, size in zip(servers, tp_sizes, strict=True)}
        self._timeout_s = timeout_s

    def send(self, bucket: Bucket, memory: Tensor) -> None:
        """Makes every server load a bucket ([num_bytes] uint8).

        Raises:
            GroupFailure: names the servers that failed.
        """
        bytes_once = None if memory.is_cuda else serialize_bucket(bucket, memory)

        def load(server: ServerClient) -> None:
            payloads = [
                bytes_once or serialize_bucket(bucket, memory) for _ in range(self._tp_sizes[server.url])
            ]
            server.update_weights_from_tensor(payloads, deadline_s=self._timeout_s)

        failed = call_all(self._servers, load)
        if failed:
            raise GroupFailure(next(iter(failed.values())), failed)
