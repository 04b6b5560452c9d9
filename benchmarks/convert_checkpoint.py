"""Measures time and memory of a checkpoint conversion, compared with copying the files and with transformers' load and save.

benchmarks/convert_checkpoint.py --shape llama-3.1-8b --folder DIR [--with-transformers] [--workers N]

Writes a folder of that shape and size with random weights into DIR, and needs three times its size on the disk. Every
measurement runs in a new process, begins with a cold cache, and ends when all bytes are on the disk. Memory is the peak above
the memory before the measurement. Compare ratios between machines, not absolute figures.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron_rasft.tools.conversion.conversion import (
    TEMPLATE_DIR,
    hf_to_megatron,
    megatron_to_hf,
    num_chunks,
)
from megatron_rasft.tools.conversion.round_trip import BLOCK_BYTES
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder
from megatron_rasft.weights.architecture import read_shape
from megatron_rasft.weights.exporting import ShardWriter, file_name, write_index
from megatron_rasft.weights.families import FAMILIES, NameTable
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.gathering import TensorPlan

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.2-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.1-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip

_SHARD_BYTES = 2_000_000_000
_BLOCK_BYTES = 16 << 20
_BLOCKS_OF_PROOF = 8


def write_model(shape: str, path: Path) -> None:
    """Writes a random bf16 Llama folder of that shape, tensor by tensor."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **SHAPES[shape],
    }
    table = table_of(config)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    files: list[list[TensorPlan]] = [[]]
    room = _SHARD_BYTES
    for name, size in table.hf_shapes.items():
        num_bytes = 2 * torch.Size(size).numel()
        if num_bytes > room and files[-1]:
            files.append([])
            room = _SHARD_BYTES
        files[-1].append(TensorPlan(name, size, torch.bfloat16))
        room -= num_bytes
    noise = torch.randn(1 << 20).bfloat16()
    for i, plans in enumerate(files):
        writer = ShardWriter(path / file_name(i, len(files)), plans)
        for plan in plans:
            count = torch.Size(plan.shape).numel()
            writer.write(plan.name, noise.repeat(-(-count // noise.numel()))[:count].view(plan.shape))
    weight_map = {plan.name: file_name(i, len(files)) for i, plans in enumerate(files) for plan in plans}
    if len(files) > 1:
        write_index(path, weight_map, sum(2 * torch.Size(size).numel() for size in table.hf_shapes.values()))


def table_of(config: dict[str, Any]) -> NameTable:
    family = FAMILIES[config["architectures"][0]]
    return NameTable(family, read_shape(config, family))


# ---- the measured functions; each converts a source folder to a target folder


def copy(source: Path, target: Path, workers: int) -> None:
    """Copies every byte and waits until it is on the disk, which measures the disk's speed."""
    target.mkdir()
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            shutil.copyfileobj(read, write, _BLOCK_BYTES)
            write.flush()
            os.fsync(write.fileno())


def to_megatron(source: Path, target: Path, workers: int) -> None:
    hf_to_megatron(HfFolder.open(source), target, num_workers=workers)


def to_hf(source: Path, target: Path, workers: int) -> None:
    template = HfFolder.open(source / TEMPLATE_DIR, with_weights=False)
    megatron_to_hf(
        TorchDistFolder.open(source), template, target, max_shard_bytes=_SHARD_BYTES, num_workers=workers
    )


def transformers_load_save(source: Path, target: Path, workers: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="2GB")
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _forget_cache(folder: Path) -> None:
    """Makes the kernel drop its cached pages of these files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident_bytes() -> tuple[int, int]:
    """Memory of this process: private bytes, and mapped pages of files, which the kernel may drop."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own, mapped = (int(status.split(f"{name}:")[1].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
    return own, mapped


@contextlib.contextmanager
def _peak_memory(result: dict[str, float]) -> Iterator[None]:
    before = peak = _resident_bytes()
    is_over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_over.wait(0.02):
            own, mapped = _resident_bytes()
            peak = max(peak[0], own), max(peak[1], mapped)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        is_over.set()
        sampler.join()
        result["peak_gib"] = (peak[0] - before[0]) / 2**30
        result["peak_mapped_gib"] = (peak[1] - before[1]) / 2**30


def _in_child(
    do: Callable[[Path, Path, int], None], source: Path, target: Path, workers: int, out: Any
) -> None:
    result: dict[str, float] = {}
    _forget_cache(source)
    if do is transformers_load_save:
        from transformers import LlamaForCausalLM  # noqa: F401 (imported before the measurement)
    with _peak_memory(result):
        start = time.perf_counter()
        do(source, target, workers)
        result["time_s"] = time.perf_counter() - start
    out.put(result)


def measure(
    do: Callable[[Path, Path, int], None], source: Path, target: Path, workers: int
) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_in_child, args=(do, source, target, workers, out))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit(f"{do.__name__} failed with exit code {child.exitcode}")
    result: dict[str, float] = out.get()
    _forget_cache(target)
    return result


def calculated(shape: str, workers: int) -> dict[str, float]:
    """Calculates the peak memory in GiB from the tensors that are in memory at once.

    With --verify it is the same in both directions.
    """
    table = table_of({"architectures": ["LlamaForCausalLM"], **SHAPES[shape]})
    to_megatron, to_hf, verified, layers, total = 0.0, 0.0, 0.0, 0.0, 0.0
    for parameter in table.stored_parameters():
        binding = parameter.binding
        layout = binding.entry.layout(table.shape, 0, 1, None)
        size = 2 * torch.Size(binding.shard_shape(layout)).numel()
        chunk = size / num_chunks(layout.length, size) if binding.entry.is_sharded else size
        # rows are read in chunks, each with its slice of the file and torch.save's copy; columns are read at once
        to_megatron = max(to_megatron, 3 * chunk if layout.dim == 0 else size + 2 * chunk)
        # rows are read into the result, columns need one more chunk; interleaved tensors need a copy of the parameter
        held = size if layout.dim == 0 else size + chunk
        to_hf = max(to_hf, 2 * size if len(layout.pieces) > len(binding.hf_names) else held)
        # the comparison holds a parameter like megatron-to-hf, and blocks of rows: two of the folder, their copies, isfinite's
        # result
        verified = to_hf + _BLOCKS_OF_PROOF * BLOCK_BYTES
        total += size
        layers += size if parameter.position == (0,) else 0
    gib = 2**30
    return {
        "folder_gib": total / gib,
        "layer_gib": layers / gib,
        "to_megatron_peak_gib": workers * to_megatron / gib,
        "to_hf_peak_gib": workers * to_hf / gib,
        "verified_peak_gib": workers * max(to_megatron, verified) / gib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument(
        "--folder",
        default=None,
        metavar="DIR",
        help="Folder on the disk to measure (default: a temporary folder).",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--with-transformers", action="store_true", help="Needs the model's size in memory.")
    args = parser.parse_args()
    if args.folder is not None:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        write_model(args.shape, root / "hf")
        results = {"copy": measure(copy, root / "hf", root / "copy", args.workers)}
        shutil.rmtree(root / "copy")
        if args.with_transformers:
            results["transformers"] = measure(
                transformers_load_save, root / "hf", root / "saved", args.workers
            )
            shutil.rmtree(root / "saved")
        results["to_megatron"] = measure(to_megatron, root / "hf", root / "megatron", args.workers)
        results["copy_again"] = measure(copy, root / "hf", root / "copy", args.workers)
        shutil.rmtree(root / "copy")
        shutil.rmtree(root / "hf")
        results["to_hf"] = measure(to_hf, root / "megatron", root / "back", args.workers)
    # two copies, because the speed of a shared disk changes from minute to minute
    copy_s = (results["copy"]["time_s"] + results["copy_again"]["time_s"]) / 2
    for result in results.values():
        result["times_copy"] = result["time_s"] / copy_s
    print(json.dumps({"shape": args.shape, "workers": args.workers, "measured": results}, indent=1))
    for shape in dict.fromkeys((args.shape, "llama-3.1-70b")):
        print(json.dumps({"shape": shape, "calculated": calculated(shape, args.workers)}, indent=1))


if __name__ == "__main__":
    main()
