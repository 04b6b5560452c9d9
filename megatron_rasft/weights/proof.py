"""Proof of a conversion: every tensor and element counted on both sides, and compared bit by bit."""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rasft.weights.conversion import place, read_parameter
from megatron_rasft.weights.families import StoredParameter
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.fp8_blocks import SCALE_SUFFIX, is_linear_layer, quantized
from megatron_rasft.weights.torch_dist import TorchDistFolder


@dataclass(kw_only=True)
class Proof:
    """What a comparison found."""

    num_tensors: int
    """Hugging Face tensors of the model, each compared."""
    num_elements: int
    """Elements of these tensors."""
    num_padding: int
    """Elements that the checkpoint has beyond them: rows of the padded vocabulary, added query groups."""
    checksum: str
    """SHA-256 over name, type, shape and bytes of every tensor, in the order of the model."""
    faults: list[str]
    """One line for each tensor that is missing, extra, misshapen, not finite or not the same."""

    def describe(self) -> str:
        counts = (
            f"{self.num_tensors:,} tensors, {self.num_elements:,} elements, {self.num_padding:,} of padding"
        )
        if self.faults:
            return "\n".join([f"{len(self.faults)} faults in {counts}", *self.faults])
        return f"{counts}; both sides the same, sha256 {self.checksum}"


def prove(
    checkpoint: TorchDistFolder,
    folder: HfFolder,
    *,
    is_export: bool,
    num_workers: int = 1,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Proof:
    """Read a checkpoint back as Hugging Face tensors and compare them with a folder's.

    What was made is compared with what it was made of, rounded to the same type. Missing, extra and
    misshapen tensors are refused, by name, when a folder is opened and by ``check_parameters``.

    Args:
        checkpoint: Megatron's side.
        folder: the other side, opened with its weights.
        is_export: the folder was made of the checkpoint; False: the checkpoint of the folder.
        num_workers: parameters at a time.
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
            theirs = folder.read(name)
            source, made = (ours, theirs) if is_export else (theirs, ours)
            digest = tensor_digest(name, made)
            faults += [f"{name} holds values that are not finite"] * (not torch.isfinite(made).all())
            if tensor_digest(name, source.to(made.dtype)) != digest:
                faults.append(f"{name} is not the same on both sides")
            digests.append(digest)
        on_progress(num_bytes)
        return digests, faults, num_elements

    with ThreadPoolExecutor(num_workers) as pool:
        results = list(pool.map(compare, folder.table.stored_parameters()))
    return _summary(results, checkpoint, folder)


def prove_fp8(checkpoint: TorchDistFolder, template: HfFolder, exported: Path) -> Proof:
    """The same for a folder in FP8: each matrix must be the checkpoint's, quantized anew.

    Args:
        checkpoint: what the folder was made of.
        template: the model's description.
        exported: the folder, which transformers and serving engines can read but ``HfFolder`` cannot.
    """
    files = {path: safe_open(path, framework="pt") for path in sorted(exported.glob("*.safetensors"))}
    where = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118 (no mapping)
    results = []
    for parameter in template.table.stored_parameters():
        digests, faults, num_elements = [], [], 0
        tensors = read_parameter(checkpoint, template.table, parameter)
        for name, tensor in zip(parameter.binding.hf_names, tensors, strict=True):
            num_elements += tensor.numel()
            if is_linear_layer(name, tuple(tensor.shape)):
                values, scales = quantized(tensor)
                expected = {name: values.view(torch.uint8), name + SCALE_SUFFIX: scales}
            else:
                expected = {name: tensor}
            for key, value in expected.items():
                if key not in where:
                    faults.append(f"{key} is missing")
                    continue
                found = where.pop(key).get_tensor(key)
                if found.dtype is torch.float8_e4m3fn:
                    found = found.view(torch.uint8)
                digest = tensor_digest(key, found)
                if tensor_digest(key, value.to(found.dtype)) != digest:
                    faults.append(f"{key} is not the checkpoint's")
                digests.append(digest)
        results.append((digests, faults, num_elements))
    results.append(([], [f"{name} is unknown to the model" for name in where], 0))
    return _summary(results, checkpoint, template)


def _summary(
    results: list[tuple[list[bytes], list[str], int]], checkpoint: TorchDistFolder, folder: HfFolder
) -> Proof:
    whole = hashlib.sha256()
    for digests, _, _ in results:
        for digest in digests:
            whole.update(digest)
    num_elements = sum(count for _, _, count in results)
    keys = {place(checkpoint, parameter)[0] for parameter in folder.table.stored_parameters()}
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


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """SHA-256 over name, type, shape and bytes."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.digest()
