"""The safetensors files of a Hugging Face folder: finds and opens them, and names the fault of one that cannot be read."""

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_rasft.errors import ModelFolderError, first_line
from megatron_rasft.files import read_json_object
from megatron_rasft.weights.dequantizing import QUANTIZED_DTYPES
from megatron_rasft.weights.stored_tensors import DTYPES, StoredTensor, unsupported_type

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NOT_WEIGHTS = ".rotary_emb.inv_freq"
"""Buffers in old Llama folders, which transformers ignores too."""


def shard_files(path: Path) -> dict[str, list[str] | None]:
    """Returns file name -> names of its tensors in the index (None without an index: all tensors of the file)."""
    # transformers also prefers this file to an index; a broken link exists for lexists only
    if os.path.lexists(path / SINGLE_FILE):
        return {SINGLE_FILE: None}
    if os.path.lexists(path / INDEX_FILE):
        return dict(indexed_files(read_json_object(path / INDEX_FILE)))
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ModelFolderError(
            f"has only pickled weights ({pickles[0]}), which are not loaded because they can run code; "
            "convert them with save_pretrained(..., safe_serialization=True) of transformers"
        )
    raise ModelFolderError(f"has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def indexed_files(index: dict[str, Any]) -> dict[str, list[str]]:
    """Returns file name -> names of its tensors. Refuses files outside the folder, which could belong to another model."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{INDEX_FILE} has no weight_map")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or "\0" in file:
            raise ModelFolderError(f"{INDEX_FILE} names no file for {name}, but {file!r}")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ModelFolderError(
                f"{INDEX_FILE} places {name} in {file!r}, which is outside the folder; copy the file into the folder, and "
                "correct the index"
            )
        files.setdefault(file, []).append(name)
    return files


def open_shards(
    path: Path, files: dict[str, list[str] | None]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Opens the files of ``shard_files``; returns file name -> open file, and Hugging Face name -> tensor."""
    shards: dict[str, Any] = {}
    stored: dict[str, StoredTensor] = {}
    for file, promised in files.items():
        shards[file] = shard = _open_shard(path / file)
        present = list(shard.keys())
        starts = _data_starts(path / file)
        for name in promised or ():
            if name not in present:
                raise ModelFolderError(
                    f"{file} does not contain {name}, although {INDEX_FILE} lists it there"
                )
        for name in present:
            if name in stored:
                raise ModelFolderError(f"tensor {name} is in both {stored[name].file} and {file}")
            view = shard.get_slice(name)
            dtype = (DTYPES | QUANTIZED_DTYPES).get(view.get_dtype())
            if dtype is None:
                raise unsupported_type(name, view.get_dtype())
            stored[name] = StoredTensor(file, tuple(view.get_shape()), dtype, starts[name])
    for name in [n for n in stored if n.endswith(_NOT_WEIGHTS)]:
        del stored[name]
    return shards, stored


def _data_starts(path: Path) -> dict[str, int]:
    """Returns the offset of each tensor's bytes. ``safe_open`` has already validated the header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()}


def _open_shard(path: Path) -> Any:
    # opened here first, because safe_open reports every file that it cannot open as missing, and waits for ever at a FIFO
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            raise ModelFolderError(
                f"{path.name} is {'a folder' if stat.S_ISDIR(kind) else 'not a regular file'}; put the file of weights there"
            )
        with path.open("rb") as file:
            start = file.read(12)
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelFolderError(
                f"{path.name} is a link to {path.readlink()}, which does not exist; download the weights again"
            ) from None
        raise ModelFolderError(f"{path.name} is missing, although {INDEX_FILE} lists it") from None
    except OSError as error:
        raise ModelFolderError(f"{path.name} cannot be read: {error.strerror or error}") from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if start == b"version http":
            raise ModelFolderError(
                f"{path.name} is a Git LFS pointer; fetch the weights with git lfs pull"
            ) from None
        size = path.stat().st_size
        raise ModelFolderError(
            f"{path.name} ({size} bytes) is truncated or not safetensors: {first_line(error)}"
        ) from error
