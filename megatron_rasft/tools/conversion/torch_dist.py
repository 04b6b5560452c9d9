"""Reads and writes Megatron's torch_dist checkpoints tensor by tensor, without Megatron and without process groups.

A checkpoint is a folder with ``.metadata`` (a pickle with the file and offset of each chunk of each tensor), ``metadata.json``, and
``*.distcp`` files, which are sequences of torch.save records. Facts about Megatron are from core/dist_checkpointing in 0.19.2.

Why this is not torch.distributed.checkpoint's FileSystemReader and FileSystemWriter (torch 2.14):

- FileSystemReader loads each chunk completely before it copies it. A tensor of 1 GiB in one chunk takes 2.0 GiB and 1.4 to 1.8 s of
  CPU time, here 1.0 GiB and 0.8 s. All tensors of a converted 1B model take 7.7 s of CPU time, here 4.8 s.
- FileSystemReader unpickles ``.metadata`` without restrictions, so a checkpoint from elsewhere could run code.
- FileSystemReader compares each request with all chunks of the tensor. A model with thousands of stacked experts has as many
chunks.
- FileSystemWriter writes a whole checkpoint or nothing. A conversion that was killed continues with the missing files.
- torch's view of a record in a file (_ReaderView) seeks to a wrong offset relative to its end, which Python's zipfile does.

This module does use torch's classes for the index.
"""

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import stat
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rasft.errors import CheckpointError, first_line
from megatron_rasft.files import replacing, write_bytes, write_json
from megatron_rasft.tools.conversion.saved_tensors import find_plain_tensor, read_whole
from megatron_rasft.weights.tracker import TRACKER_FILE, has_checkpoint, newest_step, step_folder

_METADATA_FILE = ".metadata"
_CONFIG_FILE = "metadata.json"
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"
"""Key of the object with the arguments, which Megatron reads before the weights."""


class Record(NamedTuple):
    """Location of one chunk of a tensor, or of one object."""

    key: str
    file: str
    start: int
    length: int
    offsets: tuple[int, ...] | None = None
    """Position of the chunk in the whole tensor; None for an object. The following fields are then None too."""
    sizes: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    def to_json(self) -> list[Any]:
        return [*self[:-1], None if self.dtype is None else str(self.dtype).removeprefix("torch.")]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Record":
        key, file, start, length, offsets, sizes, shape, dtype = values
        if dtype is None:
            return cls(key, file, start, length)
        return cls(
            key, file, start, length, tuple(offsets), tuple(sizes), tuple(shape), getattr(torch, dtype)
        )


class DistcpFile:
    """Writes one .distcp file. The file gets its name when it is complete and on the disk."""

    def __init__(self, path: Path) -> None:
        self.records: list[Record] = []
        self._path = path
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "DistcpFile":
        temporary = self._opened.enter_context(replacing(self._path, is_synced=True))
        self._file: BinaryIO = self._opened.enter_context(temporary.open("wb"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def write_chunk(
        self, key: str, chunk: Tensor, offsets: Sequence[int], global_shape: Sequence[int]
    ) -> None:
        """Appends a chunk: a CPU tensor with the same number of dimensions as the complete tensor."""
        assert chunk.ndim == len(offsets) == len(global_shape), (
            f"{key}: chunk and tensor differ in their number of dimensions"
        )
        start, length = self._append(chunk.contiguous() if _owns_storage(chunk) else chunk.clone())
        self.records.append(
            Record(
                key,
                self._path.name,
                start,
                length,
                tuple(offsets),
                tuple(chunk.shape),
                tuple(global_shape),
                chunk.dtype,
            )
        )

    def write_object(self, key: str, value: Any) -> None:
        """Appends an object in the form of Megatron's ShardedObject with one shard."""
        start, length = self._append([value])
        self.records.append(Record(key, self._path.name, start, length))

    def _append(self, value: Any) -> tuple[int, int]:
        start = self._file.tell()
        torch.save(value, self._file)
        return start, self._file.tell() - start


def _owns_storage(tensor: Tensor) -> bool:
    """Returns whether a tensor fills its storage.

    torch.save writes all of a storage, so the caller must copy other tensors first.
    """
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize and tensor.is_contiguous()


def common_state(architecture: dict[str, Any]) -> dict[str, Any]:
    """Returns the state that Megatron reads before the weights: the arguments that it compares, and the format's version.

    Args:
        architecture: values of Megatron's arguments, from ``megatron_args``.
    """
    arguments = {
        **architecture,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "iteration": 0,
    }
    return {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
    }


def write_checkpoint_index(folder: Path, records: Sequence[Record]) -> None:
    """Writes ``.metadata`` and ``metadata.json`` for the records of all files, which completes the checkpoint."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        offsets = None if record.offsets is None else torch.Size(record.offsets)
        places[MetadataIndex(record.key, offsets)] = _StorageInfo(record.file, record.start, record.length)
        if record.global_shape is None or record.sizes is None or offsets is None:
            entries[record.key] = BytesStorageMetadata()
            continue
        assert record.dtype is not None
        entry = entries.setdefault(
            record.key,
            TensorStorageMetadata(
                TensorProperties(dtype=record.dtype), torch.Size(record.global_shape), chunks=[]
            ),
        )
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(record.sizes)))
    metadata = Metadata(
        state_dict_metadata=entries,
        storage_data=places,
        storage_meta=StorageMeta(save_id=str(uuid.uuid4())),
        version="1.0.0",
    )
    write_bytes(folder / _METADATA_FILE, pickle.dumps(metadata), is_synced=True)
    write_json(folder / _CONFIG_FILE, _CONFIG, is_synced=True)


@dataclass(frozen=True)
class TorchDistFolder:
    """A checkpoint opened by ``TorchDistFolder.open``. It holds the index, no weights."""

    path: Path
    """The folder with ``.metadata``."""
    iteration: int
    """Step of the run that wrote the checkpoint; 0 for converted weights."""
    tensors: dict[str, TensorStorageMetadata]
    _places: dict[MetadataIndex, _StorageInfo] = field(repr=False)
    _chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = field(
        repr=False, default_factory=dict
    )
    """(key, number of leading dimensions) -> index in these dimensions -> chunks; filled on demand."""

    @classmethod
    def open(cls, path: str | Path) -> "TorchDistFolder":
        """Opens the newest checkpoint in ``path`` (a run's --save folder), or ``path`` itself if it is a checkpoint.

        Raises:
            CheckpointError: one line with the folder, the mistake and, if possible, a way out.
        """
        path = Path(path)
        folder, iteration = _newest(path)
        _check_config(folder)
        index = folder / _METADATA_FILE
        if index.exists() and not index.is_file():
            raise CheckpointError(f"checkpoint {folder}: {_METADATA_FILE} is not a regular file")
        try:
            with index.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
                raise ValueError("it is not an index of torch.distributed.checkpoint")
            tensors = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint {folder} is incomplete: it has no {_METADATA_FILE}") from None
        except Exception as error:  # damaged pickles raise many kinds of errors
            raise CheckpointError(
                f"checkpoint {folder}: {_METADATA_FILE} cannot be read: {first_line(error)}"
            ) from error
        opened = cls(folder, iteration, tensors, metadata.storage_data)
        opened._check_files()
        return opened

    def _check_files(self) -> None:
        """Refuses a checkpoint with a file that is missing or shorter than its index says."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            if place.transform_descriptors:
                raise CheckpointError(
                    f"checkpoint {self.path} is transformed by {', '.join(place.transform_descriptors)}, which is not "
                    "supported; save it without that"
                )
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for file, end in ends.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise CheckpointError(
                    f"checkpoint {self.path}: {_METADATA_FILE} lists {file!r}, which is outside the folder"
                )
            try:
                status = (self.path / file).stat()
            except FileNotFoundError:
                raise CheckpointError(
                    f"checkpoint {self.path}: {file} is missing, although {_METADATA_FILE} lists it"
                ) from None
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"checkpoint {self.path}: {file} cannot be read: {first_line(error)}"
                ) from error
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"checkpoint {self.path}: {file} is not a regular file")
            size = status.st_size
            if size < end:
                raise CheckpointError(
                    f"checkpoint {self.path}: {file} is truncated: {size} bytes of at least {end}"
                )

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """Reads tensor ``key`` at ``index`` of its leading dimensions, assembled from its chunks, onto the CPU."""
        entry, num_leading = self.tensors[key], len(index)
        whole = torch.empty(entry.size[num_leading:], dtype=entry.properties.dtype)
        found = 0
        for chunk, within in self._chunks_at(key, index):
            target = whole
            for dim, (offset, size) in enumerate(
                zip(chunk.offsets[num_leading:], chunk.sizes[num_leading:], strict=True)
            ):
                target = target.narrow(dim, offset, size)
            self._load(key, chunk, within, target)
            found += target.numel()
        if found != whole.numel():
            raise CheckpointError(
                f"checkpoint {self.path}: the chunks of {key} contain {found} of {whole.numel()} elements"
            )
        return whole

    def read_ahead(self, key: str, index: Sequence[int] = ()) -> None:
        """Asks the kernel to start reading the chunks that ``read`` will need. Returns at once."""
        for chunk, _ in self._chunks_at(key, index):
            place = self._places[MetadataIndex(key, chunk.offsets)]
            with contextlib.suppress(OSError), (self.path / place.relative_path).open("rb") as file:
                os.posix_fadvise(file.fileno(), place.offset, place.length, os.POSIX_FADV_WILLNEED)

    def _chunks_at(
        self, key: str, index: Sequence[int]
    ) -> Iterator[tuple[ChunkStorageMetadata, tuple[int, ...]]]:
        """Yields the chunks that overlap the given index, and the index within each chunk."""
        num_leading = len(index)
        # looked up in a table, because scanning all chunks for each expert of each layer would take hours
        if (key, num_leading) not in self._chunks:
            found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self.tensors[key].chunks:
                bounds = zip(chunk.offsets[:num_leading], chunk.sizes[:num_leading], strict=True)
                for held in product(*(range(start, start + size) for start, size in bounds)):
                    found.setdefault(held, []).append(chunk)
            self._chunks[key, num_leading] = found
        for chunk in self._chunks[key, num_leading].get(tuple(index), ()):
            yield chunk, tuple(i - o for i, o in zip(index, chunk.offsets, strict=False))

    def _load(self, key: str, chunk: ChunkStorageMetadata, within: tuple[int, ...], target: Tensor) -> None:
        """Reads index ``within`` of a chunk into ``target``."""
        place = self._places[MetadataIndex(key, chunk.offsets)]
        try:
            with (self.path / place.relative_path).open("rb", buffering=0) as file:
                record = io.BufferedReader(_FileRange(file, place.offset, place.length))
                start = find_plain_tensor(record, target.dtype, chunk.sizes)
                if start is not None and target.is_contiguous() and target.numel() == math.prod(chunk.sizes):
                    record.seek(start)
                    read_whole(record, target)
                    return
                record.seek(0)
                tensor = torch.load(record, map_location="cpu", weights_only=True)
        except (
            RuntimeError,
            OSError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {key} in {place.relative_path} is damaged: {first_line(error)}"
            ) from error
        if tensor.shape != chunk.sizes or tensor.dtype != target.dtype:
            raise CheckpointError(
                f"checkpoint {self.path}: a chunk of {key} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"{_METADATA_FILE} says {target.dtype} of {list(chunk.sizes)}"
            )
        target.copy_(tensor[within])


def _newest(path: Path) -> tuple[Path, int]:
    """Returns the newest checkpoint in a folder of checkpoints, or the folder itself if it is a checkpoint; and the step (0 if
    unknown)."""
    if has_checkpoint(path):
        step = newest_step(path)
        return step_folder(path, step), step or 0
    if (path / _CONFIG_FILE).is_file():
        name = path.name.removeprefix("iter_")
        return path, int(name) if name.isdecimal() else 0
    found = "does not exist" if not path.exists() else f"has neither {TRACKER_FILE} nor {_CONFIG_FILE}"
    raise CheckpointError(
        f"checkpoint {path} {found}; give a run's --save folder, or one of its iter_ folders"
    )


def _check_config(folder: Path) -> None:
    config = folder / _CONFIG_FILE
    if config.exists() and not config.is_file():
        raise CheckpointError(f"checkpoint {folder}: {_CONFIG_FILE} is not a regular file")
    try:
        backend = json.loads(config.read_text(encoding="utf-8")).get("sharded_backend")
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {folder} has no {_CONFIG_FILE}: it is incomplete, or does not have the format torch_dist "
            "(Megatron's --ckpt-format)"
        ) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder}: {_CONFIG_FILE} cannot be read: {error}") from error
    if backend != _CONFIG["sharded_backend"]:
        raise CheckpointError(
            f"checkpoint {folder} has the format {backend!r}; supported is 'torch_dist' (Megatron's --ckpt-format)"
        )


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles only classes that an index needs, so that a checkpoint from elsewhere cannot run code."""

    _MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("collections", "defaultdict"),
            ("builtins", "set"),
            ("builtins", "frozenset"),
            ("builtins", "complex"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if (module, name) in self._NAMES:
            return super().find_class(module, name)
        if module.startswith(self._MODULES) and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__.startswith(self._MODULES):
                return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of an index")


class _FileRange(io.RawIOBase):
    """A read-only view of ``length`` bytes of an open file, beginning at ``start``."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file = file
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._start + self._position)
        got = self._file.readinto(view[:count])  # type: ignore[attr-defined]
        self._position += got
        return int(got)
