"""Tensors inside torch.save's records, found without unpickling them: read straight to where they are wanted.

A record is a ZIP archive that stores its members as they are; ``data.pkl`` describes the tensor, ``data/0`` is its
storage (torch.serialization, seen in 2.11 and 2.14).
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_LOCAL_HEADER_BYTES = 30
_LOCAL_LENGTHS = struct.Struct("<HH")
_LOCAL_LENGTHS_AT = 26
"""Of the header that stands before each member: its fixed part, and where the lengths of name and rest are."""


_STORAGES = {
    torch.bfloat16: "BFloat16Storage",
    torch.float16: "HalfStorage",
    torch.float32: "FloatStorage",
}


class _Unknown(Exception):
    """The pickle names something that a plain tensor does not."""


class _Described(NamedTuple):
    """What data.pkl says of its tensor."""

    storage: tuple[Any, ...]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: tuple[Any, ...], offset: int, shape: Any, stride: Any, *_: Any) -> _Described:
    return _Described(storage, offset, tuple(shape), tuple(stride))


class _Describer(pickle.Unpickler):
    """Reads the description of one tensor; builds nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise _Unknown(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def find_plain_tensor(record: BinaryIO, dtype: torch.dtype, shape: Sequence[int]) -> int | None:
    """Where in a record the elements of its one tensor lie, row after row.

    Args:
        record: read from its start to its end.
        dtype, shape: what the tensor is expected to be.

    Returns:
        Offset in bytes; None if the record holds anything else, which ``torch.load`` may then make out.

    Raises:
        zipfile.BadZipFile: it is no whole archive.
    """
    if dtype not in _STORAGES:
        return None
    with zipfile.ZipFile(record) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        storage = members.get("data/0")
        if storage is None or "data.pkl" not in members or "data/1" in members:
            return None
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            return None
        try:
            with archive.open(members["data.pkl"]) as file:
                found = _Describer(file).load()
        except (_Unknown, pickle.UnpicklingError):
            return None
    is_plain = (
        isinstance(found, _Described)
        and found.storage[:3] == ("storage", _STORAGES[dtype], "0")
        and (found.offset, found.shape) == (0, tuple(shape))
        and _is_row_major(found.shape, found.stride)
        and storage.compress_type == zipfile.ZIP_STORED
        and storage.file_size == math.prod(shape) * dtype.itemsize
    )
    if not is_plain:
        return None
    record.seek(storage.header_offset + _LOCAL_LENGTHS_AT)
    name, rest = _LOCAL_LENGTHS.unpack(record.read(_LOCAL_LENGTHS.size))
    return storage.header_offset + _LOCAL_HEADER_BYTES + name + rest


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(
        size == 1 or step == math.prod(shape[i + 1 :])
        for i, (size, step) in enumerate(zip(shape, stride, strict=True))
    )


def read_whole(file: BinaryIO, target: Tensor) -> None:
    """Fill ``target``, a contiguous CPU tensor, from where the file stands.

    Raises:
        EOFError: the file ends before.
    """
    raw = memoryview(target.reshape(-1).view(torch.uint8).numpy())
    while raw:
        count = file.readinto(raw)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the file ends within it")
        raw = raw[count:]
