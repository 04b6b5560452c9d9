"""A Hugging Face model folder: completely checked when it is opened, read slice by slice afterwards."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.files import read_json_object
from megatron_rasft.weights.architecture import ModelDescription, Rope
from megatron_rasft.weights.dequantizing import QuantizedWeight, dequantize_mxfp4, read_dequantized
from megatron_rasft.weights.families import Family, JoinedTensor, ModelShape, NameTable
from megatron_rasft.weights.quantization import read_quantization
from megatron_rasft.weights.shard_files import (
    INDEX_FILE,
    SINGLE_FILE,
    indexed_files,
    open_shards,
    shard_files,
)
from megatron_rasft.weights.stored_tensors import (
    DTYPES,
    StoredTensor,
    Within,
    split_joined,
    take_quantized,
    wrong_shape,
)
from megatron_rasft.wording import counted

CARRIED_FILE = "carried.safetensors"
"""File with the carried tensors of a model, in the description that lies beside a converted checkpoint."""

_COMPARE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ModelFolder(ABC):
    """A folder with a model. It holds headers and memory maps, no weights."""

    path: Path
    config: dict[str, Any]
    shape: ModelShape
    tensors: dict[str, StoredTensor]
    """Hugging Face name -> tensor."""
    buffers: Set[str]
    """Names of tensors that training does not change. Exports keep their types."""
    _shards: dict[str, Any] = field(repr=False)
    carried: dict[str, StoredTensor] = field(default_factory=dict)
    """Tensors that are not part of the trained model, such as layers for multi-token prediction. Exports get a copy of them."""
    _quantized: dict[str, QuantizedWeight] = field(default_factory=dict, repr=False)
    """The weights that are dequantized when they are read. ``tensors`` and ``carried`` have their shape and type after that."""
    _sources: dict[str, StoredTensor] = field(default_factory=dict, repr=False)
    """The stored tensors of quantized weights."""
    joined: dict[str, JoinedTensor] = field(default_factory=dict)
    """Name -> tensor with all experts of a layer. ``tensors`` lists its parts instead. An export has the same joined tensors."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The model's class in transformers."""

    @property
    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the model."""

    @property
    def is_own_code(self) -> bool:
        """Whether transformers has no class for the model, so that exports need the folder's code."""
        return False

    @property
    def dtype(self) -> torch.dtype | None:
        """The weight type that config.json names; None if it names no type or an unsupported one."""
        name = str(self.config.get("dtype", self.config.get("torch_dtype")))
        return {str(t).removeprefix("torch."): t for t in DTYPES.values()}.get(name)

    @property
    def is_quantized(self) -> bool:
        """Whether weights are dequantized when they are read."""
        return bool(self._quantized)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads tensor ``name``, or its range ``start:stop`` along ``dim``, onto the CPU.

        The result has the stored type, or bfloat16 if the tensor is stored quantized.
        """
        if name in self._quantized:
            return read_dequantized(self._quantized[name], self._read_source, dim, start, stop)
        return self._read_stored(name, self.tensors.get(name) or self.carried[name], dim, start, stop)

    def _read_source(self, name: str, dim: int, start: int, stop: int | None) -> Tensor:
        return self._read_stored(name, self._sources[name], dim, start, stop)

    def _read_stored(self, name: str, stored: StoredTensor, dim: int, start: int, stop: int | None) -> Tensor:
        try:
            if stored.within is not None and stored.within.step:
                return self._read_columns(stored, stored.within, dim, start, stop)
            if not stored.shape:
                return self._shards[stored.file].get_tensor(name)
            if dim == 0:
                return self._read_rows(stored, start, stored.shape[0] if stop is None else stop)
            if stored.within is not None:
                assert dim == 1, "a part has rows and columns"
                whole, expert, row, _ = stored.within
                rows = slice(row, row + stored.shape[0])
                return self._shards[stored.file].get_slice(whole)[expert, rows, start:stop]
            view = self._shards[stored.file].get_slice(name)
            return view[(slice(None),) * dim + (slice(start, stop),)]
        except (SafetensorError, OSError, EOFError) as error:
            raise ModelFolderError(f"{self.path / stored.file}: cannot read {name}: {error}") from error

    def _read_columns(
        self, stored: StoredTensor, within: Within, dim: int, start: int, stop: int | None
    ) -> Tensor:
        """Reads alternating columns of an expert, as rows. MXFP4 stores them as rows."""
        chosen = [slice(0, size) for size in stored.shape]
        chosen[dim] = slice(start, stored.shape[dim] if stop is None else min(stop, stored.shape[dim]))
        columns = slice(within.step * chosen[0].start, within.step * chosen[0].stop)
        picked = slice(within.first, None, within.step)
        weight = self._quantized.get(within.name)
        if weight is not None:
            packed, exponents = (
                self._shards[self._sources[name].file].get_slice(name)[within.expert, columns][picked]
                for name in (weight.values, weight.scales)
            )
            return dequantize_mxfp4(packed, exponents)[:, *chosen[1:]]
        view = self._shards[stored.file].get_slice(within.name)
        return view[(within.expert, *chosen[1:], columns)][..., picked].t().contiguous()

    def _read_rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Reads consecutive rows in one read. The memory map would fetch them page by page, which is slower."""
        stop = min(stop, stored.shape[0])
        rows = torch.empty((max(0, stop - start), *stored.shape[1:]), dtype=stored.dtype)
        raw = memoryview(rows.reshape(-1).view(torch.uint8).numpy())
        with (self.path / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.start + start * math.prod(stored.shape[1:]) * stored.dtype.itemsize)
            while raw:
                count = file.readinto(raw)
                if not count:
                    raise EOFError("the file ends within the tensor")
                raw = raw[count:]
        return rows


@dataclass(frozen=True, kw_only=True)
class HfFolder(ModelFolder):
    """A folder opened by ``HfFolder.open``. ``tensors`` are exactly those of ``table``, or empty if opened without weights."""

    family: Family
    rope: Rope
    table: NameTable

    @classmethod
    def open(cls, path: str | Path, *, with_weights: bool = True) -> "HfFolder":
        """Opens a folder and checks it against the table of its family.

        Args:
            path: the folder.
            with_weights: False reads only the model's description, for which the folder needs no weights.

        Raises:
            ModelFolderError: one line with the folder, the mistake and, if possible, a way out.
        """
        path = Path(path)
        known = ModelDescription.read(path)
        try:
            table = NameTable(known.family, known.shape)
            files = shard_files(path) if with_weights else _carried_files(path, known)
            shards, stored = open_shards(path, files)
            quantized, sources = take_quantized(
                stored, read_quantization(known.family.text_config(known.config))
            )
            carried = {name: stored.pop(name) for name in list(stored) if known.is_carried(name)}
            joined = table.joined if known.family.writes_joined_experts else {}
            if with_weights:
                joined = {name: tensor for name, tensor in table.joined.items() if name in stored}
            stored = split_joined(stored, joined) if with_weights else {}
            folder = cls(
                path=path,
                config=known.config,
                shape=known.shape,
                tensors=stored,
                buffers=table.buffers,
                _shards=shards,
                carried=carried,
                _quantized=quantized,
                _sources=sources,
                joined=joined,
                family=known.family,
                rope=known.rope,
                table=table,
            )
            if with_weights:
                folder._check_tensors()
            check_tokenizer(path, known.shape.vocab_size)
        except ModelFolderError as error:
            raise ModelFolderError(f"model folder {path}: {error}") from error.__cause__
        return folder

    @property
    def architecture(self) -> str:
        return self.family.architecture

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.table.hf_shapes

    @property
    def is_own_code(self) -> bool:
        return self.family.is_own_code

    def _check_tensors(self) -> None:
        expected = self.table.hf_shapes
        output = self.table.output_name
        if self.shape.is_tied and output in self.tensors:
            self._drop_stored_tied_output()
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in expected]
        if missing == [output]:
            raise ModelFolderError(
                f"{output} is missing; if the model uses its embedding as output layer, set tie_word_embeddings to true in "
                "config.json"
            )
        if missing:
            raise ModelFolderError(
                f"it lacks {counted(len(missing), 'tensor')} of the model, the first is {missing[0]}"
            )
        if extra:
            raise ModelFolderError(
                f"it has {counted(len(extra), 'tensor')} that {self.family.architecture} does not know, the first is {extra[0]}"
            )
        for name, size in expected.items():
            if self.tensors[name].shape != size:
                raise wrong_shape(name, self.tensors[name].shape, size)

    def _drop_stored_tied_output(self) -> None:
        """Drops the stored output layer of a tied model, which some folders have; refuses one that differs from the embedding."""
        names = self.table.output_name, self.table.embedding_name
        embedding = self.tensors.get(names[1])
        output = self.tensors[names[0]]
        is_same = embedding is not None and output[1:3] == embedding[1:3]
        for start in range(0, output.shape[0] if is_same else 0, _COMPARE_ROWS):
            rows = (self.read(n, 0, start, start + _COMPARE_ROWS) for n in names)
            is_same = is_same and torch.equal(*rows)
        if not is_same:
            raise ModelFolderError(
                f"tie_word_embeddings is true but the stored {names[0]} is not the embedding; "
                "set tie_word_embeddings to false in config.json, or delete the tensor"
            )
        del self.tensors[names[0]]


def weights_fingerprint(folder: Path, precision: str) -> str:
    """Returns a hash that identifies a Hugging Face folder's weights without reading all of them.

    The hash covers config.json, and the size, header and samples of the content of each safetensors file.
    """
    return _fingerprint(
        precision.encode() + (folder / "config.json").read_bytes(),
        (p for p in folder.glob("*.safetensors") if p.is_file()),
    )


def checkpoint_fingerprint(folder: Path) -> str:
    """Returns a hash that identifies the weights in an ``iter_`` folder of a Megatron checkpoint."""
    return _fingerprint(b"", (path for path in folder.rglob("*") if path.is_file()))


def _fingerprint(start: bytes, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256(start)
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(part * max(1, size // 64))
                digest.update(file.read(1 << 14))
    return digest.hexdigest()


def _carried_files(path: Path, known: ModelDescription) -> dict[str, list[str] | None]:
    """Returns the files that have carried tensors, with their names as in ``shard_files``; empty if the folder has no weights."""
    if (path / CARRIED_FILE).is_file():
        return {CARRIED_FILE: None}
    if (path / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (path / INDEX_FILE).is_file():
        return {}
    files = indexed_files(read_json_object(path / INDEX_FILE))
    return {file: names for file, names in files.items() if any(map(known.is_carried, names))}


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Refuses a tokenizer whose largest id is beyond the rows of the embedding."""
    if not (path / "tokenizer.json").exists():
        return
    content = read_json_object(path / "tokenizer.json")
    try:
        vocab = (content.get("model") or {}).get("vocab") or {}
        ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        if any(type(token) is not int for token in ids):
            raise TypeError("an id is not an integer")
        highest = max(ids, default=-1)
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"tokenizer.json does not have the format of the tokenizers library: {error!r}"
        ) from error
    if highest >= vocab_size:
        raise ModelFolderError(
            f"the tokenizer has ids up to {highest}, but the embedding has only {vocab_size} rows; "
            "the tokenizer belongs to another model, or tokens were added without resizing the embedding"
        )
