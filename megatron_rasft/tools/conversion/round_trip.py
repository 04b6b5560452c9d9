"""Proves a conversion: counts tensors and elements on both sides, and compares all of them bit by bit."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rasft.tools.conversion.conversion import places, read_parameter, written_type
from megatron_rasft.tools.conversion.fp8_folders import quantized
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder
from megatron_rasft.weights.exporting import type_names
from megatron_rasft.weights.families import StoredParameter
from megatron_rasft.weights.finite import NOT_FINITE, is_finite
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.fp8_blocks import SCALE_SUFFIX, is_linear_layer

BLOCK_BYTES = 4 << 20
"""Number of bytes of rows that are compared at a time."""


@dataclass(kw_only=True)
class Proof:
    """The result of a comparison."""

    num_tensors: int
    """Number of Hugging Face tensors that were compared."""
    num_elements: int
    """Number of elements in these tensors."""
    num_padding: int
    """Number of further elements in the checkpoint: rows of the padded vocabulary, added query groups."""
    checksum: str
    """SHA-256 over name, type, shape and bytes of every tensor, in the order of the model."""
    faults: list[str]
    """One line for each tensor that is missing, unknown, of wrong shape or type, not finite, or different."""

    def describe(self) -> str:
        counts = (
            f"{self.num_tensors:,} tensors, {self.num_elements:,} elements, {self.num_padding:,} of padding"
        )
        if self.faults:
            return "\n".join([f"{len(self.faults)} faults in {counts}", *self.faults])
        return f"{counts}; both sides are equal, sha256 {self.checksum}"


def prove(
    checkpoint: TorchDistFolder,
    folder: HfFolder,
    *,
    is_export: bool,
    dtype: torch.dtype | None = None,
    num_workers: int = 1,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Proof:
    """Reads a checkpoint as Hugging Face tensors and compares them with those of a folder.

    Missing and unknown tensors and wrong shapes have already been refused, on opening the folder and by ``check_parameters``. Each
    worker holds one parameter in memory, as in ``megatron_to_hf``, and a few rows of the folder.

    Args:
        checkpoint: the Megatron checkpoint.
        folder: the Hugging Face folder, opened with its weights.
        is_export: True if the folder was made from the checkpoint, False if the checkpoint was made from the folder.
        dtype: the type to which all weights should have been rounded; None if each should have kept its type.
        num_workers: number of parameters to compare at a time.
        on_progress: called with the bytes of the checkpoint that were compared since the last call.
    """

    def compare(parameter: StoredParameter) -> tuple[list[bytes], list[str], int]:
        digests, faults, num_elements = [], [], 0
        num_bytes = 0
        for name, ours in zip(
            parameter.binding.hf_names, read_parameter(checkpoint, folder.table, parameter), strict=True
        ):
            num_bytes += ours.nbytes
            num_elements += ours.numel()
            pairs = ((ours[rows], folder.read(name, 0, rows.start, rows.stop)) for rows in _blocks(ours))
            digest, found = _compare(
                name,
                ours.shape,
                pairs if is_export else ((made, source) for source, made in pairs),
                None if parameter.binding.entry.is_buffer else dtype,
            )
            digests.append(digest)
            faults += found
        on_progress(num_bytes)
        return digests, faults, num_elements

    with ThreadPoolExecutor(num_workers) as pool:
        results = list(pool.map(compare, folder.table.stored_parameters()))
    return _summary(results, checkpoint, folder)


def prove_fp8(checkpoint: TorchDistFolder, template: HfFolder, exported: Path) -> Proof:
    """Compares an FP8 folder with its checkpoint. Quantizing the checkpoint's matrices again must give the same bits.

    Args:
        checkpoint: the checkpoint that the folder was made from.
        template: the model's description.
        exported: the FP8 folder. ``HfFolder`` would dequantize its weights, so its files are read here.
    """
    files = {path: safe_open(path, framework="pt") for path in sorted(exported.glob("*.safetensors"))}
    where = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118 (no mapping)
    results = []
    for parameter in template.table.stored_parameters():
        digests, faults, num_elements = [], [], 0
        tensors = read_parameter(checkpoint, template.table, parameter)
        for name, tensor in zip(parameter.binding.hf_names, tensors, strict=True):
            num_elements += tensor.numel()
            made_type = written_type(parameter.binding.entry, tensor.dtype, None, is_fp8=True)
            expected = {name: tensor.to(made_type)}
            if is_linear_layer(name, tuple(tensor.shape)):
                # checked before rounding, because e4m3 cannot represent infinity
                if not is_finite(tensor):
                    faults.append(f"{name} contains {NOT_FINITE}")
                expected = dict(zip((name, name + SCALE_SUFFIX), quantized(tensor), strict=True))
            for key, value in expected.items():
                if key not in where:
                    faults.append(f"{key} is missing")
                    continue
                made = where.pop(key).get_slice(key)
                if made.get_shape() != list(value.shape):
                    faults.append(f"{key} has shape {made.get_shape()} instead of {list(value.shape)}")
                    continue
                pairs = ((value[rows], made[rows]) for rows in _blocks(value))
                digest, found = _compare(key, value.shape, pairs, None)
                digests.append(digest)
                faults += found
        results.append((digests, faults, num_elements))
    results.append(([], [f"{name} is unknown to the model" for name in where], 0))
    return _summary(results, checkpoint, template)


def _blocks(tensor: Tensor) -> Iterator[slice]:
    num_rows = max(1, BLOCK_BYTES // tensor[0].nbytes)
    for start in range(0, tensor.shape[0], num_rows):
        yield slice(start, min(start + num_rows, tensor.shape[0]))


def _compare(
    name: str, shape: Sequence[int], pairs: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype | None
) -> tuple[bytes, list[str]]:
    """Compares the rows of a converted tensor with those of its source, block by block.

    Args:
        name: the tensor's name.
        shape: the shape of the whole tensor.
        pairs: blocks of the source and of the converted tensor, in the order of the rows.
        dtype: expected type of the converted tensor; None for the source's type.

    Returns:
        SHA-256 over name, type, shape and bytes of the converted tensor, and the faults.
    """
    digest = hashlib.sha256()
    is_same = is_usable = True
    types: tuple[torch.dtype, torch.dtype] | None = None
    for source, made in pairs:
        if types is None:
            types = made.dtype, dtype or source.dtype
            digest.update(f"{name} {made.dtype} {list(shape)}\n".encode())
        ours, theirs = (t.contiguous().view(torch.uint8) for t in (source.to(made.dtype), made))
        is_same = is_same and torch.equal(ours, theirs)
        is_usable = is_usable and (made.itemsize == 1 or is_finite(made))
        digest.update(memoryview(theirs.reshape(-1).numpy()))
    faults = [] if is_usable else [f"{name} contains {NOT_FINITE}"]
    if types is not None and types[0] != types[1]:
        faults.append(f"{name} is {type_names(types[:1])}, not {type_names(types[1:])}")
    if not is_same:
        faults.append(f"{name} differs between the two sides")
    return digest.digest(), faults


def _summary(
    results: list[tuple[list[bytes], list[str], int]], checkpoint: TorchDistFolder, folder: HfFolder
) -> Proof:
    whole = hashlib.sha256()
    for digests, _, _ in results:
        for digest in digests:
            whole.update(digest)
    num_elements = sum(count for _, _, count in results)
    keys = {key for p in folder.table.stored_parameters() for key, _ in places(checkpoint, p)}
    stored = sum(math.prod(checkpoint.tensors[key].size) for key in keys)
    faults = [fault for _, found, _ in results for fault in found]
    expected = sum(math.prod(shape) for shape in folder.table.hf_shapes.values())
    if num_elements != expected:
        faults.append(f"{num_elements} elements were compared, config.json implies {expected}")
    return Proof(
        num_tensors=len(folder.table.hf_shapes),
        num_elements=num_elements,
        num_padding=stored - num_elements,
        checksum=whole.hexdigest(),
        faults=faults,
    )
