"""Weights for servers on the trainer's own machine, inside the request: no group, no network.

On GPUs the request holds one CUDA IPC handle: a server maps the bucket where it lies and copies from it. Its processes
must see the same GPUs in the same order as the trainer's. On a CPU the request holds the bytes themselves.
"""

import base64
import io
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.multiprocessing  # teaches ForkingPickler about tensors
from torch import Tensor

from megatron_rasft.sync.buckets import Bucket
from megatron_rasft.sync.groups import GroupFailure
from megatron_rasft.sync.server_protocols import Server, ask_all


class _StoragePickler(pickle._Pickler):
    """Pickles tensors so that a server can read them.

    Megatron puts a loader of its own in the place of torch's (megatron/core/__init__.py), and a server, which has no
    Megatron and loads only what it knows, would be told to call that one.
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
    """What /update_weights_from_tensor takes as ``flattened_bucket`` for one tensor-parallel rank, in base64.

    Memory ([num_bytes] uint8) on a GPU must stay as it is until that rank has let go of it, which torch counts (its deleter in
    torch/csrc/StorageSharing.cpp waits for the rank's copies first). The answer says less: it is rank 0's, and SGLang 0.5.23 lets
    the others go only after the barrier before it.
    """
    # SGLang reads these fields of whatever comes (_update_weights_from_flattened_bucket), and its unpickler knows this class
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
    # on a CPU a pickled view would take all the memory it looks into along
    sent = {"flattened_tensor": memory if memory.is_cuda else memory.clone(), "metadata": places}
    content = io.BytesIO()
    if memory.is_cuda:
        # each rank gets a pickle of its own: the handle counts its readers
        ForkingPickler(content, pickle.HIGHEST_PROTOCOL).dump(sent)
    else:
        _StoragePickler(content).dump(sent)
    return base64.b64encode(content.getbuffer()).decode("ascii")


class RequestSender:
    """Sends buckets in requests; stands where a group's ``broadcast`` does.

    Args:
        servers: those that take them.
        tp_sizes: ranks of each.
        timeout_s: longest time for one bucket.
    """

    def __init__(self, servers: Sequence[Server], tp_sizes: Sequence[int], timeout_s: float) -> None:
        self._servers = list(servers)
        self._tp_sizes = {server.url: size for server, size in zip(servers, tp_sizes, strict=True)}
        self._timeout_s = timeout_s

    def send(self, bucket: Bucket, memory: Tensor) -> None:
        """Have every server load a bucket ([num_bytes] uint8).

        Raises:
            GroupFailure: a server did not.
        """
        bytes_once = None if memory.is_cuda else serialize_bucket(bucket, memory)

        def load(server: Server) -> None:
            payloads = [
                bytes_once or serialize_bucket(bucket, memory) for _ in range(self._tp_sizes[server.url])
            ]
            server.update_weights_from_tensor(
                payloads, load_format="flattened_bucket", flush_cache=False, deadline_s=self._timeout_s
            )

        failed = ask_all(self._servers, load)
        if failed:
            raise GroupFailure(next(iter(failed.values())), failed)
