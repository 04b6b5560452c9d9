"""Converts between Hugging Face folders and Megatron checkpoints (torch_dist) in one pass, on a CPU.

convert_checkpoint.py hf-to-megatron --input DIR --output DIR [--dtype T] [--verify]
convert_checkpoint.py megatron-to-hf --input DIR --output DIR [--hf-model DIR] [--dtype T | --fp8] [--verify]

A run with any parallel layout (TP, PP, VPP, EP, CP) can --load the Megatron checkpoint. If the process is killed, the same
command continues.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # lets the file run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_rasft.bridge.package import import_auto_bridge
from megatron_rasft.config.saved import SavedConfig
from megatron_rasft.errors import CheckpointError, first_line
from megatron_rasft.files import read_json_object
from megatron_rasft.tools import cli
from megatron_rasft.tools.conversion.conversion import (
    TEMPLATE_DIR,
    check_parameters,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_rasft.tools.conversion.fp8_folders import check_whole_blocks
from megatron_rasft.tools.conversion.layerwise import layerwise_logits
from megatron_rasft.tools.conversion.round_trip import Proof, prove, prove_fp8
from megatron_rasft.tools.conversion.torch_dist import TorchDistFolder
from megatron_rasft.weights.families import FAMILIES
from megatron_rasft.weights.folder import HfFolder

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LOGIT_TOLERANCE = 1e-4
"""Largest gap to transformers' logits, as a share of the largest logit; both compute in fp32."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if the result was written, 1 if --verify found a fault in it."""
    args = _build_parser().parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"--workers must be >= 1, got {args.workers}.")
    if args.bridge is not None:
        _use_bridge(args)
        return 0
    proof = args.run(args)
    print(f"wrote {args.output}")
    if proof is None:
        return 0
    print(proof.describe())
    return 1 if proof.faults else 0


def convert_to_megatron(args: argparse.Namespace) -> Proof | None:
    """Converts a Hugging Face folder to a Megatron checkpoint."""
    folder = HfFolder.open(args.input)
    dtype = _DTYPES.get(args.dtype)
    num_bytes = sum(t.dtype.itemsize * _numel(t.shape) for t in folder.tensors.values())
    if dtype is not None:
        num_bytes = dtype.itemsize * sum(_numel(t.shape) for t in folder.tensors.values())
    with _bar("converting", num_bytes) as on_progress:
        hf_to_megatron(
            folder,
            args.output,
            dtype=dtype,
            query_groups=args.query_groups,
            num_workers=args.workers,
            on_progress=on_progress,
        )
    if not args.verify:
        return None
    checkpoint = TorchDistFolder.open(args.output)
    check_parameters(checkpoint, folder.table)
    return _prove_whole(args, checkpoint, folder, num_bytes, is_export=False)


def convert_to_hf(args: argparse.Namespace) -> Proof | None:
    """Converts a Megatron checkpoint to a Hugging Face folder."""
    if args.fp8 and args.dtype is not None:
        raise ValueError("--fp8 and --dtype exclude each other: --fp8 keeps the other weights in bfloat16.")
    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb must be > 0, got {args.max_shard_gb}.")
    checkpoint = TorchDistFolder.open(args.input)
    template = HfFolder.open(_template(args, checkpoint), with_weights=False)
    check_parameters(checkpoint, template.table)
    if args.fp8:
        check_whole_blocks(template.table.hf_shapes)
    dtype = _DTYPES.get(args.dtype)
    num_elements = sum(_numel(shape) for shape in template.table.hf_shapes.values())
    stored = checkpoint.tensors["embedding.word_embeddings.weight"].properties.dtype
    itemsize = 1 if args.fp8 else (dtype or stored).itemsize
    with _bar("converting", num_elements * itemsize) as on_progress:
        megatron_to_hf(
            checkpoint,
            template,
            args.output,
            dtype=dtype,
            is_fp8=args.fp8,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            num_workers=args.workers,
            on_progress=on_progress,
        )
    if not args.verify:
        return None
    if args.fp8:
        return prove_fp8(checkpoint, template, Path(args.output))
    folder = HfFolder.open(args.output)
    return _prove_whole(args, checkpoint, folder, num_elements * stored.itemsize, is_export=True)


def _prove_whole(
    args: argparse.Namespace,
    checkpoint: TorchDistFolder,
    folder: HfFolder,
    num_bytes: int,
    *,
    is_export: bool,
) -> Proof:
    """Compares all tensors, and the logits."""
    dtype = _DTYPES.get(args.dtype)
    with _bar("comparing", num_bytes) as on_progress:
        proof = prove(
            checkpoint,
            folder,
            is_export=is_export,
            dtype=dtype,
            num_workers=args.workers,
            on_progress=on_progress,
        )
    _compare_logits(checkpoint, folder, dtype, proof)
    return proof


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _template(args: argparse.Namespace, checkpoint: TorchDistFolder) -> Path:
    """Returns the folder with the model's description: --hf-model, the folder inside a converted checkpoint, or the run's own
    --hf-model."""
    if args.hf_model is not None:
        return Path(args.hf_model)
    root = checkpoint.path.parent
    if (root / TEMPLATE_DIR).is_dir():
        return root / TEMPLATE_DIR
    try:
        saved = SavedConfig.read(root)
    except ValueError:  # another program wrote the checkpoint, and this config.json does not belong to a run
        saved = None
    named = None if saved is None else saved.hf_model
    if named is None or not Path(named).is_dir():
        raise ValueError(
            f"--hf-model is missing, and {root} does not name its model. Give the folder that the run was "
            "started with; only its config and tokenizer are used."
        )
    return Path(named)


def _compare_logits(
    checkpoint: TorchDistFolder, folder: HfFolder, dtype: torch.dtype | None, proof: Proof
) -> None:
    """Compares logits with transformers' if the model fits into memory; prints a note if it does not."""
    needed = (
        6.5 * proof.num_elements
    )  # memory for the weights in fp32 and, during loading, in the stored type
    available = psutil.virtual_memory().available
    if needed > available:
        print(
            f"logits not compared: transformers needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"
        )
        return
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(folder.shape.vocab_size, (2, 48), generator=generator)
    if dtype is None and folder.is_quantized:
        dtype = torch.bfloat16  # both sides dequantize to it
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=dtype or torch.float32, local_files_only=True
        ).float()
    except (ImportError, ValueError) as error:
        if not folder.is_quantized:
            raise
        print(f"logits not compared: transformers cannot dequantize this folder: {first_line(error)}")
        return
    with torch.no_grad():
        expected = model(tokens).logits
    del model
    gap = (layerwise_logits(checkpoint, folder, tokens, weight_dtype=dtype) - expected).abs().max().item()
    allowed = _LOGIT_TOLERANCE * expected.abs().max().item()
    print(
        f"logits of {tokens.numel()} sampled tokens: largest gap to transformers {gap:.2e}, allowed {allowed:.2e}"
    )
    if not gap <= allowed:
        proof.faults.append(f"logits differ from transformers' by {gap:.2e}, allowed is {allowed:.2e}")


def _use_bridge(args: argparse.Namespace) -> None:
    """Converts a family without a table with NVIDIA's Megatron-Bridge, and renames the result when it is complete."""
    model = Path(args.input if args.run is convert_to_megatron else args.hf_model or "")
    config = model / "config.json"
    if not config.is_file():
        raise ValueError(
            "--bridge needs the model's Hugging Face folder: as --input, or as --hf-model for megatron-to-hf."
        )
    named = read_json_object(config).get("architectures")
    known = [name for name in (named if isinstance(named, list) else ()) if name in list(FAMILIES)]
    if known:
        raise ValueError(
            f"--bridge {args.bridge} is for families without a table, and {known[0]} has a table. Leave the flag out."
        )
    if args.verify or args.dtype is not None or getattr(args, "fp8", False):
        raise ValueError("--verify, --dtype and --fp8 need a table; with --bridge leave them out.")
    if Path(args.output).exists():
        raise ValueError(f"--output {args.output} exists. Remove it, or give another name.")
    auto_bridge = _megatron_bridge(args.bridge)
    output = Path(args.output).absolute()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if args.run is convert_to_megatron:
            auto_bridge.import_ckpt(str(model), str(partial))
        else:
            # strict: a missing tensor is an error
            auto_bridge.from_hf_pretrained(str(model)).export_ckpt(args.input, str(partial), strict=True)
    except Exception as error:  # the bridge raises many kinds of errors for models that it does not support
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"Megatron-Bridge could not convert {args.input}: {first_line(error)}"
        ) from error
    try:
        partial.rename(output)
    except OSError as error:
        raise CheckpointError(
            f"{partial} is complete, but cannot be renamed to {output} ({error.strerror}). Rename it by hand."
        ) from error
    print(f"wrote {args.output}, by Megatron-Bridge")


def _megatron_bridge(flag: str) -> Any:
    """Imports Megatron-Bridge's AutoBridge; raises ValueError if a package or a GPU is missing."""
    # this module reads and writes checkpoints
    auto_bridge = import_auto_bridge(f"--bridge {flag}", "megatron.bridge.training.model_load_save")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--bridge {flag}: Megatron-Bridge needs an NVIDIA GPU, which this machine does not have. Convert on a machine with a GPU."
        )
    return auto_bridge


@contextmanager
def _bar(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr if stderr is a terminal; yields the function that advances it."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda count: progress.advance(task, count)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="hf-to-megatron|megatron-to-hf")
    runs: dict[str, Callable[[argparse.Namespace], Proof | None]] = {
        "hf-to-megatron": convert_to_megatron,
        "megatron-to-hf": convert_to_hf,
    }
    for name, run in runs.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        _add_flags(command)
        if run is convert_to_megatron:
            command.add_argument(
                "--query-groups",
                type=int,
                metavar="N",
                help="Add query groups of zeros up to N, like the run's --rasft-query-groups.",
            )
        else:
            command.add_argument(
                "--hf-model",
                metavar="DIR",
                help="Folder with the model's config and tokenizer. Unset: the folder that the checkpoint names.",
            )
            command.add_argument(
                "--fp8",
                action="store_true",
                help="Quantize the layers' matrices to FP8 (e4m3, a scale for each 128 x 128 block), for serving; float32 elsewhere becomes bfloat16.",
            )
            command.add_argument(
                "--max-shard-gb",
                type=float,
                default=5.0,
                metavar="N",
                help="Largest size of a file in GB, > 0 (default: 5).",
            )
    return parser


def _add_flags(command: argparse.ArgumentParser) -> None:
    add: Any = command.add_argument
    add(
        "--input",
        required=True,
        metavar="DIR",
        help="Folder to convert. If it is a run's --save folder, its newest checkpoint is converted.",
    )
    add("--output", required=True, metavar="DIR", help="Folder to write. It exists only when it is complete.")
    add("--dtype", choices=list(_DTYPES), help="Type of all weights (default: each weight keeps its type).")
    add(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="Number of layers or files to convert at a time, >= 1 (default: 2).",
    )
    add(
        "--verify",
        action="store_true",
        help="Read the result back and compare every tensor; also compare logits with transformers' if the model fits into memory.",
    )
    add(
        "--bridge",
        choices=["megatron-bridge"],
        help="Convert a family without a table with NVIDIA's Megatron-Bridge.",
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
